"""An ``EnginePool`` around scripted engines, and the gates that a test opens and shuts."""

from __future__ import annotations

import asyncio
from typing import Any

from areal_agents.engine import Health, Sampling, UpdateReport, WeightsRef
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.errors import EngineError
from areal_agents.types import Completion, Prompt


def ref(version: int) -> WeightsRef:
    return WeightsRef(version, f"weights-{version}", (), "", 0)


def gate(open: bool = True) -> asyncio.Event:
    event = asyncio.Event()
    if open:
        event.set()
    return event


class Scripted:
    """One process of a replica. Its completion's ids are (replica, number of its process)."""

    def __init__(self, world: World, replica: int, nth: int) -> None:
        self.world, self.replica, self.nth = world, replica, nth
        self.calls: list[str] = []
        self.failure: str | None = None
        self.stderr = ""
        self.version = 0
        self.max_context = 100 + replica
        self.running = 0
        self.ended = asyncio.Event()
        self.generating, self.loading = gate(world.generating), gate(world.loading)
        self.refuses: set[int] = set(world.refused)
        self.kills: set[str] = set()
        """Sessions whose request ends this process."""

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        self.calls.append(f"generate {session}")
        self.running += 1
        try:
            if session in self.kills:
                self.die()
            async with asyncio.timeout(deadline):
                await self.wait(self.generating)
        except TimeoutError as error:
            raise EngineError(f"no completion of {session} within {deadline:.1f} s") from error
        finally:
            self.running -= 1
        return Completion((self.replica, self.nth), (-1.0, -1.0), (self.version,) * 2, "stop")

    async def update_weights(self, ref: WeightsRef, *, mode: str = "inflight", kv: str = "recompute") -> UpdateReport:
        self.calls.append(f"load {ref.version}")
        await self.wait(self.loading)
        if ref.version in self.refuses:
            raise EngineError(f"weights v{ref.version} are damaged")
        self.version = ref.version
        return UpdateReport(ref.version, 0.5 + self.replica, self.running, 10)

    async def wait(self, gate: asyncio.Event) -> None:
        tasks = [asyncio.create_task(e.wait()) for e in (gate, self.ended)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self.failure is not None:
            raise EngineError(self.failure)

    def die(self) -> None:
        self.failure = self.failure or "the process died"
        self.ended.set()

    async def health(self) -> Health:
        return Health(self.failure is None, self.version, self.running, 1, 7, 5)

    async def release(self, session: str) -> None:
        self.calls.append(f"release {session}")

    async def kill(self) -> None:
        self.die()

    async def close(self) -> None:
        self.die()


class World:
    """The pool, the processes it started, and what the next ones do."""

    def __init__(self, replicas: int = 2, **options: Any) -> None:
        self.engines: dict[int, list[Scripted]] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.generating = self.loading = True
        self.refused: set[int] = set()
        self.starting = gate()
        self.broken: set[int] = set()
        """Replicas that cannot be started."""
        self.pool = EnginePool(self.start, replicas=replicas, event=self.log, **options)

    async def start(self, index: int) -> Restartable:
        await self.starting.wait()
        if index in self.broken:
            raise EngineError(f"no room for engine {index}")
        mine = self.engines.setdefault(index, [])
        mine.append(Scripted(self, index, len(mine)))
        return mine[-1]

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    def __getitem__(self, index: int) -> Scripted:
        """The latest process of a replica."""
        return self.engines[index][-1]

    def ask(self, session: str, deadline: float = 5.0) -> asyncio.Task[Completion]:
        return asyncio.create_task(self.pool.generate(Prompt((1,)), Sampling(1), session=session, deadline=deadline))

    async def place(self, session: str) -> int:
        return (await self.ask(session)).ids[0]

    def all(self) -> list[Scripted]:
        return [engine for mine in self.engines.values() for engine in mine]


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(60):
        await asyncio.sleep(0)
