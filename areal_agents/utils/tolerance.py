"""The one tolerance with which rewards are compared.

0.1 + 0.2 is 0.3 here, and three rewards of 0.7 have the mean 0.7, though floating point says otherwise. Signal, solved,
pass and the zero of an advantage all use it. Rewards are sums of few numbers, so their rounding stays far below it.
"""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 1e-9
"""Differences up to this share of the larger number, or of 1, are rounding."""


def reaches(reward: float, limit: float = 1.0) -> bool:
    """Say whether ``reward`` is at least ``limit``, up to rounding.

    An episode passes when its reward reaches 1, whatever bonus components add.
    """
    return reward >= limit - rounding_of(limit)


def all_same(values: Sequence[float]) -> bool:
    """Say whether ``values`` are all the same number, up to rounding."""
    return not values or max(values) - min(values) <= rounding_of(*values)


def rounding_of(*values: float) -> float:
    """Return the largest difference that is mere rounding between numbers that were made of ``values``."""
    return TOLERANCE * max([1.0, *(abs(v) for v in values)])
