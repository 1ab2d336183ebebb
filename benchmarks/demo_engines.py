"""The demo with each engine: does vLLM, on this machine or as two actors on Ray, train as well as ``transformers``?

    python benchmarks/demo_engines.py [--seeds 0 1] [--json FILE]       # after `make vllm ray`; an hour a seed
    python benchmarks/demo_engines.py --quick                           # two steps of each on few tasks; six minutes

Each run is the whole demo (warm start, 16 steps of asynchronous RL); at its end the held-out tasks are played by the
engine that it was trained with. A run with vLLM is compared with the ``transformers`` run of its seed, task by task:
the difference of pass@1 with its 95 % interval. With several seeds there is one more row, in which a task's attempts
are those of all seeds. The interval is over tasks: that two trainings of one configuration differ is not in it.

A run that is finished in ``--runs`` is not run again, one that was cut goes on, one with other settings is refused.
Times are recorded, and mean something only where the machine did nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo import QUICK
from measure import Progress
from record import ROOT, Check, commit, save, write

REFERENCE = "transformers"
RUNS: dict[str, list[str]] = {
    REFERENCE: ["demo"],
    "vllm": ["demo-vllm"],
    "vllm, Ray, 2 actors": ["demo-vllm", "--cluster.backend", "ray", "--engine.replicas", "2"],
}
MARGIN = 0.05
HELD_OUT = 512


def run(name: str, seed: int, out: Path, *, quick: bool) -> dict[str, Any]:
    """One demo; what it evaluated and how its training went. It stays in ``out/sample.json``."""
    sample = out / "sample.json"
    settings = QUICK.split() if quick else ["--eval.n", str(HELD_OUT)]
    arguments = [*RUNS[name], "--eval.baseline", "false", *settings, "--seed", str(seed)]
    require_same(out, arguments)
    if sample.exists():
        return dict(json.loads(sample.read_text()))
    start = time.perf_counter()
    command = [sys.executable, "-m", "areal_agents", "train", *arguments, "--out", str(out), "--resume"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = read(name, seed, out) | {"commit": commit(), "wall_seconds": round(time.perf_counter() - start, 1)}
    save(sample, found)
    return found


def require_same(out: Path, arguments: Sequence[str]) -> None:
    """Raise SystemExit where ``out`` holds a training of other settings than ``train *arguments`` has now.

    The shipped file may have changed since, and a run that goes on may change some settings in its middle.
    """
    from areal_agents.evaluation.held_out import settings_of
    from areal_agents.settings import load
    from areal_agents.settings.differences import differences

    if not (out / "config.toml").exists():
        return
    name, *flags = arguments
    if changed := differences(settings_of(out), load(name, flags)):
        lines = "\n".join(f"  {key} was {was!r} and is {now!r} now" for key, (was, now) in changed.items())
        raise SystemExit(f"{out} is a run with other settings:\n{lines}\nname another --runs")


def read(name: str, seed: int, out: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if row["kind"] == "train"]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    return {
        "run": name, "seed": seed,
        "held_out": {row["kind"].removeprefix("eval/"): row["pass_at_1"]
                     for row in metrics if row["kind"].startswith("eval/")},
        "training_reward": [row["reward"] for row in steps],
        "step_seconds": [round(row["step_seconds"], 2) for row in steps],
        "age_max": max(row["age_max"] for row in steps),
        "events": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }  # fmt: skip


def compared(runs: Path, name: str, seeds: list[int]) -> dict[str, Any]:
    """The paired comparison with the reference, over the attempts of ``seeds``."""
    from areal_agents.evaluation.compare import Evaluation, compare, load

    def merged(which: str) -> Evaluation:
        rewards: dict[Any, list[float]] = {}
        for seed in seeds:
            for task, found in load(f"{runs / folder(which, seed)}:after_rl").rewards.items():
                rewards.setdefault(task, []).extend(found)
        return Evaluation(which, rewards)

    comparison = compare(merged(REFERENCE), merged(name))
    return {"seeds": seeds, "within": comparison.within(MARGIN)} | comparison.to_json()


def folder(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def checks(comparisons: list[dict[str, Any]]) -> list[Check]:
    """Of each comparison, that its interval lies inside the margin."""
    return [_check(comparison) for comparison in comparisons]


def _check(c: dict[str, Any]) -> Check:
    name = (
        f"pass@1 of {c['b']} less that of {c['a']}, seed{'s' * (len(c['seeds']) > 1)} "
        f"{', '.join(map(str, c['seeds']))}, n = {c['n']}: 95 % interval in points"
    )
    goal = f"inside ±{100 * MARGIN:g} points"
    if (ci95 := c["pass_at_1"]["ci95"]) is None:
        return Check(name, None, goal, False, "the comparison has no interval")
    return Check(name, [round(100 * bound, 2) for bound in ci95], goal, c["within"])


def quick_checks(samples: list[dict[str, Any]]) -> list[Check]:
    """What must hold whatever the timing and the luck."""
    return [
        check
        for s in samples
        for check in (
            Check(f"{s['run']}: learner steps", len(s["step_seconds"]), "== 2", len(s["step_seconds"]) == 2),
            Check(f"{s['run']}: oldest token trained on, in versions", s["age_max"], "<= 1", s["age_max"] <= 1),
        )
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the runs here, and go on with what it has")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    progress = Progress(len(RUNS) * len(seeds))
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="areal-demo-") as temporary:
        runs = (options.runs or Path(temporary)).absolute()
        for seed in seeds:
            for name in RUNS:
                samples.append(run(name, seed, runs / folder(name, seed), quick=options.quick))
                progress(f"{name}, seed {seed}: {samples[-1]['held_out']}")
        others = [name for name in RUNS if name != REFERENCE]
        groups = [[seed] for seed in seeds] + ([seeds] if len(seeds) > 1 else [])
        comparisons = [compared(runs, name, group) for name in others for group in groups]
    found = quick_checks(samples) if options.quick else checks(comparisons)
    write(options.json, "demo_engines", samples, found, comparisons=comparisons)
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
