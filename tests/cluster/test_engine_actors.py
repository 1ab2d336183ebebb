"""An engine pool of real Ray actors that are killed, stopped, refused, added and removed under load."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling, WeightsRef
from areal_agents.engines.spec import EngineSpec
from areal_agents.errors import ConfigError, EngineError, ModelError
from areal_agents.types import Completion, Prompt
from areal_agents.weights.shared_memory import SharedWeights
from tests.cluster.conftest import RaySession, engine_worker
from tests.cluster.hosted_engine import FixedThreads, FixedThreadsSpec
from tests.processes import alive, wait_gone
from tests.served import assert_logprobs, ids_of
from tests.tiny_models import save_tiny, tiny_model

ray = pytest.importorskip("ray")
from areal_agents.cluster.engine_actors import Resources  # noqa: E402
from areal_agents.cluster.engine_host import EngineHost  # noqa: E402
from areal_agents.cluster.pool_actor import PoolSettings, RemotePool  # noqa: E402

pytestmark = pytest.mark.ray
OPTIONS = {"precision": "fp32", "max_batch": 4, "kv_tokens": 2400, "max_context": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_model())


def settings(folder: Path, **changes: Any) -> PoolSettings:
    given: dict[str, Any] = {
        "spec": EngineSpec("transformers", str(folder), OPTIONS),
        "replicas": 2,
        "seed": 5,
        "place_seconds": 30.0,
        "supervised": {"hang_seconds": 4.0, "health_interval": 0.1, "max_restarts": 20},
    }
    return PoolSettings(**(given | changes))


class Rig:
    """A pool of engines, its events, and two buffers that are filled in turn, as the learner does.

    make: ``make(seed=…)`` is a model of the shape that is served, ``make()`` the one the engines start with.
    """

    def __init__(self, session: RaySession, given: PoolSettings, make: Callable[..., Any] = tiny_model) -> None:
        self.session, self.run, self.make = session, session.run, make
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pool: RemotePool = self.run(RemotePool.start(given, event=self.log))
        self.model: Any = make()
        self.version = 0
        self.buffers: list[SharedWeights] = []

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    async def told(self, kind: str, n: int = 1) -> None:
        while len(self.named(kind)) < n:  # noqa: ASYNC110  what another process does
            await asyncio.sleep(0.02)

    def actors(self) -> list[int]:
        return self.session.processes("ray::EngineActor")

    async def update(self, before: Callable[[WeightsRef], Any] = lambda ref: None) -> None:
        model = self.make(seed=100 + self.version)
        state = {name: p.detach() for name, p in model.named_parameters()}
        if not self.buffers:
            self.buffers = [SharedWeights(state, torch.float32) for _ in range(2)]
        ref = self.buffers[self.version % 2].fill(state, self.version + 1)
        asked = asyncio.create_task(self.pool.update_weights(ref))
        await asyncio.sleep(0.2)
        before(ref)
        assert (await asked).version == self.version + 1
        self.model, self.version = model, self.version + 1
        assert self.pool.version == self.version

    def ask(self, i: int, tokens: int = 60, deadline: float = 100, **sampling: Any) -> asyncio.Task[Completion]:
        ask = self.pool.generate(
            Prompt(ids_of(9 + i, i)), Sampling(tokens, **sampling), session=f"s{i}", deadline=deadline
        )
        return asyncio.create_task(ask)

    async def check(self, *tasks: asyncio.Task[Completion]) -> None:
        """Sessions 0, 1, …: tokens of the served version, with that version's log-probabilities; they are released."""
        for i, done in enumerate(await asyncio.gather(*tasks)):
            assert set(done.versions) == {self.version}
            assert_logprobs(self.model, ids_of(9 + i, i), done)
            await self.pool.release(f"s{i}")

    async def running(self, n: int) -> None:
        while (await self.pool.health()).running < n:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def serving(self, n: int) -> str:
        """Wait until the pool has ``n`` replicas and all of them serve; returns its account of them."""
        while True:
            detail = (await self.pool.health()).detail
            if detail.count("serving") == detail.count("replica ") == n:
                return detail
            await asyncio.sleep(0.05)

    def close(self) -> None:
        self.run(self.pool.close())
        for buffer in self.buffers:
            buffer.close()


@pytest.fixture(scope="module")
def rig(session: RaySession, folder: Path) -> Iterator[Rig]:
    it = Rig(session, settings(folder))
    yield it
    actors = it.actors()
    it.close()
    assert not wait_gone(actors, 20)


def test_two_actors_serve_one_version_and_draw_different_numbers(rig: Rig) -> None:
    async def work() -> None:
        assert len(rig.actors()) == 2
        assert rig.pool.max_context == 256
        await rig.pool.set_threads(1)
        await rig.update()
        await rig.check(*[rig.ask(i) for i in range(4)])
        lines = (await rig.pool.health()).detail.splitlines()
        assert [line.split(",")[:2] for line in lines] == [[f"replica {i}: serving", " v1"] for i in range(2)]
        sampled = (await rig.pool.health()).sampled_tokens
        assert sampled == 4 * 60
        # Two engines with one seed would sample the same tokens for the same prompt.
        a, b = [rig.pool.generate(Prompt(ids_of(8, 1)), Sampling(40), session=f"t{i}", deadline=60) for i in range(2)]
        assert (await a).ids != (await b).ids

    rig.run(work())


def test_refusals_deadlines_and_cancellation_cost_no_engine(rig: Rig) -> None:
    async def work() -> None:
        actors, events = rig.actors(), len(rig.events)
        with pytest.raises(EngineError, match="the prompt has 300 tokens and max_context is 256"):
            await rig.pool.generate(Prompt(ids_of(300, 0)), Sampling(5), session="long", deadline=50)
        with pytest.raises(EngineError, match="s3"):
            await rig.ask(3, 240, deadline=0.05)
        cancelled = rig.ask(1, 240)
        await rig.running(1)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        while (await rig.pool.health()).running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match=r"engine\.transport = 'disk'"):
            await rig.pool.update_weights(WeightsRef(99, "/proc/1/fd/99999", (), "", 8))
        await rig.check(rig.ask(0))
        assert (rig.actors(), len(rig.events)) == (actors, events)

    rig.run(work())


def test_a_killed_actor_is_replaced_with_the_current_weights_and_its_requests_move(rig: Rig) -> None:
    async def work() -> None:
        await rig.update()
        pending = [rig.ask(i, 200) for i in range(4)]
        await rig.running(4)
        dead = rig.actors()[0]
        computing = engine_worker(dead)
        os.kill(dead, signal.SIGKILL)
        await rig.check(*pending)
        await rig.told("engine_restarted")
        assert not wait_gone([dead, computing], 20)
        lost, back = rig.named("engine_lost")[-1], rig.named("engine_restarted")[-1]
        assert "died" in lost["reason"]
        assert (lost["replica"], back["version"]) == (back["replica"], rig.version)
        retried = rig.named("request_retried")
        assert len(retried) == 2
        assert all(f["replica"] != lost["replica"] and f["attempt"] == 1 for f in retried)
        assert "v2" in (await rig.serving(2))
        # The engine's own process is killed below a living actor.
        pending = [rig.ask(i, 200) for i in range(4)]
        await rig.running(4)
        actor = rig.actors()[0]
        os.kill(engine_worker(actor), signal.SIGKILL)
        await rig.check(*pending)
        await rig.told("engine_restarted", 2)
        assert "SIGKILL" in rig.named("engine_lost")[-1]["reason"]
        assert not wait_gone([actor], 20)

    rig.run(work())


def test_a_stopped_actor_is_noticed_and_replaced(rig: Rig) -> None:
    async def work() -> None:
        await rig.serving(2)
        before = len(rig.named("engine_restarted"))
        pending = [rig.ask(i, 200) for i in range(4)]
        await rig.running(4)
        stopped = rig.actors()[1]
        computing = engine_worker(stopped)
        os.kill(stopped, signal.SIGSTOP)
        async with asyncio.timeout(2.0):  # sooner than the loss is noticed
            await rig.pool.set_threads(1)
        await rig.check(*pending)
        await rig.told("engine_restarted", before + 1)
        assert "no sign of health for 4 s" in rig.named("engine_lost")[-1]["reason"]
        assert not wait_gone([stopped, computing], 20)
        # Also while nobody asks.
        os.kill(rig.actors()[0], signal.SIGKILL)
        await rig.told("engine_restarted", before + 2)

    rig.run(work())


def test_an_update_that_breaks_on_one_replica_is_acknowledged_by_the_other_and_follows_there(rig: Rig) -> None:
    async def work() -> None:
        await rig.serving(2)
        lost, restarted = len(rig.named("engine_lost")), len(rig.named("engine_restarted"))
        pending = [rig.ask(i, 220) for i in range(2)]
        await rig.running(2)
        worker = engine_worker(rig.actors()[0])
        os.kill(worker, signal.SIGSTOP)  # it cannot acknowledge any more
        await rig.update(lambda ref: os.kill(worker, signal.SIGKILL))
        assert len(rig.named("engine_lost")) <= lost + 1
        await asyncio.gather(*pending)
        await rig.told("engine_restarted", restarted + 1)
        assert rig.named("engine_restarted")[-1]["version"] == rig.version
        await rig.serving(2)
        await rig.check(*[rig.ask(i) for i in range(4)])

    rig.run(work())


def test_the_pool_grows_and_shrinks_under_load(rig: Rig) -> None:
    async def work() -> None:
        await rig.serving(2)
        stop = asyncio.Event()

        async def client(i: int) -> int:
            turns = 0
            while not stop.is_set():
                done = await rig.ask(i, 20)
                assert done.versions[0] >= rig.version - 1
                turns += 1
            return turns

        clients = [asyncio.create_task(client(i)) for i in range(4)]
        growth = asyncio.create_task(rig.pool.resize(3))
        await rig.update()
        await growth
        assert (await rig.serving(3)).count(f"v{rig.version}") == 3
        await rig.update()
        assert len(rig.actors()) == 3
        await rig.pool.resize(1)
        await rig.update()
        assert "replica" in (await rig.serving(1))
        assert len(rig.actors()) == 1
        stop.set()
        assert all(turns > 0 for turns in await asyncio.gather(*clients))
        await rig.check(*[rig.ask(i) for i in range(2)])
        await rig.told("replica_removed", 2)
        assert rig.pool.replicas == 1
        await rig.pool.resize(2)

    rig.run(work())


def test_an_engine_without_threads_is_told_of_them_and_comes_back(session: RaySession, folder: Path) -> None:
    events: list[str] = []
    supervised = {"hang_seconds": 30.0, "health_interval": 0.1, "max_restarts": 1}
    fixed = FixedThreadsSpec("transformers", str(folder), OPTIONS)

    async def work() -> None:
        host = EngineHost()
        host._engine = FixedThreads(SimpleNamespace(version=3, failure=None))
        told = await host.ask("1", "set_threads", (2,), {})
        assert (told.value, told.version) == (None, 3)
        before = set(session.processes("ray::EngineActor"))
        alone = settings(folder, spec=fixed, replicas=1, supervised=supervised)
        async with await RemotePool.start(alone, event=lambda kind, **fields: events.append(kind)) as pool:
            with pytest.raises(ConfigError, match="at least 1"):
                await pool.set_threads(0)
            await pool.set_threads(1)
            assert (await pool.generate(Prompt((1, 2)), Sampling(5), session="a", deadline=60)).ids
            (actor,) = set(session.processes("ray::EngineActor")) - before
            os.kill(engine_worker(actor), signal.SIGKILL)
            assert (await pool.generate(Prompt((1, 2)), Sampling(5), session="b", deadline=60)).ids
        assert events.count("engine_lost") == events.count("engine_restarted") == 1

    session.run(work())


class Caller:
    """A rollout worker as far as engines go."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def cut(self) -> None:
        """What a broken connection does: a call fails as if the actor were dead."""
        self.engine._bound._actor.lose("the way there is broken")

    async def ask(self, tokens: int, session: str) -> Any:
        try:
            done = await self.engine.generate(Prompt((1, 2, 3)), Sampling(tokens), session=session, deadline=60)
        except EngineError as error:
            return str(error)
        await self.engine.release(session)
        return done.versions[0], len(done.ids), self.engine.version, self.engine.max_context


def test_workers_call_the_pool_and_everybody_is_told_when_its_actor_dies(session: RaySession, folder: Path) -> None:
    async def work() -> None:
        before = set(session.processes("ray::PoolActor"))
        pool = await RemotePool.start(settings(folder, replicas=1), event=lambda kind, **fields: None)
        caller = ray.remote(Caller).options(num_cpus=0).remote(pool)
        assert await caller.ask.remote(5, "a") == (0, 5, 0, 256)
        await caller.cut.remote()
        assert await caller.ask.remote(5, "a") == (0, 5, 0, 256)
        engines = set(session.processes("ray::EngineActor"))
        waiting = caller.ask.remote(240, "b")
        mine = asyncio.create_task(pool.generate(Prompt((1, 2)), Sampling(240), session="c", deadline=60))
        while (await pool.health()).running < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        (actor,) = set(session.processes("ray::PoolActor")) - before
        newest = max(engines)
        os.kill(actor, signal.SIGKILL)
        assert "the engine pool's actor died" in await waiting
        with pytest.raises(EngineError, match="the engine pool's actor died"):
            await mine
        with pytest.raises(EngineError, match="the engine pool's actor died"):
            await pool.update_weights(WeightsRef(1, "", (), "", 0))
        assert pool.failure
        await pool.close()
        assert not wait_gone([newest], 20)  # what a dead actor owns ends with it
        ray.kill(caller)

    session.run(work())


def test_what_cannot_be_placed_or_loaded_is_an_error_that_names_it(
    session: RaySession, folder: Path, tmp_path: Path
) -> None:
    async def work() -> None:
        asked = Resources(num_cpus=2, num_gpus=1, custom={"fast_disk": 3})
        with pytest.raises(EngineError) as caught:
            await RemotePool.start(
                settings(folder, replicas=1, resources=asked, place_seconds=2.0), event=lambda kind, **fields: None
            )
        said = str(caught.value)
        assert "asks for 2 CPU, 1 GPU, 3 fast_disk was not placed within 2 s: the cluster has 8 CPU in all" in said
        assert "cluster.engine_gpus" in said
        absent = EngineSpec("transformers", str(tmp_path / "absent"), OPTIONS)
        with pytest.raises(ModelError, match="absent"):
            await RemotePool.start(settings(folder, spec=absent), event=lambda kind, **fields: None)

    before = session.processes("ray::PoolActor")
    session.run(work())
    assert not wait_gone(list(set(session.processes("ray::PoolActor")) - set(before)), 20)
    assert all(alive(pid) for pid in before)
