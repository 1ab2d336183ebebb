"""How much of the final reward does each correction keep when the training data is η versions old?

    python benchmarks/staleness.py [--json benchmarks/results/staleness.json]   # not timed whole
    python benchmarks/staleness.py --quick                   # two methods at η = 0 and 8, three seeds: one minute

The world is that of ``staleness_world.py``: 50 steps of 64 episodes, two minibatches each, a rate that falls to 0 in a
straight line. Every method has the same models, tasks, sizes and learning rate, seed by seed, and differs in
``algorithm.loss``, ``correction`` and ``mask`` alone. The rate is chosen on tuning seeds, by what plain PPO does there:
of the rates at which it learns with fresh data, the one at which old data hurts it most (0.005).
No corrected method takes part in the choice. The figures are of fresh seeds, in points: 100 times the mean reward of
``held_out`` episodes of fresh tasks after the last step.

A deficit is the score with fresh data minus the score at η, paired by seed; its 95 % interval is a percentile bootstrap
over seeds, and the goal is that of the interval's upper end. If plain PPO does not fall by 10 points at η = 8 there is
nothing to correct, and every goal is void. It does not matter what else the machine does.
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
from measure import Progress, table
from record import Check, Kept, write
from staleness_world import METHODS, Setting, train

ETAS = (0, 1, 2, 4, 8, 16)
SEEDS = tuple(range(20))
TUNING_SEEDS = (100, 101)
RATES = (2.5e-3, 5e-3, 1e-2)
LEARNS = 95.0
"""Points that plain PPO must reach with fresh data for a rate to be chosen."""
UP_TO = 8
"""Goals are of η up to this."""
FALL, GOAL = 10.0, 2.0
RESAMPLES = 10_000
AREAL = {
    "naive": {0: 42.0, 1: 41.8, 2: 40.0, 4: 23.3, 8: 35.7, 16: 35.8},
    "decoupled": {0: 42.0, 1: 42.1, 2: 41.8, 4: 42.2, 8: 41.0, 16: 38.7},
}
"""AIME24 after training by η, 1.5B, one run each (2505.24298). Its naive method is PPO against the sampler."""
Runs = list[dict[str, Any]]


def scores_of(runs: Runs, method: str, eta: int) -> dict[int, float]:
    """Return the points of each seed."""
    return {r["seed"]: r["score"] for r in runs if r["method"] == method and r["staleness"] == eta}


def share(runs: Runs, method: str, eta: int, name: str) -> float:
    """Return the mean of a figure over the runs, 0 for those in which no token had a gradient."""
    here = [r for r in runs if r["method"] == method and r["staleness"] == eta]
    return round(float(np.mean([r.get(name, 0.0) for r in here])), 3)


def deficit(fresh: dict[int, float], old: dict[int, float]) -> dict[str, float]:
    """Return the mean of fresh minus old, paired by seed, with a 95 % percentile bootstrap interval over seeds.

    Raises ValueError where the seeds differ.
    """
    if fresh.keys() != old.keys():
        raise ValueError(f"the seeds are not the same: {sorted(fresh.keys() ^ old.keys())}")
    differences = np.array([fresh[seed] - old[seed] for seed in sorted(fresh)])
    drawn = np.random.default_rng(0).choice(differences, (RESAMPLES, len(differences))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": round(float(differences.mean()), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def chosen_rate(tuning: Runs) -> float:
    """Return the rate at which plain PPO falls most, of those at which it learns; the smaller one of equals.

    Raises ValueError where it learns at none.
    """
    falls = {}
    for lr in sorted({r["lr"] for r in tuning}):
        fresh, old = (
            float(np.mean([r["score"] for r in tuning if r["lr"] == lr and r["staleness"] == eta]))
            for eta in (0, UP_TO)
        )
        if fresh >= LEARNS:
            falls[lr] = fresh - old
    if not falls:
        raise ValueError(f"plain PPO reaches {LEARNS} points at none of these rates: the task is too hard")
    return max(falls, key=lambda lr: falls[lr])


def summarize(runs: Runs, methods: Sequence[str], etas: Sequence[int]) -> Runs:
    """Return one row a method and η, with its deficits to its own score with fresh data and to plain PPO's."""
    rows = []
    for method in methods:
        for eta in etas:
            here = scores_of(runs, method, eta)
            score = float(np.mean(list(here.values())))
            own = deficit(scores_of(runs, method, 0), here)
            naive = deficit(scores_of(runs, "naive", 0), here)
            rows.append({
                "method": method, "eta": eta, "seeds": len(here), "score": round(score, 2),
                "deficit": own["mean"], "low": own["low"], "high": own["high"],
                "to_naive": naive["mean"], "to_naive_low": naive["low"], "to_naive_high": naive["high"],
                **{name: share(runs, method, eta, name) for name in ("clip_fraction", "masked_share")},
            })  # fmt: skip
    return rows


def in_shape(rows: Runs) -> Runs:
    """Return the scores as shares of each method's own with fresh data, beside AReaL's."""
    found = []
    for row in rows:
        published = AREAL.get(row["method"], {})
        (fresh,) = (r["score"] for r in rows if r["method"] == row["method"] and r["eta"] == 0)
        found.append({
            "method": row["method"], "eta": row["eta"], "score": row["score"],
            "of fresh": round(row["score"] / fresh, 3) if fresh else None,
            "AReaL": published.get(row["eta"]),
            "AReaL of fresh": round(published[row["eta"]] / published[0], 3) if published else None,
        })  # fmt: skip
    return found


def checks(rows: Runs) -> list[Check]:
    """Return the verdicts: whether plain PPO falls, and for each corrected method whether it does not."""
    (fall,) = (r["deficit"] for r in rows if r["method"] == "naive" and r["eta"] == UP_TO)
    fell = fall >= FALL
    void = "" if fell else f"void: plain PPO falls by {fall} points alone, so there is nothing to correct"
    found = [Check(f"plain PPO falls at η = {UP_TO}", fall, f">= {FALL:g} points", fell, void)]
    corrected = dict.fromkeys(r["method"] for r in rows if r["method"] != "naive")
    for whose, column in (("its own", "high"), ("plain PPO's", "to_naive_high")):
        for method in corrected:
            old = [r for r in rows if r["method"] == method and 0 < r["eta"] <= UP_TO]
            worst = max(old, key=lambda r: r[column])
            holds = fell and worst[column] <= GOAL
            clipped, masked = f"{worst['clip_fraction']:.0%}", f"{worst['masked_share']:.0%}"
            why = f"{worst['score']} points at η = {worst['eta']}; {clipped} of the tokens clipped, {masked} masked"
            reason = void or ("" if holds else why)
            name = f"{method}: upper 95 % bound of the deficit to {whose} score with fresh data, η up to {UP_TO}"
            found.append(Check(name, worst[column], f"<= {GOAL:g} points", holds, reason))
    return found


def run_all(parts: Sequence[Sequence[Setting]], kept: Kept, workers: int) -> Runs:
    """Train every setting, part by part; those that an earlier sitting finished are taken from it."""
    progress, found = Progress(sum(len(part) for part in parts if not kept.has(repr(part)))), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for part in parts:

            def work(part: Sequence[Setting] = part) -> Runs:
                done = []
                for run in pool.map(train, part):
                    done.append(run)
                    progress(f"{run['method']}, η = {run['staleness']}, seed {run['seed']}: {run['score']} points")
                return done

            found += kept.part(repr(part), work)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    quick = options.quick
    methods = ("naive", "decoupled") if quick else tuple(METHODS)
    etas, seeds, tuning_seeds = ((0, UP_TO), SEEDS[:3], TUNING_SEEDS[:1]) if quick else (ETAS, SEEDS, TUNING_SEEDS)
    kept = Kept(options.json, {"quick": quick})
    tuning = run_all(
        [[Setting("naive", eta, seed, lr=lr) for eta in (0, UP_TO) for lr in RATES] for seed in tuning_seeds],
        kept, options.workers,
    )  # fmt: skip
    lr = chosen_rate(tuning)
    print(f"chosen on the tuning seeds: lr {lr:g}")
    runs = run_all(
        [[Setting(method, eta, seed, lr=lr) for method in methods for eta in etas] for seed in seeds],
        kept, options.workers,
    )  # fmt: skip
    rows = summarize(runs, methods, etas)
    shape = in_shape(rows)
    print(table(rows))
    print(table(shape))
    found = checks(rows)
    write(options.json, "staleness", runs, found, rows=rows, in_shape=shape, tuning=tuning, chosen_lr=lr)
    kept.end()
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
