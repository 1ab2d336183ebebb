"""Training on three environments in the box: how much does RL add to the warm start?

    python benchmarks/train_environments.py --runs FOLDER --json benchmarks/results/train_environments.json
    python benchmarks/train_environments.py --quick     # two steps of each on few tasks

A database asked by SQL, a game that pays each turn, and function calling with a user who answers: the shipped
configurations ``sql``, ``number`` and ``booking``, as ``areal-agents train NAME --seed S`` runs them. Each run starts
from SmolLM2, imitates the environment's expert on some tasks, and goes on with reinforcement. The gain is the held-out
score (greedy) after reinforcement less that of the same run after its warm start, task by task.

Three kinds of 95 % intervals, in points: of each seed, over its tasks; of all seeds together, over the tasks, where a
task's attempts are those of all seeds (clustered by task: it says nothing of other seeds); and over the seeds' gains
(Student's t, three of them), which has the difference between trainings in it (and says nothing of other tasks, which
are the same for all seeds). A task that has no score in one of the two evaluations is in no interval, and a goal of its
own.

A run that is finished in ``--runs`` is not run again, one that was cut goes on, and one with other settings, because
flags or the shipped file have changed, is refused. What else the machine does changes only the times.
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
from demo_engines import read, require_same
from measure import Progress, table
from record import ROOT, Check, commit, save, write

RUNS = {"sql": "math or SQL", "number": "a game that pays each turn", "booking": "function calling"}
"""Shipped configurations, and the kind that each stands for."""
SEEDS = (0, 1, 2)
GOAL = 5.0
"""Points that the lower bound of the gain must reach."""
LEAST = 256
"""Different held-out tasks."""


def run(name: str, seed: int, out: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Train, or go on; what it evaluated and how its training went. It stays in ``out/sample.json``.

    Raises SystemExit where a run with other settings is there.
    """
    sample, arguments = out / "sample.json", [name, *flags, "--seed", str(seed)]
    require_same(out, arguments)
    if sample.exists():
        return dict(json.loads(sample.read_text()))
    start = time.perf_counter()
    command = [sys.executable, "-m", "areal_agents", "train", *arguments, "--out", str(out), "--resume"]
    subprocess.run(command, cwd=ROOT, check=True)
    wall = round(time.perf_counter() - start, 1)
    found = read(name, seed, out) | {
        "flags": list(flags), "commit": commit(), "wall_seconds_of_the_last_sitting": wall,
    }  # fmt: skip
    save(sample, found)
    return found


def folder(name: str, seed: int) -> str:
    return f"{name}-{seed}"


def compared(runs: Path, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The scores after RL less those after the warm start, over the attempts of ``seeds``, task by task.

    Of the tasks that have a score in both; ``left_out`` has how many have one in one of them alone.
    """
    from areal_agents.evaluation.compare import Evaluation, compare, load

    def merged(label: str) -> Evaluation:
        rewards: dict[Any, list[float]] = {}
        for seed in seeds:
            for task, found in load(f"{runs / folder(name, seed)}:{label}").rewards.items():
                rewards.setdefault(task, []).extend(found)
        return Evaluation(f"{name}, {label}", rewards)

    found = compare(merged("warm_start"), merged("after_rl"), common=True).to_json()
    return {"run": name, "seeds": list(seeds)} | found


def over_seeds(gains: Sequence[float]) -> tuple[float, float]:
    """Student's t 95 % interval of the mean gain over two or more trainings; of equal gains it is one point."""
    from areal_agents.evaluation.statistics import mean_interval

    return mean_interval(gains) or (gains[0], gains[0])


def points(interval: Sequence[float] | None) -> list[float] | None:
    return None if interval is None else [round(100 * bound, 2) for bound in interval]


def gain(what: str, interval: Sequence[float] | None) -> Check:
    """Whether the lower bound reaches the goal: before it is rounded. A comparison without an interval does not."""
    name, goal = f"{what}: pass@1 gained by RL, points", f"lower bound >= +{GOAL:g}"
    if interval is None:
        return Check(name, None, goal, False, "the comparison has no interval")
    return Check(name, points(interval), goal, 100 * interval[0] >= GOAL)


def checks(comparisons: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[Check]:
    """Of each configuration the lower bounds of all its intervals, and how many tasks and seeds they are of."""
    found = [Check("different seeds", len(set(seeds)), ">= 3", len(set(seeds)) >= 3)]
    for name in dict.fromkeys(c["run"] for c in comparisons):
        own = [c for c in comparisons if c["run"] == name]
        n = min(c["n"] for c in own)
        found.append(Check(f"{name}: different held-out tasks", n, f">= {LEAST}", n >= LEAST))
        alone = sum(sum(c["left_out"]) for c in own if len(c["seeds"]) == 1)
        found.append(Check(f"{name}: tasks with a score in one of the two alone, all seeds", alone, "== 0", alone == 0))
        for c in own:
            of = f"seed {c['seeds'][0]}" if len(c["seeds"]) == 1 else "all seeds, clustered by task"
            found.append(gain(f"{name}, {of}", c["pass_at_1"]["ci95"]))
        gains = [c["pass_at_1"]["difference"] for c in own if len(c["seeds"]) == 1]
        if len(gains) > 1:
            found.append(gain(f"{name}, over the seeds", over_seeds(gains)))
    return found


def quick_checks(samples: Sequence[dict[str, Any]]) -> list[Check]:
    """What must hold whatever the timing and the luck."""
    labels = {"before", "warm_start", "after_rl"}
    return [
        check
        for s in samples
        for check in (
            Check(f"{s['run']}: learner steps", len(s["step_seconds"]), "== 2", len(s["step_seconds"]) == 2),
            Check(f"{s['run']}: evaluations", sorted(s["held_out"]), "all three", set(s["held_out"]) == labels),
        )
    ]


def shown(comparisons: Sequence[dict[str, Any]]) -> str:
    """The comparisons as a table for people, with what makes their numbers less certain than they look."""
    rows = table([{
        "run": c["run"], "seeds": " ".join(map(str, c["seeds"])), "tasks": c["n"],
        "warm start": round(c["pass_at_1"]["a"], 3), "after RL": round(c["pass_at_1"]["b"], 3),
        "gain, points": round(100 * c["pass_at_1"]["difference"], 1),
        "95 %": points(c["pass_at_1"]["ci95"]),
    } for c in comparisons])  # fmt: skip
    notes = [f"{c['run']}, seeds {' '.join(map(str, c['seeds']))}: {note}" for c in comparisons for note in c["notes"]]
    return "\n".join([rows, *notes])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS), help="of these configurations")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the runs here, and go on with what it has")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options, more = parser.parse_known_args()  # further settings are those of `train`: --model.path MINE
    if len(set(options.seeds)) < len(options.seeds):
        parser.error("--seeds: a seed that is given twice is one training")
    if options.runs is None and not options.quick:
        parser.error("name a folder by --runs: these are hours of training, and go on from there where they are cut")
    flags = [*(QUICK.split() if options.quick else ()), *more]
    seeds = options.seeds[:1] if options.quick else options.seeds
    progress = Progress(len(options.only) * len(seeds))
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="areal-train-") as temporary:
        runs = (options.runs or Path(temporary)).absolute()
        for seed in seeds:
            for name in options.only:
                samples.append(run(name, seed, runs / folder(name, seed), flags))
                progress(f"{name}, seed {seed}: {samples[-1]['held_out']}")
        groups = [[seed] for seed in seeds] + ([seeds] if len(seeds) > 1 else [])
        comparisons = [compared(runs, name, group) for name in options.only for group in groups]
    print(shown(comparisons))
    found = quick_checks(samples) if options.quick else checks(comparisons, seeds)
    write(options.json, "train_environments", samples, found, comparisons=comparisons)
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
