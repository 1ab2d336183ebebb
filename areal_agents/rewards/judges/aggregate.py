"""One score out of several judges' scores, and how far the judges agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

from areal_agents.errors import ConfigError

Aggregation = Literal["median", "mean", "vote"]


def require_aggregation(name: str) -> None:
    """Raise ConfigError for an unknown aggregation."""
    if name not in get_args(Aggregation):
        raise ConfigError(f"unknown aggregation {name!r}: there are {', '.join(get_args(Aggregation))}")


def aggregated(scores: Sequence[float], how: Aggregation, *, passes: float | None = None) -> float:
    """Return one score in [0, 1] for those of several judges.

    Args:
        scores: in [0, 1], one a judge that answered, at least one.
        how: ``median`` (of an even number, the mean of the middle two), ``mean``, or ``vote``: 1 where more judges are
            for it than against, 0 where fewer, 0.5 where as many.
        passes: the score from which on a judge is for it, in a vote. Below, it is against. None is a comparison's: more
            than 0.5 is for it, less is against it, and 0.5 is neither.

    Raises:
        ConfigError: the aggregation is unknown.
    """
    require_aggregation(how)
    if how == "median":
        return float(statistics.median(scores))
    if how == "mean":
        return float(statistics.fmean(scores))
    if passes is None:
        balance = sum((s > 0.5) - (s < 0.5) for s in scores)
    else:
        balance = sum(1 if s >= passes else -1 for s in scores)
    return 0.5 if balance == 0 else float(balance > 0)


def agreement(scores: Sequence[float]) -> float:
    """Return 1 minus the mean absolute difference of two judges' scores, over all pairs; 1 for one judge."""
    gaps = [abs(a - b) for a, b in combinations(scores, 2)]
    return 1.0 - statistics.fmean(gaps) if gaps else 1.0
