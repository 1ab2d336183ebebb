"""The engine that ``SupervisedEngine`` restarts, as far as it must know it, and the limit of restarts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from areal_agents.engine import Engine, UpdateReport, WeightsRef
from areal_agents.errors import ConfigError, EngineError

_PINGS = 3
"""How many unanswered health questions make an engine hung. One may be this process's own blocked event loop."""


class Restartable(Engine, Protocol):
    """An engine whose process can be lost."""

    @property
    def failure(self) -> str | None:
        """The reason why its process is gone, for people. None while it lives.

        It is set before any call fails because of it.
        """
        ...

    @property
    def stderr(self) -> str:
        """The end of what its process wrote to stderr."""
        ...

    async def kill(self) -> None:
        """End the process at once, stopped or not, and wait for its end.

        Pending calls raise EngineError.
        """
        ...


@dataclass(eq=False, slots=True)
class Life:
    """One process of the engine, from its start to its loss."""

    engine: Restartable
    lost: str = ""
    watcher: asyncio.Task[None] | None = None


@dataclass(eq=False, slots=True)
class PendingUpdate:
    """An ``update_weights`` in progress.

    ``applied`` is resolved where a restart applied it.
    """

    ref: WeightsRef
    applied: asyncio.Future[UpdateReport] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class RestartLimit:
    """A limit of ``most`` restarts within ``window`` seconds.

    Raises ConfigError for numbers out of range.
    """

    def __init__(self, most: int, window: float) -> None:
        if most < 0 or window <= 0:
            raise ConfigError(f"max_restarts = {most} must be at least 0 and window_seconds = {window:g} above 0")
        self._most, self._window = most, window
        self._times: deque[float] = deque()

    def count(self, reason: str, stderr: str) -> None:
        """Count a restart that begins because of ``reason``.

        Raises EngineError where it is one too many.
        """
        now = time.monotonic()
        while self._times and self._times[0] <= now - self._window:
            self._times.popleft()
        if len(self._times) >= self._most:
            raise EngineError(
                f"it was lost once more after {len(self._times)} restarts within {self._window:g} s, the limit: "
                f"{reason}\nIts last stderr:\n{stderr or '(empty)'}"
            )
        self._times.append(now)


async def answers(engine: Restartable, seconds: float) -> bool:
    """Say whether ``engine`` answers within ``seconds`` that it is well."""
    with contextlib.suppress(TimeoutError, EngineError):
        async with asyncio.timeout(seconds):
            while engine.failure is None:
                if (await engine.health()).ok:
                    return True
                await asyncio.sleep(seconds / 20)
    return False


async def lives(engine: Restartable, seconds: float) -> bool:
    """Say whether ``engine`` is not hung.

    True where it answers within ``seconds``. True too where it is known to be gone, which is another question.
    """
    for _ in range(_PINGS):
        if engine.failure is not None or await answers(engine, seconds / _PINGS):
            return True
    return False
