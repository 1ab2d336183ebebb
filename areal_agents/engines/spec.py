"""``EngineSpec``: how to start an engine, as a value that travels to another process or node."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from areal_agents.engine_kind import KindName, engine_kind
from areal_agents.engines.pool.supervision import Restartable


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A call of ``Class.start(model, seed=..., **options)``, where ``Class`` is the engine of this kind."""

    kind: KindName
    model: str
    """A folder or hub id that the engine's node can read."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of its ``start``: precision, max_batch, kv_tokens, max_context, threads, …"""

    async def start(self, seed: int) -> Restartable:
        """Start a process of the engine.

        It imports the engine's module, and raises what the engine's ``start`` raises.
        """
        engine = engine_kind(self.kind).load()
        return cast(Restartable, await engine.start(self.model, seed=seed, **self.options))


def process_seed(seed: int, *, salt: str, index: int, nth: int) -> int:
    """Return the seed of the ``nth`` process of replica ``index``.

    No process draws another one's random numbers.

    Args:
        seed: the run's. The very first process gets it unchanged.
        salt: tells lives of the run apart, and is empty in the first one. A resumed run must not repeat the numbers
            that it drew before.
        index: number of the replica, from 0.
        nth: number of the replica's process, from 0.
    """
    if not salt and not index and not nth:
        return seed
    return random.Random(f"{seed}/{salt}/{index}/{nth}").getrandbits(31)
