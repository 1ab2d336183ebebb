"""An engine without ``set_threads``, as vLLM's, for actors to host."""

from __future__ import annotations

from typing import Any, cast

from areal_agents.engines.pool.supervision import Restartable
from areal_agents.engines.spec import EngineSpec


class FixedThreads:
    """A transformers engine that keeps the threads of its start."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        if name in ("set_threads", "_engine"):
            raise AttributeError(name)
        return getattr(self._engine, name)


class FixedThreadsSpec(EngineSpec):
    """Starts one."""

    async def start(self, seed: int) -> Restartable:
        return cast(Restartable, FixedThreads(await EngineSpec.start(self, seed)))
