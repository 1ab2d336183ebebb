"""What a schedule could reach, against all schedules."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from functools import cache

import pytest

from tests.simulated import benchmarks_on_path, case, constant, fix_lengths, module

__all__ = ["benchmarks_on_path"]


def optimum(durations: Sequence[int], *, groups: int, eta: int, rate: float) -> float:
    """Least time of any in-order schedule that takes every group in time: all admissions and batches are tried.

    Engines are unlimited: a group that begins at t is complete at t + its duration; a step takes the sum of its
    groups' durations over ``rate``. To begin later than an acknowledgement gains nothing: the deadline depends on the
    version alone.
    """
    updates = len(durations) // groups

    @cache
    def best(version: int, now: float, admitted: int, alive: tuple[tuple[float, int, int], ...]) -> float:
        """``alive``: completion time, deadline and duration of the groups that no batch has taken."""
        if version == updates:
            return now
        found = math.inf
        for more in range(len(durations) - admitted + 1):
            begun = tuple((now + d, version + eta, d) for d in durations[admitted : admitted + more])
            have = alive + begun
            for chosen in itertools.combinations(range(len(have)), groups):
                rest = tuple(sorted(g for i, g in enumerate(have) if i not in chosen))
                if any(deadline <= version for _, deadline, _ in rest):
                    continue
                start = max([now, *(have[i][0] for i in chosen)])
                end = start + sum(have[i][2] for i in chosen) / rate
                found = min(found, best(version + 1, end, admitted + more, rest))
        return found

    return best(0, 0.0, 0, ())


@pytest.mark.parametrize(("groups", "eta"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])
def test_the_bound_the_optimum_of_all_schedules_and_the_ideal(
    monkeypatch: pytest.MonkeyPatch, groups: int, eta: int
) -> None:
    bound = module("simulate_bound")
    monkeypatch.setattr(bound, "learner_capacity", lambda *_: 2.0)
    rng, apart = random.Random(eta), 0
    for _ in range(8):
        durations = [rng.choice((1, 2, 9)) for _ in range(6)]
        fix_lengths(monkeypatch, durations)
        least = optimum(durations, groups=groups, eta=eta, rate=2.0)
        longest = [max(durations[b : b + groups]) for b in range(0, 6, groups)]
        shortest_step = sum(sorted(durations)[:groups]) / 2.0
        below = bound.any_schedule_seconds(longest, updates=6 // groups, eta=eta, step=shortest_step)
        chosen = case(engines=1, slots=64, groups=groups, group_size=1, eta=eta, updates=6 // groups, warmup=0)
        ideal = bound.ideal_steps(chosen, constant(4, update=0.0), finite=True)[-1][0]
        assert below <= least <= ideal + 1e-9
        apart += least < ideal - 1e-9
    assert eta > 0 or apart == 0  # a bound of 0 leaves one schedule


def test_later_admission_can_beat_the_earliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the ideal is not the optimum: who is admitted later is due later, and two long groups share one wait."""
    bound = module("simulate_bound")
    monkeypatch.setattr(bound, "learner_capacity", lambda *_: 10.0)
    durations = [10, 10, 10, 10, 100, 10, 100]
    fix_lengths(monkeypatch, durations)
    chosen = case(engines=1, slots=64, groups=1, group_size=1, eta=1, updates=7, warmup=0)
    ideal = bound.ideal_steps(chosen, constant(4, update=0.0), finite=True)[-1][0]
    least = optimum(durations, groups=1, eta=1, rate=10.0)
    below = bound.any_schedule_seconds(durations, updates=7, eta=1, step=1.0)
    assert (below, least, ideal) == (114.0, 144.0, 242.0)
