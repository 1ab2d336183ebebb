"""``Replica``: one supervised engine of a pool, and the requests that run on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypedDict

from areal_agents.engine import Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.errors import EngineError
from areal_agents.types import Completion, Prompt

_KILL_SECONDS = 30.0
_HEALTH_SECONDS = 15.0

State = Literal["joining", "serving", "away", "draining"]
"""``joining``: it starts, or waits for its first weights. ``away``: it restarts, or its weights are not current.
``draining``: it finishes what runs. Only a ``serving`` replica is routed to."""


class SupervisedSettings(TypedDict, total=False):
    """``SupervisedEngine``'s numbers; see there."""

    max_restarts: int
    window_seconds: float
    hang_seconds: float
    health_interval: float
    start_seconds: float
    update_seconds: float


class Replica:
    """``told(replica, kind, fields)`` gets the engine's events."""

    def __init__(
        self,
        index: int,
        start: Callable[[int], Awaitable[Restartable]],
        told: Callable[[Replica, str, dict[str, Any]], None],
        settings: SupervisedSettings,
    ) -> None:
        self.index = index
        self.state: State = "joining"
        self.engine = SupervisedEngine(
            lambda: start(index), event=lambda kind, **fields: told(self, kind, fields), **settings
        )
        self.update: asyncio.Task[UpdateReport | EngineError] | None = None
        """The latest update; it goes on in the background where the replica was lost meanwhile."""
        self._requests: set[asyncio.Task[Completion]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def up(self) -> bool:
        """Whether its process is there: it serves, or takes its weights, or waits for them."""
        return self.engine.engine is not None or self.engine.loading

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion | None:
        """``Engine.generate``; None where ``move`` took the request away."""
        ask = self.engine.generate(prompt, sampling, session=session, deadline=deadline)
        task = asyncio.create_task(ask, name=f"request-on-{self.index}")
        self._requests.add(task)
        self._idle.clear()
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        finally:
            self._requests.discard(task)
            if not self._requests:
                self._idle.set()
        return None if task.cancelled() else task.result()

    def move(self) -> None:
        """Abort every request here; their ``generate`` returns None, and the pool sends them to another replica."""
        for task in self._requests:
            task.cancel()

    async def idle(self) -> None:
        """Wait until no request runs here."""
        await self._idle.wait()

    async def load(
        self, ref: WeightsRef, *, mode: UpdateMode, kv: KVPolicy, afresh: bool = False
    ) -> UpdateReport | EngineError:
        """``Engine.update_weights``, its error returned. ``afresh``: in a new process, for this one refused ``ref``."""
        if afresh and (engine := self.engine.engine) is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_SECONDS):
                    await engine.kill()
        try:
            return await self.engine.update_weights(ref, mode=mode, kv=kv)
        except EngineError as error:
            return error

    def supersede(self) -> None:
        """Give up an update that is still under way: a newer one comes."""
        if self.update is not None:
            self.update.cancel()
            self.update = None

    async def health(self) -> Health:
        """The engine's state, within seconds."""
        detail = f"no answer within {_HEALTH_SECONDS:g} s"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_SECONDS):
                try:
                    return await self.engine.health()
                except EngineError as error:
                    detail = str(error)
        return Health(False, self.engine.version, 0, 0, 0, 0, detail)
