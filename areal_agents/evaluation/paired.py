"""The statistics of two evaluations of the same tasks: differences, paired by task, whose copies count as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from areal_agents.evaluation.copies import by_content, effective
from areal_agents.evaluation.statistics import mean_interval, sign_flip_test

FEW_FLIPS = 10
"""With fewer tasks that differ, their variance says little of what none showed."""
LEVEL = 0.05
"""Differences are claimed where the exact test's p is below it."""
Interval = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Paired:
    """Two means over the same tasks, and their difference."""

    a: float
    b: float
    difference: float
    """b - a."""
    ci95: tuple[float, float] | None
    """Of the difference. None where nothing can be said. It holds 0 wherever the test rejects nothing."""
    p_value: float
    """Two-sided sign-flip permutation test, by task. Of pass@1 of one attempt a task it is the exact McNemar test."""


def paired(
    values: Sequence[tuple[float, float]] | Sequence[tuple[Fraction, Fraction]],
    contents: Sequence[str],
    interval: Callable[[Sequence[float], Sequence[int]], Interval],
) -> Paired:
    """Return what the pairs (A, B) of means show.

    Args:
        values: one pair a task.
        contents: content hashes of the tasks: those of copies are the same.
        interval: the t interval of the mean of differences, one a different task, with the numbers of their copies. It
            takes the mean for normal, which few tasks or few that differ do not make it. So it is widened to 0 where
            the test, which needs no such thing, does not reject 0.
    """
    differences = [y - x for x, y in values]
    sums, copies = by_content(contents, differences)
    p = sign_flip_test(sums)
    t = interval([float(d / c) for d, c in zip(sums, copies, strict=True)], copies)
    if t is not None and p >= LEVEL:
        t = min(t[0], 0.0), max(t[1], 0.0)
    a, b = (mean([float(pair[i]) for pair in values]) for i in (0, 1))
    return Paired(a, b, mean([float(d) for d in differences]), t, p)


def pass_interval(differences: Sequence[float], copies: Sequence[int]) -> tuple[float, float]:
    """Return Student's t interval of the mean difference d, which lies in [-1, 1].

    Of what none of n tasks showed, a task may still have the probability q = 1 - 0.025^(1/n) (Clopper and Pearson
    1934), and differ then by as much as the bounds allow. Where fewer than ``FEW_FLIPS`` tasks differ their variance
    says little, or nothing, of that: the interval has at least these bounds.
    """
    n, d = effective(copies), math.fsum(c * x for c, x in zip(copies, differences, strict=True)) / sum(copies)
    low, high = mean_interval(differences, copies) or (d, d)
    if low == high or sum(x != 0 for x in differences) < FEW_FLIPS:
        q = 1.0 - 0.025 ** (1 / n)
        low, high = min(low, d - q * (1 + d)), max(high, d + q * (1 - d))
    return max(-1.0, low), min(1.0, high)


def mean(values: Sequence[float]) -> float:
    """Return the mean of one or more values."""
    return math.fsum(values) / len(values)
