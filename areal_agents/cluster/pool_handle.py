"""The engine pool as other processes of the cluster see it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from areal_agents.cluster.engine_host import EngineHandle, Place
from areal_agents.cluster.watched_actor import WatchedActor
from areal_agents.engine import Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.types import Completion, Prompt

_NEVER = 1e9


class _Borrowed(WatchedActor):
    """An actor that belongs to another process.

    A call notices its death. Nobody here decides that it hangs, or ends it.
    """

    def watch(self, node: str, pid: int, pong: Any = None) -> None:
        """Do nothing, because its owner watches it."""

    async def _kill(self) -> None:
        """Do nothing, because its owner ends it."""


class PoolHandle:
    """An ``Engine`` on a pool's actor that another process owns.

    It belongs to the event loop that first calls it, and may be pickled again.

    Every call raises EngineError while the actor cannot be reached. Perhaps only the way there fails for a moment, so
    each call tries anew. Where the pool is gone for good, each call fails at once.

    Args:
        actor: Ray's handle of the pool's actor.
        place: where the actor runs, with the version that it served at that time.
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
        """The longest prompt plus completion, in tokens."""
        return self._place.max_context

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """Sample one turn, as ``EnginePool.generate`` does.

        Args:
            prompt: the token ids so far.
            sampling: how to sample.
            session: the conversation, whose KV one replica keeps.
            deadline: seconds from now.

        Raises:
            EngineError: the deadline has passed, the pool cannot be reached, or the prompt does not fit.
        """
        return await self._engine.generate(prompt, sampling, session=session, deadline=deadline)

    async def release(self, session: str) -> None:
        """Drop the session's KV without waiting for it."""
        await self._engine.release(session)

    async def update_weights(
        self, ref: WeightsRef, *, mode: UpdateMode = "inflight", kv: KVPolicy = "recompute"
    ) -> UpdateReport:
        """Serve ``ref`` everywhere, as ``EnginePool.update_weights`` does."""
        return await self._engine.update_weights(ref, mode=mode, kv=kv)

    async def health(self) -> Health:
        """Return the pool's state, as ``EnginePool.health`` does."""
        return await self._engine.health()

    async def close(self) -> None:
        """Do nothing, because the pool is its owner's."""
