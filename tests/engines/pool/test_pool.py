"""``EnginePool``: routing, losses, updates: every order of them, around scripted engines."""

from __future__ import annotations

import asyncio

import pytest

from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.errors import EngineError
from tests.pool_world import Scripted, World, ref, run, settle


def test_sessions_stick_are_spread_and_leave_their_place_when_released() -> None:
    async def work() -> None:
        world = World(3)
        async with world.pool as pool:
            assert [await world.place(s) for s in "abcdef"] == [0, 1, 2, 0, 1, 2]
            assert [await world.place(s) for s in "fedcba"] == [2, 1, 0, 2, 1, 0]
            await pool.release("b")
            await pool.release("unknown")
            assert world[1].calls[-1] == "release b"
            assert await world.place("g") == 1
            assert pool.max_context == 100
            assert [f["replica"] for f in world.named("replica_added")] == [0, 1, 2]
        assert all(engine.failure for engine in world.all())
        with pytest.raises(EngineError, match="the engine pool was closed"):
            await world.ask("a")

    run(work())


def test_requests_of_a_lost_replica_move_at_once_and_it_serves_again_after_its_restart() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            await pool.update_weights(ref(3))
            world[0].generating.clear()
            pending = world.ask("a")
            await settle()
            world.starting.clear()
            world[0].die()
            done = await pending  # though replica 0 cannot start yet
            assert (done.ids, done.versions) == ((1, 0), (3, 3))
            assert [k for k, _ in world.events[2:]] == ["engine_lost", "request_retried"]
            assert world.named("engine_lost")[0]["replica"] == 0
            assert world.named("request_retried") == [{"session": "a", "attempt": 1, "version": 3, "replica": 1}]
            assert [await world.place(s) for s in "abc"] == [1, 1, 1]
            assert (pool.version, pool.replicas) == (3, 2)
            assert "replica 0: away" in (await pool.health()).detail
            world.loading = False
            world.starting.set()
            await settle()
            assert world[0].calls == ["load 3"]
            assert await world.place("d") == 1  # it has no weights yet
            world[0].loading.set()
            await settle()
            assert [await world.place(s) for s in "eafg"] == [0, 1, 0, 0]
            assert world[0].calls[:2] == ["load 3", "generate e"]

    run(work())


def test_an_update_does_not_wait_for_a_replica_that_is_started_again_and_none_is_missed() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            world.starting.clear()
            world[0].die()
            await pool.update_weights(ref(1))  # the loss is noticed here, and not waited for
            assert (world[1].version, pool.version) == (1, 1)
            await pool.update_weights(ref(2))
            world.loading = False
            world.starting.set()
            await settle()
            assert world[0].calls == ["load 2"]  # of the superseded one nothing is left
            third = asyncio.create_task(pool.update_weights(ref(3)))
            await settle()
            assert not third.done()  # it is up now: its buffer must stay whole
            world[0].loading.set()
            report = await third
            assert (report.version, report.seconds, report.tokens_recomputed) == (3, 1.5, 20)
            assert world[0].calls == ["load 2", "load 3"]
            assert sorted([await world.place("a"), await world.place("b")]) == [0, 1]
            assert {e.version for e in (world[0], world[1])} == {3}

    run(work())


def test_a_replica_lost_during_an_update_gets_it_before_any_request() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            world[0].loading.clear()
            update = asyncio.create_task(pool.update_weights(ref(1)))
            await settle()
            assert not update.done()
            world.starting.clear()
            world[0].die()
            assert (await update).requests_in_flight == 0
            assert await world.place("a") == 1
            world.starting.set()
            await settle()
            assert await world.place("b") == 0
            assert world[0].calls == ["load 1", "generate b"]

    run(work())


def test_without_a_replica_that_is_up_the_update_waits_for_one() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            world.starting.clear()
            for index in (0, 1):
                world[index].die()
            update = asyncio.create_task(pool.update_weights(ref(1)))
            pending = world.ask("a")
            await settle()
            assert not update.done()
            assert not pending.done()
            assert not (await pool.health()).ok
            with pytest.raises(EngineError, match="met its deadline while no replica of the engine pool served"):
                await world.ask("b", deadline=0.01)
            world.starting.set()
            assert (await update).version == 1
            assert (await pending).versions == (1, 1)

    run(work())


def test_a_replica_that_refuses_what_another_one_took_is_started_again() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            assert [await world.place(s) for s in "ab"] == [0, 1]
            world[0].refuses = {1}
            world[0].generating.clear()
            pending = world.ask("a")
            await settle()
            assert (await pool.update_weights(ref(1))).version == 1
            assert world.named("update_failed")[0]["reason"] == "weights v1 are damaged"
            assert (await pending).ids == (1, 0)
            await settle()
            assert len(world.engines[0]) == 2
            assert world[0].calls == ["load 1"]
            assert await world.place("c") == 0
            assert pool.version == 1

    run(work())


def test_an_update_that_all_refuse_is_at_fault_itself_and_the_next_one_heals() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            await pool.update_weights(ref(1))
            for index in (0, 1):
                world[index].refuses = {2}
            with pytest.raises(EngineError, match="weights v2 are damaged"):
                await pool.update_weights(ref(2))
            assert [len(mine) for mine in world.engines.values()] == [1, 1]
            assert pool.version == 1
            await pool.resize(3)  # whose weights may be overwritten by now: it waits
            await settle()
            assert world[2].calls == []
            assert [await world.place(s) for s in "abc"] == [0, 1, 0]
            await pool.update_weights(ref(3))
            assert world[2].calls == ["load 3"]
            assert await world.place("d") == 2

    run(work())


def test_a_replica_that_cannot_be_started_again_is_dropped_and_the_last_one_fails_the_pool() -> None:
    async def work() -> None:
        world = World(2, max_restarts=1)
        async with world.pool as pool:
            world.broken = {0}
            world[0].generating.clear()
            pending = world.ask("a")
            await settle()
            world[0].die()
            assert (await pending).ids == (1, 0)
            await settle()
            lost = world.named("replica_lost")
            assert [(f["replica"], f["left"]) for f in lost] == [(0, 1)]
            assert "no room for engine 0" in lost[0]["reason"]
            assert pool.replicas == 1
            assert (await pool.update_weights(ref(1))).version == 1
            await pool.resize(1)  # that is what is left
            world.broken = {0, 1}
            world[1].die()
            with pytest.raises(EngineError, match=r"every replica of the engine pool is lost(.|\n)*no room"):
                await world.ask("b")
            with pytest.raises(EngineError, match="every replica"):
                await pool.update_weights(ref(2))
            assert not (await pool.health()).ok

    run(work())


def test_a_request_that_ends_every_replica_it_is_sent_to_is_given_up() -> None:
    async def work() -> None:
        world = World(2, max_restarts=20)

        async def start(index: int) -> Restartable:
            engine = await World.start(world, index)
            assert isinstance(engine, Scripted)
            engine.kills = {"poison"}
            return engine

        world.pool = EnginePool(start, replicas=2, event=world.log, max_restarts=20)
        async with world.pool:
            with pytest.raises(EngineError, match=r"session .poison. .* lost 4 replicas in a row"):
                await world.ask("poison")
            await settle()
            assert sorted([await world.place("a"), await world.place("b")]) == [0, 1]

    run(work())


def test_refusals_deadlines_and_cancellation_are_the_requests_own() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            world[0].generating.clear()
            with pytest.raises(EngineError, match="no completion of a"):
                await world.ask("a", deadline=0.01)
            cancelled = world.ask("a")
            await settle()
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            await settle()
            assert world[0].running == 0
            health = await pool.health()
            assert (health.ok, health.running, health.kv_tokens, health.sampled_tokens) == (True, 0, 14, 10)
            assert [k for k, _ in world.events] == ["replica_added"] * 2

    run(work())


def test_a_replica_that_ends_while_nobody_asks_is_started_again() -> None:
    async def work() -> None:
        world = World(2, health_interval=0.01)
        async with world.pool:
            world[0].die()
            while not world.named("engine_restarted"):  # noqa: ASYNC110  the watcher's clock
                await asyncio.sleep(0.002)
            assert len(world.engines[0]) == 2
            assert world.named("engine_lost")[0]["pending"] == 0
            await settle()
            assert [await world.place(s) for s in "ab"] == [0, 1]

    run(work())
