"""How many episodes does each way of giving credit need, where every turn has a reward and where only the last has?

    python benchmarks/credit.py [--json benchmarks/results/credit.json]   # not timed whole
    python benchmarks/credit.py --quick                                   # a minute: two methods, an easy threshold

The world is that of ``credit_world.py``: episodes of 12 turns, a random model of 30,000 weights, training from scratch
until the mean score of five batches reaches 0.8. Each method has the same grid of learning rates. The rate of each
method, and which turn-level method is compared with GRPO, are chosen on tuning seeds and then left; the figures are of
fresh seeds. A run that does not get there counts with all its episodes, so a ratio to GRPO's is too high if anything
where GRPO fails. It does not matter what else the machine does. The goal is that of the best turn-level method in the
world with a reward a turn; its twin with the reward at the end is the control.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from credit_world import METHODS, TURN_LEVEL, Setting, train
from measure import Progress, table
from record import Check, Kept, write

RATES = (1e-3, 3e-3, 1e-2)
GOAL = 0.67
RESAMPLES = 10_000
Runs = list[dict[str, Any]]


def mean_episodes(runs: Runs, **wanted: Any) -> float:
    """Mean of the episodes of the runs that have these entries."""
    return float(np.mean([r["episodes"] for r in runs if all(r[k] == v for k, v in wanted.items())]))


def best_rate(tuning: Runs, method: str, dense: bool) -> float:
    """The learning rate with the fewest episodes on the tuning seeds; the smaller one of equals."""
    rates = sorted({r["lr"] for r in tuning})
    return min(rates, key=lambda lr: mean_episodes(tuning, method=method, dense=dense, lr=lr))


def ratio(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Ratio of the means with a 95 % percentile bootstrap interval; both sides are drawn anew by themselves."""
    rng = np.random.default_rng(seed)
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    drawn = rng.choice(a, (RESAMPLES, len(a))).mean(1) / rng.choice(b, (RESAMPLES, len(b))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": round(float(a.mean() / b.mean()), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def summarize(fresh: Runs, methods: Sequence[str]) -> Runs:
    """One row a method and world, with its ratio to GRPO in that world."""
    rows = []
    for dense in (True, False):
        theirs = [r["episodes"] for r in fresh if r["method"] == "grpo" and r["dense"] == dense]
        for method in methods:
            runs = [r for r in fresh if r["method"] == method and r["dense"] == dense]
            own = [r["episodes"] for r in runs]
            rows.append({
                "world": "a reward a turn" if dense else "one at the end", "method": method, "lr": runs[0]["lr"],
                "seeds": len(runs), "reached": sum(r["reached"] for r in runs), "episodes": round(float(np.mean(own))),
                "least": min(own), "most": max(own), **ratio(own, theirs),
            })  # fmt: skip
    return rows


def checks(rows: Runs, best: str) -> list[Check]:
    (row,) = (r for r in rows if r["method"] == best and r["world"] == "a reward a turn")
    value = f"{row['ratio']} [{row['low']}, {row['high']}]"
    return [Check(f"episodes of {best} against grpo, a reward a turn", value, f"<= {GOAL}", row["ratio"] <= GOAL)]


def run_all(settings: Sequence[Setting], kept: Kept, workers: int) -> Runs:
    """Train every setting, several at a time; those that an earlier sitting finished are taken from it."""
    progress, found = Progress(len(settings)), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for start in range(0, len(settings), workers):  # as many at a time as there are workers, so that parts are kept
            part = settings[start : start + workers]
            done = kept.part(repr(part), lambda part=part: list(pool.map(train, part)))  # type: ignore[misc]
            for r in done:
                world = "dense" if r["dense"] else "sparse"
                progress(f"{r['method']}, {world}, lr {r['lr']:g}, seed {r['seed']}: {r['episodes']} episodes")
            found += done
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    quick = options.quick
    methods = ("grpo", "turn_return 0.5") if quick else tuple(METHODS)
    rates, tuning_seeds, seeds = ((3e-3,), (100,), (0, 1)) if quick else (RATES, (100, 101), tuple(range(10)))
    more: dict[str, Any] = {"threshold": 0.15, "most_steps": 40} if quick else {}
    kept = Kept(options.json, {"quick": quick})
    worlds = (True, False)
    tuning = run_all(
        [Setting(m, d, lr, s, **more) for d in worlds for m in methods for lr in rates for s in tuning_seeds],
        kept, options.workers,
    )  # fmt: skip
    chosen = {(m, d): best_rate(tuning, m, d) for m in methods for d in worlds}
    turn_level = [m for m in methods if m in TURN_LEVEL]
    best = min(turn_level, key=lambda m: mean_episodes(tuning, method=m, dense=True, lr=chosen[m, True]))
    print(f"chosen on the tuning seeds: {best}")
    fresh = run_all(
        [Setting(m, d, chosen[m, d], s, **more) for d in worlds for m in methods for s in seeds], kept, options.workers
    )
    rows = summarize(fresh, methods)
    print(table(rows))
    found = checks(rows, best)
    write(options.json, "credit", fresh, found, rows=rows, tuning=tuning, chosen_on_tuning_seeds=best)
    kept.end()
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
