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
    """The numbers of ``SupervisedEngine``, which explains them."""

    max_restarts: int
    window_seconds: float
    hang_seconds: float
    health_interval: float
    start_seconds: float
    update_seconds: float


class Replica:
    """One supervised engine of a pool, with its requests and its latest update.

    Args:
        index: its number in the pool.
        start: ``start(index)`` starts a process of it.
        told: ``told(replica, kind, fields)`` gets the engine's events.
        settings: of its ``SupervisedEngine``.
    """

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
        """The latest update. It goes on in the background where the replica was lost meanwhile."""
        self._requests: set[asyncio.Task[Completion]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def up(self) -> bool:
        """True while its process is there, where it serves, takes its weights or waits for them."""
        return self.engine.engine is not None or self.engine.loading

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion | None:
        """Sample one turn like ``Engine.generate``, or return None where ``move`` took the request away.

        Args:
            prompt: token ids.
            sampling: how to sample, and what ends the turn.
            session: the conversation, whose KV is here.
            deadline: seconds from now.
        """
        # In a task of its own, which `move` can cancel without cancelling the caller.
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
        """Abort every request here.

        Their ``generate`` returns None, and the pool sends them to another replica.
        """
        for task in self._requests:
            task.cancel()

    async def idle(self) -> None:
        """Wait until no request runs here."""
        await self._idle.wait()

    async def load(
        self, ref: WeightsRef, *, mode: UpdateMode, kv: KVPolicy, afresh: bool = False
    ) -> UpdateReport | EngineError:
        """Update the weights like ``Engine.update_weights``, but return its error.

        Args:
            ref: where the weights lie.
            mode: what becomes of running requests.
            kv: what becomes of the KV of older versions.
            afresh: load them in a new process, because this one refused ``ref``.
        """
        if afresh and (engine := self.engine.engine) is not None:  # its supervisor starts the new one
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KILL_SECONDS):
                    await engine.kill()
        try:
            return await self.engine.update_weights(ref, mode=mode, kv=kv)
        except EngineError as error:
            return error

    def supersede(self) -> None:
        """Give up an update that is still under way.

        A newer one comes, or the replica goes.
        """
        if self.update is not None:
            self.update.cancel()
            self.update = None

    async def health(self) -> Health:
        """Return the engine's state, within seconds."""
        detail = f"no answer within {_HEALTH_SECONDS:g} s"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_SECONDS):
                try:
                    return await self.engine.health()
                except EngineError as error:
                    detail = str(error)
        return Health(False, self.engine.version, 0, 0, 0, 0, detail)
