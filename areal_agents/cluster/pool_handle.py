"""``PoolHandle``: the engine pool as other processes of the cluster see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from areal_agents.cluster.engine_host import EngineHandle, Place
from areal_agents.cluster.watched_actor import WatchedActor
from areal_agents.engine import Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.types import Completion, Prompt

_NEVER = 1e9


class _Borrowed(WatchedActor):
    """Somebody else's actor. A call notices its death; nobody here decides that it hangs, or ends it."""

    def watch(self, node: str, pid: int, pong: Any = None) -> None:
        """Its owner does."""

    async def _kill(self) -> None:
        """Its owner does."""


class PoolHandle:
    """An ``Engine``. It belongs to the event loop that first calls it, and may be pickled on.

    actor: Ray's handle of the pool's actor. place: where that runs, with the version it served at that time.
    Every call raises EngineError while the actor cannot be reached. What fails may be the way there, for a moment: each
    call tries anew, and a pool that is gone for good fails each at once.
    """

    def __init__(self, actor: Any, place: Place) -> None:
        self._remote, self._place = actor, place
        self._bound: EngineHandle | None = None

    def __reduce__(self) -> tuple[type[PoolHandle], tuple[Any, Place]]:
        return PoolHandle, (self._remote, self._place)

    @property
    def _engine(self) -> EngineHandle:
        if self._bound is None or self._bound.unreachable:
            place = replace(self._place, version=self.version)
            actor = _Borrowed(self._remote, "the engine pool's actor", hang_seconds=_NEVER, interval=_NEVER)
            self._bound = EngineHandle(actor, place)
        return self._bound

    @property
    def version(self) -> int:
        """The lowest version served when the pool last answered here."""
        return self._place.version if self._bound is None else self._bound.version

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self._place.max_context

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """See ``EnginePool.generate``."""
        return await self._engine.generate(prompt, sampling, session=session, deadline=deadline)

    async def release(self, session: str) -> None:
        """See ``EnginePool.release``; not waited for."""
        await self._engine.release(session)

    async def update_weights(
        self, ref: WeightsRef, *, mode: UpdateMode = "inflight", kv: KVPolicy = "recompute"
    ) -> UpdateReport:
        """See ``EnginePool.update_weights``."""
        return await self._engine.update_weights(ref, mode=mode, kv=kv)

    async def set_threads(self, threads: int) -> None:
        """See ``EnginePool.set_threads``."""
        await self._engine.set_threads(threads)

    async def health(self) -> Health:
        """See ``EnginePool.health``."""
        return await self._engine.health()

    async def close(self) -> None:
        """Nothing: the pool is its owner's."""
