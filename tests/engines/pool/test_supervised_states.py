"""``SupervisedEngine``'s states, around a scripted engine: every order of losses, updates and refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from areal_agents.engine import Health, Sampling, UpdateReport, WeightsRef
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.errors import ConfigError, EngineError
from areal_agents.types import Completion, Prompt


def ref(version: int) -> WeightsRef:
    return WeightsRef(version, f"weights-{version}", (), "", 0)


class Scripted:
    """Answers at once, except where ``world`` says otherwise. ``calls`` is what it was asked, in order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.calls: list[str] = []
        self.failure: str | None = None
        self.stderr = "last words"
        self.version = 0
        self.ended = asyncio.Event()
        self.loading: asyncio.Event | None = None

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        self.calls.append(f"generate {session}")
        await self.wait(self.world.generating)
        return Completion((1,), (-1.0,), (self.version,), "stop")

    async def update_weights(self, ref: WeightsRef, *, mode: str = "inflight", kv: str = "recompute") -> UpdateReport:
        self.calls.append(f"load {ref.version}")
        await self.wait(self.world.loading)
        if ref.version in self.world.refused:
            raise EngineError(f"weights v{ref.version} are damaged")
        self.version = ref.version
        return UpdateReport(ref.version, 0.0, 0, 0)

    async def wait(self, gate: asyncio.Event) -> None:
        """Until the gate opens. Raises EngineError where the engine dies first."""
        tasks = [asyncio.create_task(e.wait()) for e in (gate, self.ended)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if self.failure is not None:
            raise EngineError(self.failure)

    def die(self) -> None:
        self.failure = "the process died"
        self.ended.set()

    async def health(self) -> Health:
        await asyncio.sleep(self.world.health_seconds)
        return Health(self.failure is None, self.version, 0, 0, 0, 0)

    async def release(self, session: str) -> None: ...

    async def kill(self) -> None:
        self.die()

    async def close(self) -> None:
        self.die()


class World:
    """The supervised engine, its processes so far, and the gates that the test opens and shuts."""

    def __init__(self, **options: Any) -> None:
        self.engines: list[Scripted] = []
        self.refused: set[int] = set()
        self.generating, self.loading = asyncio.Event(), asyncio.Event()
        self.generating.set()
        self.loading.set()
        self.starts: list[Callable[[], Scripted]] = []
        self.events: list[str] = []
        self.health_seconds = 0.0
        self.engine = SupervisedEngine(self.start, event=self.log, **options)

    async def start(self) -> Scripted:
        await asyncio.sleep(0)
        if self.starts:
            return self.starts.pop(0)()
        self.engines.append(Scripted(self))
        return self.engines[-1]

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append(kind)

    def ask(self, session: str = "s", deadline: float = 5.0) -> asyncio.Task[Completion]:
        return asyncio.create_task(self.engine.generate(Prompt((1,)), Sampling(1), session=session, deadline=deadline))


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(50):
        await asyncio.sleep(0)


def test_weights_come_before_requests_and_an_update_during_the_load_comes_too() -> None:
    async def work() -> None:
        world = World()
        async with world.engine:
            await world.engine.update_weights(ref(3))
            world.generating.clear()
            pending = world.ask("a")
            await settle()
            world.loading.clear()
            world.engines[0].die()
            await settle()
            second = world.engines[1]
            assert second.calls == ["load 3"]
            update = asyncio.create_task(world.engine.update_weights(ref(4)))
            other = world.ask("b")
            await settle()
            assert second.calls == ["load 3"]
            world.loading.set()
            world.generating.set()
            assert (await update).version == 4
            assert (await pending).versions == (await other).versions == (4,)
            assert second.calls[:2] == ["load 3", "load 4"]
            assert sorted(second.calls[2:]) == ["generate a", "generate b"]
            assert world.events == ["engine_lost", "engine_restarted", "request_retried"]

    run(work())


@pytest.mark.parametrize("how", ["refused", "cancelled"])
def test_after_an_update_that_failed_a_restart_waits_for_the_next_one(how: str) -> None:
    """The acknowledged weights' buffer may be overwritten by the publish that comes now."""

    async def work() -> None:
        world = World()
        async with world.engine:
            await world.engine.update_weights(ref(1))
            if how == "refused":
                world.refused = {2}
                with pytest.raises(EngineError, match="v2 are damaged"):
                    await world.engine.update_weights(ref(2))
            else:
                world.loading.clear()
                update = asyncio.create_task(world.engine.update_weights(ref(2)))
                await settle()
                update.cancel()
                await asyncio.gather(update, return_exceptions=True)
                world.loading.set()
            assert (await world.ask()).versions == (1,)  # they stay in use as long as the process lives
            world.engines[0].die()
            pending = world.ask()
            await settle()
            assert world.engines[1].calls == []
            with pytest.raises(EngineError, match="met its deadline while the engine was being restarted"):
                await world.ask("hurry", deadline=0.01)
            await world.engine.update_weights(ref(3))
            assert (await pending).versions == (3,)
            assert world.engines[1].calls == ["load 3", "generate s"]
            world.engines[1].die()  # healed: the next restart waits for nobody
            assert (await world.ask()).versions == (3,)

    run(work())


def test_weights_that_are_gone_at_a_restart_are_waited_for() -> None:
    async def work() -> None:
        world = World()
        async with world.engine:
            await world.engine.update_weights(ref(1))
            world.refused = {1}
            world.engines[0].die()
            pending = world.ask()
            await settle()
            assert world.events == ["engine_lost", "weights_lost"]
            assert not pending.done()
            await world.engine.update_weights(ref(2))
            assert (await pending).versions == (2,)
            assert world.engines[1].calls == ["load 1", "load 2", "generate s"]

    run(work())


def test_an_update_refused_at_the_restart_that_it_met_fails_alone() -> None:
    async def work() -> None:
        world = World()
        async with world.engine:
            await world.engine.update_weights(ref(1))
            world.loading.clear()
            update = asyncio.create_task(world.engine.update_weights(ref(2)))
            await settle()
            world.refused = {2}
            world.engines[0].die()
            world.loading.set()
            with pytest.raises(EngineError, match="v2 are damaged"):
                await update
            pending = world.ask()
            await world.engine.update_weights(ref(3))
            assert (await pending).versions == (3,)
            assert world.engines[1].calls == ["load 2", "load 3", "generate s"]

    run(work())


def test_an_update_given_up_during_a_restarts_load_leaves_no_weights_that_may_be_torn() -> None:
    async def work() -> None:
        world = World()
        async with world.engine:
            await world.engine.update_weights(ref(1))
            world.loading.clear()
            world.engines[0].die()
            pending = world.ask()
            await settle()
            assert world.engines[1].calls == ["load 1"]
            update = asyncio.create_task(world.engine.update_weights(ref(2)))
            await settle()
            update.cancel()
            await asyncio.gather(update, return_exceptions=True)
            world.loading.set()
            await settle()
            assert world.engines[1].calls == ["load 1"]
            assert not pending.done()  # the caller's next publish could have overwritten version 1 while it was read
            await world.engine.update_weights(ref(3))
            assert (await pending).versions == (3,)

    run(work())


def test_a_failing_start_counts_as_a_restart_and_a_hanging_one_meets_its_deadline() -> None:
    def broken() -> Scripted:
        raise EngineError("no memory left")

    async def work() -> None:
        world = World(max_restarts=3)
        async with world.engine:
            world.starts = [broken, broken]
            world.engines[0].die()
            assert (await world.ask()).versions == (0,)
            assert world.events == ["engine_lost"] * 3 + ["engine_restarted", "request_retried"]
            world.engines[1].die()
            with pytest.raises(EngineError, match="after 3 restarts within 600 s, the limit: the process died"):
                await world.ask()

        async def never() -> Scripted:
            await asyncio.Event().wait()
            raise AssertionError

        slow = SupervisedEngine(never, event=world.log, start_seconds=0.01)
        with pytest.raises(EngineError, match=r"did not start within 0\.01 s"):
            await slow.__aenter__()
        with pytest.raises(EngineError, match="was not started"):
            await slow.generate(Prompt((1,)), Sampling(1), session="s", deadline=1)

    run(work())


def test_restarts_outside_the_window_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("areal_agents.engines.pool.supervision.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def work() -> None:
        world = World(max_restarts=1, window_seconds=60.0)
        async with world.engine:
            for n in range(3):
                world.engines[n].die()
                assert (await world.ask()).versions == (0,)
                now[0] += 60.0

    run(work())


def test_a_blocked_event_loop_of_ours_is_no_hung_engine() -> None:
    async def work() -> None:
        world = World(hang_seconds=0.3, health_interval=0.001)
        world.health_seconds = 0.01
        async with world.engine:
            world.generating.clear()
            pending = world.ask()
            for _ in range(3):
                await asyncio.sleep(0.02)
                time.sleep(0.4)  # noqa: ASYNC251  longer than the deadline: replies wait unread
            await asyncio.sleep(0.02)
            world.generating.set()
            await pending
            assert world.events == []

    run(work())


def test_an_event_log_that_fails_ends_requests_instead_of_hanging_them() -> None:
    async def work() -> None:
        world = World()

        def full(kind: str, **fields: Any) -> None:
            raise OSError("No space left on device")

        world.engine = SupervisedEngine(world.start, event=full)
        async with world.engine:
            world.engines[0].die()
            with pytest.raises(EngineError, match="the engine was not restarted: OSError: No space left"):
                await world.ask()

    run(work())


def test_engines_without_a_context_and_numbers_out_of_range() -> None:
    async def work() -> None:
        world = World()
        async with world.engine as engine:
            assert engine.max_context == 0
        for wrong in ({"max_restarts": -1}, {"hang_seconds": 0.0}, {"window_seconds": -1.0}, {"start_seconds": 0.0}):
            with pytest.raises(ConfigError):
                World(**wrong)

    run(work())
