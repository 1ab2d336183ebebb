"""Places to play at, the same number on each worker.

The least-loaded worker is chosen first, and who comes first is served first.

Pure asyncio. ``take`` waits for a free place and is unblocked by ``add``, ``give_back`` or ``fail``. It holds nothing
while it waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from areal_agents.errors import ConfigError

W = TypeVar("W")


class Places(Generic[W]):
    """The places of all workers that were added, ``each`` on every one.

    A worker that was removed keeps the places that are taken until they are given back. Choosing costs one look at each
    worker. Raises ConfigError for fewer than 1.
    """

    def __init__(self, each: int) -> None:
        if each < 1:
            raise ConfigError(f"episodes per worker = {each} must be at least 1")
        self._each = each
        self._taken: dict[W, int] = {}
        self._open: dict[W, None] = {}
        self._waiting: deque[asyncio.Future[W]] = deque()
        self._idle: dict[W, asyncio.Event] = {}
        self._failed: Exception | None = None

    def add(self, worker: W) -> None:
        """Offer the places of ``worker``."""
        self._open[worker] = None
        self._taken.setdefault(worker, 0)
        self._serve()

    def remove(self, worker: W) -> None:
        """Stop offering the places of ``worker``, where they are offered."""
        self._open.pop(worker, None)
        self._forget(worker)

    def taken(self, worker: W) -> int:
        """Return the number of places of ``worker`` that are taken."""
        return self._taken.get(worker, 0)

    async def take(self) -> W:
        """Wait for a place and return its worker, to be given back.

        Raises what ``fail`` was given.
        """
        place: asyncio.Future[W] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._serve()
        try:
            return await place
        except asyncio.CancelledError:
            # The place may have been given in the same moment, and would be lost.
            if place.done() and not place.cancelled() and place.exception() is None:
                self.give_back(place.result())
            raise

    def give_back(self, worker: W) -> None:
        """Free the place that ``take`` returned."""
        self._taken[worker] -= 1
        if not self._taken[worker] and worker in self._idle:
            self._idle.pop(worker).set()
        self._forget(worker)
        self._serve()

    async def idle(self, worker: W) -> None:
        """Wait until no place of ``worker`` is taken.

        Unblocked by: ``give_back``.
        """
        if self.taken(worker):
            await self._idle.setdefault(worker, asyncio.Event()).wait()

    def fail(self, error: Exception) -> None:
        """Offer no more places, and raise ``error`` for whoever waits now or later."""
        self._failed = self._failed or error
        self._serve()

    def _forget(self, worker: W) -> None:
        if worker not in self._open and not self._taken.get(worker):
            self._taken.pop(worker, None)

    def _serve(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # its taker was cancelled
                self._waiting.popleft()
            elif self._failed is not None:
                self._waiting.popleft().set_exception(self._failed)
            else:
                worker = min(self._open, key=self._taken.__getitem__, default=None)  # ties: the one added first
                if worker is None or self._taken[worker] >= self._each:
                    return
                self._taken[worker] += 1
                self._waiting.popleft().set_result(worker)
