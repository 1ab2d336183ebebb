"""Sandboxes kept started for the next session, for each of the last few specs. They are taken, never reused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, Generic, Protocol, TypeVar

from areal_agents.errors import ArealError, SandboxError
from areal_agents.sandbox import SandboxSpec

MAX_SPECS: Final = 2


class Startable(Protocol):
    @property
    def alive(self) -> bool: ...
    async def close(self) -> None: ...


T = TypeVar("T", bound=Startable)


class WarmPool(Generic[T]):
    """Started sandboxes by spec. It belongs to one event loop."""

    def __init__(self, size: int, start: Callable[[SandboxSpec], Awaitable[T]]) -> None:
        """Keep ``size`` sandboxes for a spec, made by ``start``."""
        self._size, self._start = size, start
        self._warm: dict[SandboxSpec, list[asyncio.Task[T]]] = {}
        self._discarding: set[asyncio.Task[None]] = set()
        self._closed = False

    async def take(self, spec: SandboxSpec) -> T:
        """Return a sandbox that is the caller's from now on. Raises SandboxError."""
        if self._closed:
            raise SandboxError("the backend is closed. Create a new one.")
        self._warm[spec] = self._warm.pop(spec, [])  # the last key is the spec used last
        while tasks := self._warm.get(spec):
            task = tasks.pop(0)
            try:
                held = await asyncio.shield(task)
            except asyncio.CancelledError:
                self._discard(task)  # the shielded start goes on without its caller
                raise
            except SandboxError:
                break  # start one here, so that the error, if it stays, is this caller's
            self._refill(spec)
            if held.alive:
                return held
            await held.close()
        task = asyncio.ensure_future(self._start(spec))
        try:
            held = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._discard(task)
            raise
        self._refill(spec)
        return held

    def _refill(self, spec: SandboxSpec) -> None:
        while len(self._warm) > MAX_SPECS:
            for task in self._warm.pop(next(iter(self._warm))):
                self._discard(task)
        tasks = self._warm.get(spec)  # None: evicted, or the pool is closed
        while tasks is not None and len(tasks) < self._size:
            tasks.append(asyncio.ensure_future(self._start(spec)))

    def _discard(self, task: asyncio.Future[T]) -> None:
        discarding = asyncio.ensure_future(_close(task))
        self._discarding.add(discarding)
        discarding.add_done_callback(self._discarding.discard)

    async def aclose(self) -> None:
        """End what is kept. May be called twice."""
        self._closed = True
        tasks = [task for warm in self._warm.values() for task in warm]
        self._warm.clear()
        await asyncio.gather(*map(_close, tasks))
        while self._discarding:  # a caller that is cancelled meanwhile adds to them
            await asyncio.gather(*self._discarding)


async def _close(task: asyncio.Future[T]) -> None:
    with contextlib.suppress(ArealError):
        await (await task).close()
