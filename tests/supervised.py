"""Supervised engines under test, one after the other around the same process while it lives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.engines.process import EngineProcess
from areal_agents.engines.vllm.engine import VLLMEngine
from areal_agents.types import Completion
from tests.served import SECONDS, Served, ServedModel, ids_of

T = TypeVar("T")


class Reused(EngineProcess):
    """An engine that lives on when its supervisor closes it while it is well, for the next one."""

    closed = 0
    """How often it was told to close."""

    async def close(self) -> None:
        self.closed += 1
        if self.failure is not None:
            await self.end()

    async def end(self) -> None:
        await super().close()


class ReusedTransformers(Reused, TransformersEngine):
    """A start takes seconds."""


class ReusedVLLM(Reused, VLLMEngine):
    """A start takes half a minute."""


class Engines:
    """One process of an engine after the other: the next is started when the last is gone. And the loop they are on.

    start: ``start(folder, seed=…, …)`` is an engine; each has a seed of its own.
    """

    def __init__(
        self,
        start: Callable[..., Awaitable[Any]],
        folder: Path,
        model: ServedModel,
        *,
        settings: Any = None,
        **limits: Any,
    ) -> None:
        """settings: of the engine. limits: fields of ``Served``."""
        self.folder, self.model, self.runner = folder, model, asyncio.Runner()
        self.it = it = Served(None, model, self.run, **limits)
        given = {"max_batch": it.batch, "kv_tokens": it.kv_tokens, "max_context": it.context, **(settings or {})}
        self.start = partial(start, folder, precision="fp32", **given)
        self.started: list[Reused] = []

    async def take(self) -> Reused:
        """The last process, or the next one."""
        if not self.started or self.started[-1].failure is not None:
            self.started.append(await self.start(seed=len(self.started)))
        return self.started[-1]

    def alone(self) -> Served:
        """A process without a supervisor."""
        return replace(self.it, engine=self.run(self.take()))

    @contextlib.asynccontextmanager
    async def supervised(self, **options: Any) -> AsyncIterator[Rig]:
        """A supervised engine around the processes."""
        given = {"hang_seconds": 120.0, "health_interval": 0.05, "max_restarts": 8} | options
        rig = Rig(self.it)
        async with SupervisedEngine(self.take, event=rig.log, **given) as engine:
            rig.it = replace(self.it, engine=engine)
            if not engine.version:
                self.model.now = self.model.first
            yield rig

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, SECONDS))

    def close(self) -> None:
        for engine in self.started[-1:]:  # the earlier ones were ended when they were lost
            self.run(engine.end())
        self.runner.close()
        self.model.close()


@dataclass
class Rig:
    """A supervised engine and what it logged."""

    it: Served
    """Its engine is the supervised one."""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    @property
    def process(self) -> Any:
        """The engine inside that serves now."""
        assert self.it.engine.engine is not None
        return self.it.engine.engine

    def ask(self, i: int, tokens: int = 40, **how: Any) -> asyncio.Task[Completion]:
        """The turn of session ``i``."""
        return asyncio.create_task(self.it.ask(ids_of(9 + i, i), tokens, f"s{i}", **how))

    def check(self, i: int, done: Completion, tokens: int = 40) -> None:
        """Session ``i`` has tokens of the served version alone, with that version's log-probabilities."""
        assert done.versions == (self.it.version,) * tokens
        self.it.check(ids_of(9 + i, i), done)

    async def update(self) -> None:
        """Publish another model as the next version and serve it."""
        await self.it.update(self.it.model.make(seed=700 + self.it.version))

    async def sampled(self, tokens: int) -> None:
        """Wait until the present process has sampled so many more, or is lost."""
        process, start = self.process, (await self.process.health()).sampled_tokens
        while process.failure is None and (await process.health()).sampled_tokens < start + tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
