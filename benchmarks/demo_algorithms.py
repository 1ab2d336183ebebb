"""The demo's task with four algorithms from one warm start: does each raise the held-out score?

    python benchmarks/demo_algorithms.py [--runs FOLDER] [--json FILE]   # not timed whole; on a busy machine too
    python benchmarks/demo_algorithms.py --quick                         # two steps of each on few tasks

One run of ``train demo`` makes the warm start: its one step of RL has a rate of 1e-12, which moves no weight of the
model that it exports. Each algorithm then trains from that model with the demo's settings otherwise, one seed, and
its score on the held-out tasks is compared with that of the warm start, task by task. The interval is over tasks:
that two trainings of one configuration differ is not in it.

A run that is finished in ``--runs`` is not run again, one that was cut goes on, one with other settings is refused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import QUICK
from demo_engines import HELD_OUT, read, require_same
from measure import Progress, table
from record import ROOT, Check, commit, save, write

WARM = "warm start"
FIRST = "grpo"
"""Evaluates the warm start too, before it trains."""
RUNS: dict[str, list[str]] = {
    FIRST: ["--algorithm", "grpo"],
    "ppo": ["--algorithm", "ppo"],
    "gspo": ["--algorithm", "gspo"],
    "grpo, adapters": ["--algorithm", "grpo", "--learner.lora.rank", "16", "--learner.lr", "2e-4"],
}
"""Flags of ``train demo``: presets, and adapters with the rate that they need (twenty times that of whole weights)."""


def train(out: Path, *flags: str) -> None:
    """Run ``train demo``, or go on with it."""
    command = [sys.executable, "-m", "areal_agents", "train", "demo", *flags, "--out", str(out), "--resume"]
    subprocess.run(command, cwd=ROOT, check=True)


def warm_start(out: Path, *, quick: bool) -> Path:
    """The folder of the model that every algorithm starts from."""
    model = out / "model"
    if not model.exists():
        demonstrations = ["--warm_start.demonstrations", "16"] if quick else []
        one = ["--steps", "1", "--learner.lr", "1e-12", "--rollout.groups", "1", "--rollout.group_size", "2"]
        train(out, *one, "--eval.baseline", "false", "--eval.n", "1", *demonstrations)
    return model


def run(name: str, model: Path, out: Path, *, quick: bool) -> dict[str, Any]:
    """Train with one algorithm; what it evaluated and how its training went. It stays in ``out/sample.json``."""
    sample = out / "sample.json"
    flags = QUICK.split() if quick else ["--eval.n", str(HELD_OUT)]
    flags += ["--warm_start.demonstrations", "0", "--model.path", str(model)]
    flags += [*RUNS[name], "--eval.baseline", str(name == FIRST).lower()]
    require_same(out, ["demo", *flags])
    if sample.exists():
        return dict(json.loads(sample.read_text()))
    start = time.perf_counter()
    train(out, *flags)
    found = read(name, 0, out) | {"commit": commit(), "wall_seconds": round(time.perf_counter() - start, 1)}
    save(sample, found)
    return found


def folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def compared(runs: Path, name: str) -> dict[str, Any]:
    """The score after training less that of the warm start, task by task."""
    from areal_agents.evaluation.compare import compare, load

    comparison = compare(load(f"{runs / folder(FIRST)}:before"), load(f"{runs / folder(name)}:after_rl"))
    return {"run": name} | comparison.to_json()


def gained(comparison: dict[str, Any]) -> Check:
    name = f"{comparison['run']}: pass@1 gained from the warm start, n = {comparison['n']}, 95 % interval in points"
    if (ci95 := comparison["pass_at_1"]["ci95"]) is None:
        return Check(name, None, "above 0", False, "the comparison has no interval")
    low, high = (round(100 * bound, 2) for bound in ci95)
    return Check(name, [low, high], "above 0", low > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the runs here, and go on with what it has")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    progress = Progress(1 + len(RUNS))
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="areal-demo-") as temporary:
        runs = (options.runs or Path(temporary)).absolute()
        model = warm_start(runs / folder(WARM), quick=options.quick)
        progress(WARM)
        for name in RUNS:
            samples.append(run(name, model, runs / folder(name), quick=options.quick))
            progress(f"{name}: {samples[-1]['held_out']}")
        comparisons = [compared(runs, name) for name in RUNS]
    print(table([{
        "run": s["run"], "warm start": samples[0]["held_out"]["before"], "after RL": s["held_out"]["after_rl"],
        "minutes": round(s["wall_seconds"] / 60, 1),
    } for s in samples]))  # fmt: skip
    steps = 2 if options.quick else 16
    found = [
        Check(f"{s['run']}: learner steps", n := len(s["step_seconds"]), f"== {steps}", n == steps) for s in samples
    ]
    if not options.quick:
        found += [gained(c) for c in comparisons]
    write(options.json, "demo_algorithms", samples, found, comparisons=comparisons)
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
