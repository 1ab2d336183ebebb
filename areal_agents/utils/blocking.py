"""A stopwatch for code that holds the event loop, by the name of whose code it is.

    with BlockingWatch() as watch: ... timed("name", function, argument) ... ─▶ watch.longest()

Only what runs inside the ``with`` is timed, also in tasks that it starts. What one timed call spends inside another is
the inner one's.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Generator
from contextvars import ContextVar, Token
from typing import Any, Self

_current: ContextVar[BlockingWatch | None] = ContextVar("areal_blocking_watch", default=None)


class BlockingWatch:
    """The times for which timed calls held the event loop, between two of their awaits."""

    def __init__(self) -> None:
        self._held: dict[str, list[float]] = {}
        self._total = 0.0
        self._token: Token[BlockingWatch | None] | None = None

    def __enter__(self) -> Self:
        self._token = _current.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        _current.reset(self._token)

    def longest(self) -> dict[str, float]:
        """Return seconds by name: the longest but one, because one call may import modules or meet a busy machine."""
        return {name: sorted(times)[-2] for name, times in self._held.items() if len(times) > 1}

    def begin(self) -> tuple[float, float]:
        """Start the clock, for ``end``."""
        return self._total, time.perf_counter()

    def end(self, begun: tuple[float, float]) -> float:
        """Return the seconds since ``begin`` that no timed call in between took for itself."""
        before, start = begun
        spent, inside = time.perf_counter() - start, self._total - before
        self._total = before + spent
        return max(0.0, spent - inside)

    def note(self, name: str, seconds: float) -> None:
        """Keep the longest time that one call of ``name`` held the loop."""
        self._held.setdefault(name, []).append(seconds)


def timed(name: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call ``function``, and where a watch looks on, tell it how long that held the loop.

    An awaitable that it returns is timed while it is awaited.
    """
    watch = _current.get()
    if watch is None:
        return function(argument)
    begun, seconds = watch.begin(), 0.0
    try:
        value = function(argument)
    finally:
        seconds = watch.end(begun)
    if inspect.isawaitable(value):
        return _Timed(name, value, watch, seconds)
    watch.note(name, seconds)
    return value


class _Timed(Awaitable[Any]):
    """An awaitable whose steps are timed, one by one."""

    def __init__(self, name: str, inner: Awaitable[Any], watch: BlockingWatch, seconds: float) -> None:
        self._name, self._inner, self._watch, self._longest = name, inner, watch, seconds

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = _result_of(self._inner)
        sent, thrown = None, None
        try:
            while True:
                begun = self._watch.begin()
                try:
                    yielded = steps.send(sent) if thrown is None else steps.throw(thrown)
                except StopIteration as end:
                    return end.value
                finally:
                    self._longest = max(self._longest, self._watch.end(begun))
                thrown = None
                try:
                    sent = yield yielded
                except BaseException as error:  # noqa: BLE001  it is raised where the awaitable waits
                    thrown = error
        finally:
            self._watch.note(self._name, self._longest)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
