"""Copies of a task: tasks with other ids and the same content, which a split draws where it has few.

    results of tasks ─▶ by_content ─▶ a sum and a number of copies for each different content ─▶ statistics.py

What a model does on one copy it does on the others. So means are over all tasks, as they were drawn, and intervals and
tests over the different ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, TypeVar, cast

Number = TypeVar("Number", bound=float | Fraction)


def by_content(contents: Sequence[str], values: Iterable[Number]) -> tuple[list[Number], list[int]]:
    """Return the sum over the copies of each different content, and how many copies there are.

    Args:
        contents: content hashes of the tasks, [n].
        values: one a task, [n].

    Returns:
        Sums and numbers of copies, in the order in which a content came first.
    """
    sums: dict[str, Number] = {}
    copies: dict[str, int] = {}
    for content, value in zip(contents, values, strict=True):
        sums[content] = cast(Any, sums[content]) + value if content in sums else value
        copies[content] = copies.get(content, 0) + 1
    return list(sums.values()), list(copies.values())


def effective(copies: Sequence[int]) -> float:
    """Return how many equally weighted tasks tell as much as those with so many copies each (Kish 1965)."""
    return sum(copies) ** 2 / sum(c * c for c in copies)
