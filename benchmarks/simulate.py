"""The admission, buffer and routing code on a virtual clock: throughput by staleness bound, up to 4,096 engines.

    python benchmarks/simulate.py [--json benchmarks/results/simulate.json]
    python benchmarks/simulate.py --quick          # 4 and 64 engines, one seed: invariants and the large goals
    python benchmarks/simulate.py --trace FILE     # rates and times of another machine, see simulate_model.py

``Buffer`` and ``Router`` are the real ones; engines, tools and the learner are simulated (``simulate_model.py`` says
where each number comes from). A batch is ``--fill`` (2) times as many episodes as there are slots, which sets B, and
``concurrency`` is 1.25 times the slots: both are choices, and the sensitivity table has others. AReaL's batch of 512
prompts × 16 would be 2 to 4 fills of 32 to 64 engines with 64 slots. The learner's capacity is
scaled to ``--balance`` times the engines' (1: both would be busy all the time, which leaves no slack to hide behind);
``--measured-learner`` takes the measured learner on the devices that ``--split`` leaves for it.

The *limit* is min(generation, learner) in tokens/s: all slots taken all the time, the learner never waiting, updates
free. Two throughputs are reported: ``consumed`` (tokens of the groups that the learner took, as AReaL's figures count)
and ``trained`` (the same without masked tokens); ``dropped`` groups are in neither. Nothing imports this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from measure import Progress, summary, table
from record import Check, write
from simulate_bound import any_schedule_rate, ideal_rate, schedule_rate
from simulate_model import CAP, MEASURED, Calibration, Case, generation_capacity, learner_capacity
from simulate_rollouts import rollouts_batches
from simulate_run import Simulation

SIGMAS = (0.5, 1.0)
ETAS = (0, 1, 2, 4, 8)
MODES = ("wait", "mask", "drop")
GROUP_SIZE = 16
ANY = 10_000
"""A bound that never binds, for the η = ∞ of AReaL's curve."""
AREAL = {0: 128.7, 1: 269.3, 2: 356.6, 4: 356.6, 8: 371.7, 16: 382.4, ANY: 396.8}
"""Throughput by η, thousand tokens/s (2505.24298, 1.5B)."""
SHAPE_ENGINES = 64


@dataclasses.dataclass(frozen=True)
class Size:
    """A pool of engines: how long it is simulated, and how often."""

    engines: int
    slots: int
    measured: int
    warmup: int
    seeds: int


SIZES = (Size(4, 32, 60, 12, 3), Size(64, 32, 16, 12, 2), Size(512, 4, 10, 9, 1), Size(4096, 2, 4, 7, 1))
"""With more engines fewer slots each, so that a batch has some ten thousand episodes and not more."""
QUICK = (Size(4, 32, 30, 12, 1), Size(64, 16, 10, 10, 1))
MOST_COMPARED = 512
"""Engines up to which the ideals are computed."""


def case_of(size: Size, calibration: Calibration, asked: argparse.Namespace, **chosen: Any) -> Case:
    """``chosen``: sigma, eta, on_exceed and seed, and what deviates."""
    split = asked.split
    balance = asked.balance
    if asked.measured_learner:
        balance = calibration.learner_rate * (1 - split) / split / calibration.rate(size.slots)
    settings: dict[str, Any] = {
        "engines": size.engines, "slots": size.slots, "group_size": GROUP_SIZE, "balance": balance,
        "groups": max(1, round(asked.fill * size.engines * size.slots / GROUP_SIZE)),
        "updates": size.warmup + size.measured, "warmup": size.warmup,
    }  # fmt: skip
    return Case(**settings | chosen)


def simulate(case: Case, calibration: Calibration) -> dict[str, Any]:
    """One run as a raw sample."""
    began = time.perf_counter()
    outcome = Simulation(case, calibration).run()
    limit = min(generation_capacity(case, calibration), learner_capacity(case, calibration))
    tokens = sum(outcome.ages.values())
    sample = {
        "engines": case.engines, "slots": case.slots, "groups": case.groups, "sigma": case.sigma, "eta": case.eta,
        "on_exceed": case.on_exceed, "seed": case.seed, "balance": case.balance, "updates": case.updates,
        "warmup": case.warmup, "oversubscription": case.oversubscription, "limit_tokens_s": limit,
        "trained_tokens_s": outcome.trained_rate, "consumed_tokens_s": outcome.consumed_rate,
        "generated_tokens_s": outcome.generated_rate,
        "trained_share": outcome.trained_rate / limit, "consumed_share": outcome.consumed_rate / limit,
        "generated_share": outcome.generated_rate / limit,
        "masked_share": outcome.masked_share, "dropped_share": outcome.dropped_share,
        "learner_idle": outcome.learner_idle, "engine_idle": outcome.engine_idle,
        "age_mean": sum(age * n for age, n in outcome.ages.items()) / tokens, "age_max": max(outcome.ages),
        "ages": {str(age): round(n / tokens, 5) for age, n in outcome.ages.items()},
    }  # fmt: skip
    if case.on_exceed == "wait" and case.engines <= MOST_COMPARED:
        sample["schedule_ratio"] = outcome.consumed_rate / schedule_rate(case, calibration)
        sample["pool_ratio"] = outcome.consumed_rate / ideal_rate(case, calibration)
        sample["any_schedule_ratio"] = outcome.consumed_rate / any_schedule_rate(case, calibration)
    return sample | {"cpu_seconds": time.perf_counter() - began}


def grid(sizes: tuple[Size, ...], calibration: Calibration, asked: argparse.Namespace) -> list[Case]:
    """Every row of the table. A bound of 0 never exceeds: all three modes are one, listed as ``wait``."""
    cases = []
    for size in sizes:
        for sigma in SIGMAS:
            for seed in range(size.seeds):
                cases.append(case_of(size, calibration, asked, sigma=sigma, eta=0, on_exceed="wait", seed=seed))
                for eta in ETAS[1:]:
                    for mode in MODES:
                        chosen = {"sigma": sigma, "eta": eta, "on_exceed": mode, "seed": seed}
                        cases.append(case_of(size, calibration, asked, **chosen))
    return cases


def shape_cases(size: Size, calibration: Calibration, asked: argparse.Namespace) -> list[Case]:
    """The η that only AReaL's curve has. It bounds admission alone, as ``mask`` does before it masks."""
    etas = [eta for eta in AREAL if eta not in ETAS]
    return [
        case_of(size, calibration, asked, sigma=sigma, eta=eta, on_exceed="mask", seed=seed)
        for sigma in SIGMAS for eta in etas for seed in range(size.seeds)
    ]  # fmt: skip


def sensitivity_cases(size: Size, calibration: Calibration, asked: argparse.Namespace) -> list[Case]:
    """η = 8, σ = 1: batches of other sizes, a slower and a faster learner, fewer and more episodes that may play."""
    found = []
    for mode in ("wait", "mask"):
        wide = {"sigma": 1.0, "eta": 8, "on_exceed": mode, "seed": 0}
        base = case_of(size, calibration, asked, **wide)
        found += [dataclasses.replace(base, groups=round(base.groups * fill / asked.fill)) for fill in (1, 2, 4)]
        found += [dataclasses.replace(base, balance=base.balance * factor) for factor in (0.8, 1.25)]
        found += [dataclasses.replace(base, oversubscription=times) for times in (1.0, 2.0)]
    return found


def _key(sample: dict[str, Any]) -> tuple[Any, ...]:
    return sample["engines"], sample["sigma"], sample["on_exceed"], sample["eta"]


def _median(samples: list[dict[str, Any]], name: str) -> float:
    return float(statistics.median(s[name] for s in samples))


def _ratio(samples: list[dict[str, Any]], name: str) -> float | str:
    """Empty where it was not computed."""
    return round(_median(samples, name), 3) if name in samples[0] else ""


def summarize(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a combination: medians over seeds; ``over sync`` is the median of the ratios of one seed."""
    sync = {(s["engines"], s["sigma"], s["seed"]): s["trained_tokens_s"] for s in samples if s["eta"] == 0}
    rows = []
    for key in dict.fromkeys(map(_key, samples)):
        mine = [s for s in samples if _key(s) == key]
        over = statistics.median(s["trained_tokens_s"] / sync[s["engines"], s["sigma"], s["seed"]] for s in mine)
        rows.append({
            "engines": key[0], "σ": key[1], "on_exceed": "sync" if key[3] == 0 else key[2], "η": key[3],
            "over sync": round(over, 2),
            "trained/limit": round(_median(mine, "trained_share"), 3),
            "consumed/limit": round(_median(mine, "consumed_share"), 3),
            "spread": summary([s["consumed_share"] for s in mine])["spread"],
            "masked": f"{_median(mine, 'masked_share'):.1%}", "dropped": f"{_median(mine, 'dropped_share'):.1%}",
            "learner idle": f"{_median(mine, 'learner_idle'):.0%}",
            "engine idle": f"{_median(mine, 'engine_idle'):.0%}",
            "age": round(_median(mine, "age_mean"), 2), "oldest": max(s["age_max"] for s in mine),
            "of ideal": _ratio(mine, "schedule_ratio"), "of pool": _ratio(mine, "pool_ratio"),
            "of any": _ratio(mine, "any_schedule_ratio"),
        })  # fmt: skip
    return rows


def shape(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consumed tokens/s by η over those at η = ∞, ours and AReaL's; ``gain``: over sync's, 1 at η = ∞."""
    rows = []
    for sigma in SIGMAS:
        mine = [s for s in samples if s["engines"] == SHAPE_ENGINES and s["sigma"] == sigma]
        mine = [s for s in mine if s["on_exceed"] == ("mask" if s["eta"] else "wait")]
        rates = {eta: _median([s for s in mine if s["eta"] == eta], "consumed_tokens_s") for eta in AREAL}
        rows += [
            {
                "σ": sigma, "η": "∞" if eta == ANY else eta,
                "ours": round(rates[eta] / rates[ANY], 3), "AReaL": round(AREAL[eta] / AREAL[ANY], 3),
                "gain, ours": round((rates[eta] - rates[0]) / (rates[ANY] - rates[0]), 3),
                "gain, AReaL": round((AREAL[eta] - AREAL[0]) / (AREAL[ANY] - AREAL[0]), 3),
                "learner idle": f"{_median([s for s in mine if s['eta'] == eta], 'learner_idle'):.0%}",
                "oldest": max(s["age_max"] for s in mine if s["eta"] == eta),
            }
            for eta in AREAL
        ]  # fmt: skip
    return rows


def shape_checks(rows: list[dict[str, Any]], fill: float) -> list[Check]:
    """Rising, most of the gain early, and near AReaL's curve."""
    found = []
    for sigma in SIGMAS:
        mine = [row for row in rows if row["σ"] == sigma]
        ours = [row["ours"] for row in mine]
        fall = round(max(a - b for a, b in itertools.pairwise(ours)), 3)
        apart = max(mine, key=lambda row: abs(row["ours"] - row["AReaL"]))
        gap = round(abs(apart["ours"] - apart["AReaL"]), 3)
        reason = f"at η = {apart['η']}: {apart['ours']} against {apart['AReaL']}"
        if gap > 0.1 and apart["ours"] > apart["AReaL"]:
            reason += (
                f"; the oldest token is {apart['oldest']}: a larger bound changes nothing here, AReaL's still gains"
            )
        elif gap > 0.1:
            reason += (
                f"; the learner waits {apart['learner idle']} of the time, as the longest episodes ({CAP} times the "
                f"mean) take {CAP / fill:g} batches' time and the bound lets {apart['η'] + 1} begin"
            )
        found += [
            Check(f"throughput by η, σ = {sigma}: largest fall from one η to the next", fall, "<= 0.01", fall <= 0.01),
            Check(f"throughput by η, σ = {sigma}: largest distance to AReaL's curve, both over η = ∞", gap, "<= 0.1",
                  gap <= 0.1, reason),
        ]  # fmt: skip
        for row in mine:
            if row["η"] in (2, 4):
                name = f"share of the gain reached at η = {row['η']}, σ = {sigma} (AReaL: {row['gain, AReaL']})"
                found.append(Check(name, row["gain, ours"], "> 0.5", row["gain, ours"] > 0.5))
    return found


def limit_checks(samples: list[dict[str, Any]]) -> list[Check]:
    """``mask`` at η = 8, σ = 1 against min(generation, learner), each size."""
    found = []
    for engines in sorted({s["engines"] for s in samples}):
        key = engines, 1.0, "mask", 8
        mine = [s for s in samples if _key(s) == key]
        for name in ("trained", "consumed"):
            value = round(_median(mine, f"{name}_share"), 3)
            reason = ""
            if value < 0.95:
                reason = (
                    f"learner idle {_median(mine, 'learner_idle'):.1%}, masked {_median(mine, 'masked_share'):.1%}, "
                    f"generated {_median(mine, 'generated_share'):.3f} of the limit, "
                    f"mean age {_median(mine, 'age_mean'):.1f}"
                )
            found.append(Check(f"{name} tokens over the limit, mask, η = 8, σ = 1, {engines} engines", value, ">= 0.95",
                               value >= 0.95, reason))  # fmt: skip
    return found


def _worst(samples: list[dict[str, Any]], name: str) -> tuple[float, dict[str, Any]]:
    """The smallest median of a combination, and one of its samples."""
    groups = [[s for s in samples if _key(s) == key] for key in dict.fromkeys(map(_key, samples))]
    least = min(groups, key=lambda mine: _median(mine, name))
    return round(_median(least, name), 3), least[0]


def bound_checks(samples: list[dict[str, Any]]) -> list[Check]:
    """``wait`` against its ideal on the same engines and on one pool, and against any schedule: the worst rows."""
    found = []
    waits = [s for s in samples if "schedule_ratio" in s]
    for engines in sorted({s["engines"] for s in waits}):
        value, at = _worst([s for s in waits if s["engines"] == engines], "schedule_ratio")
        found.append(Check(f"wait over the ideal schedule on the same engines, worst row, {engines} engines", value,
                           ">= 0.97", value >= 0.97, f"at η = {at['eta']}, σ = {at['sigma']}"))  # fmt: skip
    for name, what in (
        ("pool_ratio", "the ideal on one balanced pool"),
        ("any_schedule_ratio", "any schedule's bound"),
    ):
        value, at = _worst([s for s in waits if s["eta"]], name)
        where = f"at η = {at['eta']}, σ = {at['sigma']}, {at['engines']} engines"
        why = (
            f"wait is {at['schedule_ratio']:.3f} of the ideal on the same engines; the rest is that a session stays on "
            f"its engine: while few are left to wait for, engines without any ({at['engine_idle']:.0%}) cannot help"
            if name == "pool_ratio" else
            f"the ideal on one pool reaches {at['any_schedule_ratio'] / at['pool_ratio']:.3f} of this bound, where the "
            "longest episode runs alone on its engine from the first moment and several hide behind one wait"
        )  # fmt: skip
        found.append(Check(f"wait over {what}, worst row with η > 0", value, ">= 0.97", value >= 0.97,
                           where if value >= 0.97 else f"{where}: {why}"))  # fmt: skip
    return found


def age_checks(samples: list[dict[str, Any]]) -> list[Check]:
    """The bound itself; the simulation asserts it at every batch too."""
    over = max(s["age_max"] - s["eta"] for s in samples if s["on_exceed"] != "mask")
    return [Check("oldest consumed token less η, wait and drop", over, "<= 0", over <= 0)]


def rollouts_check(calibration: Calibration) -> Check:
    """The real ``Rollouts`` on a virtual event loop makes the same batches at the same times."""
    apart, cases = 0.0, 0
    for mode in MODES:
        for eta in (0, 2):
            case = Case(3, 4, 4, 4, 1.0, eta, mode, 12, 0)  # type: ignore[arg-type]
            ours, real = Simulation(case, calibration).run().batches, rollouts_batches(case, calibration)
            cases += [orders for _, orders in ours] == [orders for _, orders in real]
            apart = max(apart, *[abs(a[0] - b[0]) for a, b in zip(ours, real, strict=True)])
    name = "cases with the batches of the real Rollouts (asyncio in virtual time), and times within 1 µs"
    return Check(name, cases, "== 6", cases == 6 and apart < 1e-6)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON with measured rates in place of ours")
    parser.add_argument("--fill", type=float, default=2.0, help="episodes of a batch over all slots")
    parser.add_argument("--balance", type=float, default=1.0, help="learner capacity over generation capacity")
    parser.add_argument("--split", type=float, default=0.75, help="share of the devices that generate")
    parser.add_argument("--measured-learner", action="store_true", help="the learner as measured, not scaled")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    calibration = Calibration.read(asked.trace) if asked.trace else MEASURED
    sizes = QUICK if asked.quick else SIZES
    pivot = next(size for size in sizes if size.engines == SHAPE_ENGINES)
    main_cases = grid(sizes, calibration, asked)
    parts = (main_cases, shape_cases(pivot, calibration, asked), sensitivity_cases(pivot, calibration, asked))
    progress = Progress(sum(map(len, parts)))
    samples: list[list[dict[str, Any]]] = []
    for part in parts:
        samples.append([])
        for case in part:
            sample = simulate(case, calibration)
            samples[-1].append(sample)
            progress(f"{case.engines} engines, σ {case.sigma}, {case.on_exceed}, η {case.eta}: "
                     f"{sample['trained_share']:.3f} of the limit")  # fmt: skip
    rows, curve = summarize(samples[0]), shape(samples[0] + samples[1])
    print(table(rows), "\n\n" + table(curve), "\n\n" + table(sensitivity_rows(samples[2])))
    found = [
        *limit_checks(samples[0]), *bound_checks(samples[0]), *shape_checks(curve, asked.fill), *age_checks(samples[0]),
        rollouts_check(calibration),
    ]  # fmt: skip
    write(
        asked.json, "simulate", [s for part in samples for s in part], found, summary=rows, shape=curve,
        sensitivity=sensitivity_rows(samples[2]), calibration=dataclasses.asdict(calibration),
    )  # fmt: skip
    return 0 if all(c.holds for c in found) else 1


def sensitivity_rows(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """η = 8, σ = 1, away from the default batch, balance and concurrency."""
    return [
        {
            "on_exceed": s["on_exceed"], "fills": round(s["groups"] * GROUP_SIZE / s["engines"] / s["slots"], 2),
            "balance": s["balance"], "concurrency/slots": s["oversubscription"],
            "trained/limit": round(s["trained_share"], 3),
            "consumed/limit": round(s["consumed_share"], 3), "masked": f"{s['masked_share']:.1%}",
            "learner idle": f"{s['learner_idle']:.0%}", "age": round(s["age_mean"], 2), "oldest": s["age_max"],
        }
        for s in samples
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
