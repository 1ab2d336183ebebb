"""``EnginePool`` grows, shrinks, starts and ends in the middle of everything, around scripted engines."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

from areal_agents.engine import Sampling
from areal_agents.errors import ConfigError, EngineError
from areal_agents.types import Prompt
from tests.pool_world import World, ref, run, settle


def test_growth_serves_only_with_current_weights_while_requests_and_updates_go_on() -> None:
    async def work() -> None:
        world = World(1)
        async with world.pool as pool:
            await pool.update_weights(ref(1))
            assert [await world.place(s) for s in "ab"] == [0, 0]
            world.starting.clear()
            grown = asyncio.create_task(pool.resize(3))
            await settle()
            await pool.update_weights(ref(2))  # a replica that starts holds nothing up
            world.loading = False
            world.starting.set()
            await settle()
            assert world[1].calls == ["load 2"]
            update = asyncio.create_task(pool.update_weights(ref(3)))
            await settle()
            assert world[0].calls[-1] != "load 3"  # the buffer of v2 must stay whole
            assert await world.place("c") == 0
            world[1].loading.set()
            world[2].loading.set()
            await grown
            await update
            assert [world[i].version for i in range(3)] == [3, 3, 3]
            assert sorted([await world.place("d"), await world.place("e")]) == [1, 2]
            world.loading, world.broken = True, {3}
            with pytest.raises(EngineError, match="no room for engine 3"):
                await pool.resize(5)
            assert pool.replicas == 4  # number 4 started
            assert await world.place("f") == 4

    run(work())


def test_a_new_replica_that_refuses_what_others_serve_is_an_error_and_goes() -> None:
    """Waiting for the next update would not help: it is this replica that cannot read them."""

    async def work() -> None:
        world = World(1)
        async with world.pool as pool:
            await pool.update_weights(ref(1))
            world.refused = {1}
            with pytest.raises(EngineError, match="weights v1 are damaged"):
                await pool.resize(2)
            assert pool.replicas == 1
            assert world[1].failure
            assert [fields["replica"] for fields in world.named("replica_added")] == [0]
            assert await world.place("a") == 0
            assert (await pool.update_weights(ref(2))).version == 2

    run(work())


def test_shrinkage_drains_and_its_sessions_move_at_their_next_turn() -> None:
    async def work() -> None:
        world = World(3)
        async with world.pool as pool:
            assert [await world.place(s) for s in "abcd"] == [0, 1, 2, 0]
            world[2].generating.clear()
            pending = world.ask("c")
            await settle()
            shrunk = asyncio.create_task(pool.resize(1))
            await settle()
            assert world[1].failure
            assert not world[2].failure
            await pool.update_weights(ref(1))  # also where a replica drains
            assert world[2].version == 1
            assert [await world.place(s) for s in "bd"] == [0, 0]
            shrunk.cancel()
            with pytest.raises(asyncio.CancelledError):
                await shrunk
            world[2].generating.set()
            assert (await pending).ids == (2, 0)  # it was not cut short
            await settle()
            assert world[2].failure
            assert await world.place("c") == 0
            assert sorted(f["replica"] for f in world.named("replica_removed")) == [1, 2]
            assert world.named("engine_lost") == world.named("replica_lost") == []
            await pool.resize(2)
            assert len(world.engines[1]) == 2  # the lowest free number
            for wrong in (0, -1):
                with pytest.raises(ConfigError, match="at least 1 replica"):
                    await pool.resize(wrong)

    run(work())


def test_replicas_that_are_removed_during_an_update_neither_fail_nor_hold_it() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            for index in (0, 1):
                world[index].loading.clear()
            update = asyncio.create_task(pool.update_weights(ref(1)))
            await settle()
            await pool.resize(1)  # nothing runs there: it ends at once
            assert not update.done()
            world[0].loading.set()
            assert ((await update).seconds, pool.version) == (0.5, 1)
            # Nobody is left to answer.
            world[0].loading.clear()
            update = asyncio.create_task(pool.update_weights(ref(2)))
            await settle()
        with pytest.raises(EngineError, match="the engine pool was closed"):
            await update

    run(work())


def test_a_replica_whose_growth_is_given_up_is_not_routed_to_though_an_update_let_it_serve() -> None:
    async def work() -> None:
        world = World(2)
        async with world.pool as pool:
            await pool.update_weights(ref(1))
            world[0].loading.clear()
            update = asyncio.create_task(pool.update_weights(ref(2)))
            await settle()
            world.starting.clear()
            grown = asyncio.create_task(pool.resize(3))
            world.starting.set()
            await settle()  # it waits for the update's end
            new = next(r for r in pool._replicas if r.index == 2)
            pool._replicas.serve(new)  # as an update does that was sent to it
            assert [await world.place(s) for s in "abc"] == [0, 1, 2]
            world[2].generating.clear()
            pending = world.ask("c")
            await settle()
            grown.cancel()
            with pytest.raises(asyncio.CancelledError):
                await grown
            assert (await pending).ids[0] in (0, 1)
            assert world[2].failure
            assert sorted([await world.place(s) for s in "cdef"])[-1] == 1
            assert [f["replica"] for f in world.named("replica_removed")] == [2]
            world[0].loading.set()
            assert (await update).version == 2

    run(work())


def test_a_drain_has_a_deadline_and_a_drained_replica_that_dies_loses_no_request() -> None:
    async def work() -> None:
        world = World(2, drain_seconds=0.02)
        async with world.pool as pool:
            assert [await world.place(s) for s in "ab"] == [0, 1]
            world[1].generating.clear()
            pending = world.ask("b")
            await settle()
            await pool.resize(1)
            assert (await pending).ids == (0, 0)
            await pool.resize(2)
            assert await world.place("c") == 1
            world[1].generating.clear()
            pending = world.ask("c")
            await settle()
            shrunk = asyncio.create_task(pool.resize(1))
            await settle()
            world[1].die()
            assert (await pending).ids == (0, 0)
            await shrunk

    run(work())


def test_what_cannot_start_leaves_nothing_behind() -> None:
    async def work() -> None:
        world = World(3)
        world.broken = {1}
        with pytest.raises(EngineError, match="no room for engine 1"):
            await world.pool.__aenter__()
        assert sorted(world.engines) == [0, 2]
        assert all(engine.failure for engine in world.all())
        world = World(2)
        world.starting.clear()
        entering = asyncio.create_task(world.pool.__aenter__())
        await settle()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert world.engines == {}

    run(work())


def test_closing_in_the_middle_of_everything_ends_it() -> None:
    async def work() -> None:
        world = World(3)
        async with world.pool as pool:
            for index in range(3):
                world[index].generating.clear()
            world[1].loading.clear()
            tasks: list[asyncio.Task[Any]] = [world.ask(s) for s in "abc"]
            await settle()
            world.starting.clear()
            world[0].die()
            tasks += [asyncio.create_task(work) for work in (pool.update_weights(ref(1)), pool.resize(5))]
            await settle()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(e) for e in ended] == [EngineError] * 5
        assert all(engine.failure for engine in world.all())
        assert world.named("replica_lost") == []

    run(work())


@pytest.mark.parametrize("seed", range(6))
def test_no_interleaving_loses_a_request_or_serves_a_stale_version(seed: int) -> None:
    """Random losses, updates and sizes under load: each completion is of a version that was current while it ran."""

    async def work() -> None:
        rng, world = random.Random(seed), World(3, max_restarts=1000)
        done: list[str] = []
        published = 0
        async with world.pool as pool:

            async def client(i: int) -> None:
                for turn in range(12):
                    before = pool.version
                    completion = await pool.generate(Prompt((1,)), Sampling(1), session=f"s{i}", deadline=15)
                    assert before <= completion.versions[0] <= published
                    done.append(f"{i}/{turn}")
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)

            clients = [asyncio.create_task(client(i)) for i in range(10)]
            for _ in range(60):
                match rng.randrange(4):
                    case 0 | 1:
                        with contextlib.suppress(IndexError):
                            rng.choice(world.all()).die()
                    case 2:
                        published += 1
                        assert (await pool.update_weights(ref(published))).version == published
                    case _:
                        await pool.resize(rng.randrange(1, 5))
                for _ in range(rng.randrange(5)):
                    await asyncio.sleep(0)
            await asyncio.gather(*clients)
            assert len(done) == len(set(done)) == 120
            await pool.update_weights(ref(published + 1))

    run(work())
