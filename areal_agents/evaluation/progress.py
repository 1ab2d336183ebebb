"""The progress of an evaluation, and a stopwatch."""

from __future__ import annotations

import time
from collections.abc import Callable

from areal_agents.tracking.console import clock


class Progress:
    """A progress display of lines such as ``64/128 episodes, ETA 0:21``.

    Args:
        show: is called with each line.
        label: first words of a line.
        what: the things that are counted.
        every: seconds between two lines, at least.
        before: how many were done already, which took none of the time.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        label: str = "evaluating",
        what: str = "episodes",
        every: float = 5.0,
        before: int = 0,
    ) -> None:
        self._show, self._label, self._what, self._every, self._before = show, label, what, every, before
        self._watch, self._last = Stopwatch(), 0.0

    def __call__(self, done: int, total: int) -> None:
        seconds = self._watch.seconds
        if seconds - self._last >= self._every and done < total:
            self._last = seconds
            left = clock(seconds / max(1, done - self._before) * (total - done))
            self._show(f"{self._label}: {done}/{total} {self._what}, ETA {left}")


class Stopwatch:
    """A clock that tells the seconds since it was made, and those before."""

    def __init__(self, *, before: float = 0.0) -> None:
        self._start = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
