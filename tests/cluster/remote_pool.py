"""A pool of engines on Ray actors under test, and what it logged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from areal_agents.cluster.pool_actor import PoolSettings, RemotePool
from areal_agents.engine import WeightsRef
from areal_agents.engines.spec import EngineSpec
from areal_agents.types import Completion
from tests.cluster.conftest import RaySession
from tests.served import Served, ServedModel, ids_of

_POLL_SECONDS = 0.02


def pool_settings(spec: EngineSpec, **changes: Any) -> PoolSettings:
    """Two engines; nothing is taken for hung for a while."""
    given: dict[str, Any] = {
        "replicas": 2,
        "seed": 5,
        "place_seconds": 120.0,
        "supervised": {"hang_seconds": 20.0, "health_interval": 0.1, "max_restarts": 20},
    }
    return PoolSettings(spec, **(given | changes))


class Rig:
    """A pool and its events.

    make: ``make(seed=…)`` is a model of the shape that is served, ``make()`` the one the engines start with.
    """

    def __init__(
        self, session: RaySession, settings: PoolSettings, make: Callable[..., Any], *, block: int = 1
    ) -> None:
        self.session = session
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pool: RemotePool = session.run(RemotePool.start(settings, event=self.log))
        self.it = Served(
            self.pool, ServedModel(make), session.run, kv_tokens=settings.spec.options["kv_tokens"], block=block,
            context=settings.spec.options["max_context"], gone=r"engine\.transport = 'disk'",
        )  # fmt: skip

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    async def told(self, kind: str, n: int = 1) -> None:
        """Wait until ``n`` events of this kind were told."""
        while len(self.named(kind)) < n:  # noqa: ASYNC110  what another process does
            await asyncio.sleep(_POLL_SECONDS)

    def actors(self) -> list[int]:
        return self.session.processes("ray::EngineActor")

    def publish(self) -> tuple[WeightsRef, Any]:
        """Another model as the next version."""
        model = self.it.model.make(seed=100 + self.it.version)
        return self.it.model.fill(model, self.it.version + 1), model

    async def update(self) -> None:
        """Publish another model as the next version and serve it."""
        await self.it.serve(*self.publish())

    def ask(self, i: int, tokens: int = 60) -> asyncio.Task[Completion]:
        """The turn of session ``i``."""
        return asyncio.create_task(self.it.ask(ids_of(9 + i, i), tokens, f"s{i}"))

    async def check(self, *tasks: asyncio.Task[Completion]) -> None:
        """Sessions 0, 1, …: tokens of the served version, with that version's log-probabilities; they are released."""
        for i, done in enumerate(await asyncio.gather(*tasks)):
            assert done.versions == (self.it.version,) * len(done.ids)
            self.it.check(ids_of(9 + i, i), done)
            await self.pool.release(f"s{i}")

    async def serving(self, n: int) -> list[str]:
        """Wait until the pool has ``n`` replicas and all of them serve; returns its account of each."""
        while True:
            lines = (await self.pool.health()).detail.splitlines()
            if len(lines) == n == sum("serving" in line for line in lines):
                return lines
            await asyncio.sleep(_POLL_SECONDS)

    def close(self) -> None:
        self.session.run(self.pool.close())
        self.it.model.close()
