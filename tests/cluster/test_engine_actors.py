"""An engine pool of real Ray actors: the contract of engines; and killed, stopped, refused, added, removed ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.engine import Sampling, WeightsRef
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.spec import EngineSpec
from areal_agents.errors import EngineError, ModelError
from areal_agents.types import Prompt
from tests.engine_suite import REQUESTS
from tests.engine_update_suite import PASSED_ON
from tests.processes import alive, wait_gone
from tests.served import ids_of
from tests.tiny_models import save_tiny, tiny_model

ray = pytest.importorskip("ray")
from areal_agents.cluster.engine_actors import Resources  # noqa: E402
from areal_agents.cluster.pool_actor import PoolSettings, RemotePool  # noqa: E402
from tests.cluster.conftest import RaySession, engine_worker  # noqa: E402
from tests.cluster.remote_pool import Rig, pool_settings  # noqa: E402

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PoolSettings:
    folder = save_tiny(tmp_path_factory.mktemp("model"), tiny_model())
    options = {"precision": "fp32", "max_batch": 4, "kv_tokens": 2400, "max_context": 256}
    shape = Shape.read(folder, 256)  # else every actor would import transformers to read it
    return pool_settings(EngineSpec("transformers", str(folder), {**options, "shape": shape}))


@pytest.fixture(scope="module")
def rig(session: RaySession, settings: PoolSettings) -> Iterator[Rig]:
    it = Rig(session, settings, tiny_model)
    yield it
    actors = it.actors()
    it.close()
    assert not wait_gone(actors, 60)


def test_two_actors_serve_one_version_and_draw_different_numbers(rig: Rig) -> None:
    async def work() -> None:
        assert len(rig.actors()) == 2
        assert rig.pool.max_context == 256
        await rig.update()
        await rig.check(*[rig.ask(i) for i in range(4)])
        health = await rig.pool.health()
        lines = [line.split(",")[:2] for line in health.detail.splitlines()]
        assert lines == [[f"replica {i}: serving", " v1"] for i in range(2)]
        assert health.sampled_tokens == 4 * 60
        # Two engines with one seed would sample the same tokens for the same prompt.
        a, b = await asyncio.gather(*[rig.it.ask(ids_of(8, 1), 40, f"t{i}") for i in range(2)])
        assert a.ids != b.ids

    rig.session.run(work())


CONTRACT = REQUESTS | PASSED_ON


@pytest.mark.parametrize("check", CONTRACT)
def test_the_contract_costs_no_engine(rig: Rig, check: str) -> None:
    actors, events = rig.actors(), len(rig.events)
    rig.session.run(CONTRACT[check](rig.it))
    rig.session.run(rig.it.release())  # each of the next sessions' replica is the one with fewer
    assert (rig.actors(), len(rig.events)) == (actors, events)


def test_a_killed_actor_is_replaced_with_the_current_weights_and_its_requests_move(rig: Rig) -> None:
    async def work() -> None:
        await rig.update()
        for part in ("the actor", "the engine's own process, below a living actor"):
            lost = len(rig.named("engine_lost"))
            actor = rig.actors()[0]
            computing = engine_worker(actor)
            os.kill(computing, signal.SIGSTOP)
            pending = [rig.ask(i, 200) for i in range(4)]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)  # half of them are on the other one
            before = len(rig.named("request_retried"))
            os.kill(actor if part == "the actor" else computing, signal.SIGKILL)
            await rig.check(*pending)
            await rig.told("engine_restarted", lost + 1)
            assert not wait_gone([actor, computing], 60)
            gone, back = rig.named("engine_lost")[lost], rig.named("engine_restarted")[lost]
            assert ("died" if part == "the actor" else "SIGKILL") in gone["reason"]
            assert (gone["replica"], back["version"]) == (back["replica"], rig.it.version)
            moved = rig.named("request_retried")[before:]
            assert len(moved) == 2
            assert all(fields["replica"] != gone["replica"] and fields["attempt"] == 1 for fields in moved)
            assert all(f"v{rig.it.version}" in line for line in await rig.serving(2))

    rig.session.run(work())


def test_a_stopped_actor_is_noticed_and_replaced(rig: Rig) -> None:
    async def work() -> None:
        before = len(rig.named("engine_restarted"))
        stopped = rig.actors()[1]
        computing = engine_worker(stopped)
        os.kill(stopped, signal.SIGSTOP)
        pending = [rig.ask(i, 200) for i in range(4)]
        noticed = asyncio.create_task(rig.told("engine_lost", len(rig.named("engine_lost")) + 1))
        await rig.check(*pending)
        await rig.told("engine_restarted", before + 1)
        assert "no sign of health for 20 s" in rig.named("engine_lost")[-1]["reason"]
        assert not wait_gone([stopped, computing], 60)
        await noticed
        # Also while nobody asks.
        os.kill(rig.actors()[0], signal.SIGKILL)
        await rig.told("engine_restarted", before + 2)

    rig.session.run(work())


def test_an_update_that_breaks_on_one_replica_is_acknowledged_by_the_other_and_follows_there(rig: Rig) -> None:
    async def work() -> None:
        await rig.serving(2)
        lost, restarted = len(rig.named("engine_lost")), len(rig.named("engine_restarted"))
        worker = engine_worker(rig.actors()[0])
        os.kill(worker, signal.SIGSTOP)  # it cannot acknowledge any more
        pending = [rig.ask(i, 220) for i in range(2)]
        version = rig.it.version
        update = asyncio.create_task(rig.update())
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        (other,) = (i for i, task in enumerate(pending) if task.done())
        while (await rig.ask(other, 5)).versions[0] == version:  # the other replica has the update
            pass
        with contextlib.suppress(ProcessLookupError):  # taken for hung already
            os.kill(worker, signal.SIGKILL)
        await update
        assert len(rig.named("engine_lost")) <= lost + 1
        await asyncio.gather(*pending)
        await rig.told("engine_restarted", restarted + 1)
        assert rig.named("engine_restarted")[-1]["version"] == rig.it.version
        await rig.serving(2)
        await rig.check(*[rig.ask(i) for i in range(4)])

    rig.session.run(work())


def test_the_pool_grows_and_shrinks_under_load(rig: Rig) -> None:
    async def work() -> None:
        await rig.serving(2)
        stop = asyncio.Event()

        async def client(i: int) -> int:
            turns = 0
            while not stop.is_set():
                version = rig.it.version
                done = await rig.ask(i, 20)
                assert done.versions[0] >= version
                turns += 1
            return turns

        clients = [asyncio.create_task(client(i)) for i in range(4)]
        growth = asyncio.create_task(rig.pool.resize(3))
        await rig.update()
        await growth
        assert all(f"v{rig.it.version}" in line for line in await rig.serving(3))
        await rig.update()
        assert len(rig.actors()) == 3
        await rig.pool.resize(1)
        await rig.update()
        await rig.serving(1)
        assert len(rig.actors()) == 1
        stop.set()
        assert all(turns > 0 for turns in await asyncio.gather(*clients))
        await rig.check(*[rig.ask(i) for i in range(2)])
        await rig.told("replica_removed", 2)
        assert rig.pool.replicas == 1

    rig.session.run(work())


def test_what_cannot_be_placed_or_loaded_is_an_error_that_names_it(
    rig: Rig, settings: PoolSettings, tmp_path: Path
) -> None:
    async def work() -> None:
        asked = Resources(num_cpus=2, num_gpus=1, custom={"fast_disk": 3})
        with pytest.raises(EngineError) as caught:
            await RemotePool.start(
                replace(settings, replicas=1, resources=asked, place_seconds=2.0), event=lambda kind, **fields: None
            )
        said = str(caught.value)
        assert "asks for 2 CPU, 1 GPU, 3 fast_disk was not placed within 2 s: the cluster has 8 CPU in all" in said
        assert "cluster.engine_gpus" in said
        options = {name: value for name, value in settings.spec.options.items() if name != "shape"}
        absent = EngineSpec("transformers", str(tmp_path / "absent"), options)
        with pytest.raises(ModelError, match="absent"):
            await RemotePool.start(replace(settings, spec=absent, replicas=1), event=lambda kind, **fields: None)

    before = rig.session.processes("ray::PoolActor")
    rig.session.run(work())
    assert not wait_gone(list(set(rig.session.processes("ray::PoolActor")) - set(before)), 60)
    assert all(alive(pid) for pid in before)


class Caller:
    """A rollout worker as far as engines go."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    async def cut(self) -> None:
        """What a broken connection does: a call fails as if the actor were dead."""
        self.engine._bound._actor.lose("the way there is broken")

    async def ask(self, tokens: int, session: str) -> Any:
        try:
            done = await self.engine.generate(Prompt((1, 2, 3)), Sampling(tokens), session=session, deadline=300)
        except EngineError as error:
            return str(error)
        await self.engine.release(session)
        return done.versions[0], len(done.ids), self.engine.version, self.engine.max_context


def test_workers_call_the_pool_and_everybody_is_told_when_its_actor_dies(rig: Rig) -> None:
    """The last that uses the pool: it ends it."""

    async def work() -> None:
        caller, version = ray.remote(Caller).options(num_cpus=0).remote(rig.pool), rig.it.version
        assert await caller.ask.remote(5, "a") == (version, 5, version, 256)
        await caller.cut.remote()
        assert await caller.ask.remote(5, "a") == (version, 5, version, 256)
        (engine,) = rig.actors()
        os.kill(engine_worker(engine), signal.SIGSTOP)
        waiting = caller.ask.remote(240, "b")
        mine = asyncio.create_task(rig.pool.generate(Prompt((1, 2)), Sampling(240), session="c", deadline=300))
        await asyncio.sleep(0)
        (actor,) = rig.session.processes("ray::PoolActor")
        os.kill(actor, signal.SIGKILL)
        assert "the engine pool's actor died" in await waiting
        with pytest.raises(EngineError, match="the engine pool's actor died"):
            await mine
        with pytest.raises(EngineError, match="the engine pool's actor died"):
            await rig.pool.update_weights(WeightsRef(1, "", (), "", 0))
        assert rig.pool.failure
        await rig.pool.close()
        assert [kind for kind, _ in rig.events].count("pool_lost") == 1
        assert not wait_gone([engine], 60)  # what a dead actor owns ends with it
        ray.kill(caller)

    rig.session.run(work())
