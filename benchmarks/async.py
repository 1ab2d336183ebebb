"""Synchronous against asynchronous rollouts: the same number of updates, a long tail of turns, a slow tool.

    python benchmarks/async.py [--json benchmarks/results/async.json]
    python benchmarks/async.py --quick         # two updates each of sync and a staleness of 1: ages and counts

Real engine, real learner; the tool sleeps 100 to 500 ms a turn, and the turns of a task are log-normal (1 to 12, see
``text_envs.py``). Every run is ``areal_agents.trainer.loop`` in a fresh process; modes take turns, ``--rounds`` times.
Wall clock: from the first training episode to the end of the last update. Nothing imports this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Progress, table
from measured_process import Side
from record import Check, write

HERE = Path(__file__).resolve().parent
STALENESS = (0, 1, 2, 4)
"""0 is sync."""


def label(staleness: int) -> str:
    return f"async, at most {staleness} old" if staleness else "sync"


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """One run in a fresh process."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    env = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, HERE / "async_side.py"]
    name = label(asked["max_staleness"])
    with tempfile.TemporaryDirectory(prefix="areal-async-") as out, Side(name, command, env=env, memory=False) as side:
        answer = side.ask(asked | {"out": str(Path(out) / "run")})
        return {"mode": name, "max_staleness": asked["max_staleness"], "seed": asked["seed"], **answer}


def summarize(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a mode: medians over rounds; ``speed-up`` is the median of wall clocks in the same round."""
    base = [s["wall_seconds"] for s in samples if s["max_staleness"] == 0]
    rows = []
    for staleness in sorted({s["max_staleness"] for s in samples}):
        mine = [s for s in samples if s["max_staleness"] == staleness]
        ages: dict[str, int] = {}
        for s in mine:
            for age, n in s["age_histogram"].items():
                ages[age] = ages.get(age, 0) + n
        total = sum(ages.values())
        rows.append({
            "mode": label(staleness),
            "wall s": round(statistics.median(s["wall_seconds"] for s in mine), 1),
            "speed-up": round(statistics.median(b / s["wall_seconds"] for b, s in zip(base, mine, strict=True)), 2),
            "engine idle": f"{statistics.median(s['engine_idle_seconds'] / s['wall_seconds'] for s in mine):.0%}",
            "learner idle": f"{statistics.median(s['learner_idle_seconds'] / s['wall_seconds'] for s in mine):.0%}",
            "ages": " ".join(f"{age}:{ages[age] / total:.0%}" for age in sorted(ages, key=int)),
        })  # fmt: skip
    return rows


def checks(samples: list[dict[str, Any]], updates: int, *, timing: bool) -> list[Check]:
    """The bound and the counts always; wall clocks only where ``timing``."""
    found = [Check("updates of every run", sorted({s["updates"] for s in samples}), f"== {updates}",
                   all(s["updates"] == updates for s in samples))]  # fmt: skip
    for staleness in sorted({s["max_staleness"] for s in samples}):
        oldest = max(s["age_max"] for s in samples if s["max_staleness"] == staleness)
        name = f"oldest token trained on, {label(staleness)}"
        found.append(Check(name, oldest, f"<= {staleness}", oldest <= staleness))
    if timing:
        for row in summarize(samples)[1:]:
            found.append(Check(f"wall clock of sync over {row['mode']}", row["speed-up"], "> 1", row["speed-up"] > 1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=8, help="updates a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each mode")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    from areal_agents.models import resolve

    quick = options.quick
    modes, rounds, steps = (STALENESS[:2], 1, 2) if quick else (STALENESS, options.rounds, options.steps)
    asked = {
        "model": str(resolve(options.model)), "steps": steps, "groups": 2 if quick else 4,
        "group_size": 2 if quick else 4, "concurrency": 8 if quick else 48, "turn_tokens": 8 if quick else 24,
    }  # fmt: skip
    progress = Progress(rounds * len(modes))
    samples = []
    for seed in range(rounds):
        for staleness in modes:
            sample = run(asked | {"max_staleness": staleness, "seed": seed})
            samples.append(sample)
            idle = f"engine idle {sample['engine_idle_seconds']:.0f} s, learner {sample['learner_idle_seconds']:.0f} s"
            progress(f"{sample['mode']}: {sample['wall_seconds']:.0f} s, {idle}")
    print(table(summarize(samples)))
    found = checks(samples, steps, timing=not quick)
    write(options.json, "async", samples, found, summary=summarize(samples), settings=asked)
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
