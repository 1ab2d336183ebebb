"""Tasks that are made of others: some of a split, and the tasks of several difficulties in one sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import overload

from areal_agents.types import Task


class Some(Sequence[Task]):
    """The tasks of a split at some places, each of which is made when it is asked for."""

    def __init__(self, tasks: Sequence[Task], places: Sequence[int]) -> None:
        self._tasks, self._places = tasks, list(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return Some(self._tasks, self._places[index])
        return self._tasks[self._places[index]]


class Joined(Sequence[Task]):
    """Several sequences of tasks, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Task]]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return Some(self, range(len(self))[index])
        place = range(len(self))[index]  # which refuses what is out of range
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]


def joined(parts: Sequence[Sequence[Task]]) -> Sequence[Task]:
    """Return the tasks of all parts: a list where each of them is one, so that nothing is made twice."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list | tuple) for part in parts):
        return [task for part in parts for task in part]
    return Joined(parts)


def some(tasks: Sequence[Task], places: Sequence[int]) -> Sequence[Task]:
    """Return the tasks at some places: a list of a list."""
    return [tasks[i] for i in places] if isinstance(tasks, list | tuple) else Some(tasks, places)
