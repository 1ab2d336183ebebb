"""The pool of started sandboxes: what is kept, what is handed out, and that nothing is left of callers that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes.warm_pool import WarmPool

SPECS = [SandboxSpec(processes=number) for number in (8, 9, 10)]


class Started:
    """A sandbox that takes as long to start and to end as its factory lets it."""

    def __init__(self, factory: Factory, spec: SandboxSpec) -> None:
        self._factory, self.spec, self.alive = factory, spec, True

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.alive = False
        self._factory.living.discard(self)


class Factory:
    def __init__(self) -> None:
        self.living: set[Started] = set()
        self.made: list[Started] = []
        self.begun = 0
        self.failures: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()

    async def start(self, spec: SandboxSpec) -> Started:
        self.begun += 1
        await self.open.wait()
        if self.failures:
            raise self.failures.pop()
        started = Started(self, spec)
        self.living.add(started)
        self.made.append(started)
        return started


async def settle() -> None:
    """Let everything go on that waits for nothing: no start here takes as many turns of the loop."""
    for _ in range(50):
        await asyncio.sleep(0)


def play(scene: Callable[[WarmPool[Started], Factory], Awaitable[None]], size: int = 2) -> None:
    async def whole() -> None:
        factory = Factory()
        pool = WarmPool(size, factory.start)
        await asyncio.wait_for(scene(pool, factory), 30)
        await asyncio.wait_for(pool.aclose(), 30)
        await pool.aclose()
        with pytest.raises(SandboxError, match="closed"):
            await pool.take(SPECS[0])

    asyncio.run(whole())


def test_what_is_taken_is_started_ahead_and_never_handed_out_twice() -> None:
    async def scene(pool: WarmPool[Started], factory: Factory) -> None:
        taken = [await pool.take(SPECS[0]) for _ in range(5)]
        assert len(set(taken)) == 5
        await settle()
        assert factory.begun == 7  # two are kept beside the five
        await pool.aclose()
        assert factory.living == set(taken)  # those that were taken are their callers' to close

    play(scene)


def test_the_last_two_specs_are_kept_and_an_older_one_is_ended() -> None:
    async def scene(pool: WarmPool[Started], factory: Factory) -> None:
        for spec in (*SPECS[:2], SPECS[0], SPECS[2]):  # the second is the one used longest ago
            await (await pool.take(spec)).close()
        await settle()
        assert factory.begun == 10  # 3 specs with two kept and one taken; one more taken of the first, and replaced
        kept = sorted(kept.spec.processes for kept in factory.living)
        assert kept == [8, 8, 10, 10]
        await pool.aclose()
        assert not factory.living

    play(scene)


def test_a_dead_one_is_not_handed_out() -> None:
    async def scene(pool: WarmPool[Started], factory: Factory) -> None:
        first = await pool.take(SPECS[0])
        await settle()
        for kept in factory.made:
            kept.alive = kept is first
        assert (await pool.take(SPECS[0])).alive
        assert factory.begun >= 4

    play(scene)


@pytest.mark.parametrize("warm", [False, True], ids=["while it is made for it", "while a kept one is made"])
def test_what_was_started_for_a_caller_that_went_away_is_ended(warm: bool) -> None:
    async def scene(pool: WarmPool[Started], factory: Factory) -> None:
        first = await pool.take(SPECS[0]) if warm else None
        factory.open.clear()
        if first is not None:
            await first.close()
        call = asyncio.ensure_future(pool.take(SPECS[0]))
        await settle()
        assert factory.begun == (2 if warm else 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        closing = asyncio.ensure_future(pool.aclose())
        await settle()
        assert not closing.done()  # it waits for what is still being made
        factory.open.set()
        await closing
        assert not factory.living
        assert len(factory.made) == factory.begun

    play(scene, size=1)


def test_a_failure_is_the_callers_and_the_next_one_starts_anew() -> None:
    async def scene(pool: WarmPool[Started], factory: Factory) -> None:
        factory.failures = [SandboxUnavailable("x", "not there", "make it")]
        with pytest.raises(SandboxUnavailable):
            await pool.take(SPECS[0])
        first = await pool.take(SPECS[0])
        factory.failures = [SandboxError("of the one that is kept")]
        await settle()
        assert factory.failures == []
        assert (await pool.take(SPECS[0])).alive
        assert first.alive
        factory.failures = [SandboxError("the caller's own"), SandboxError("of the one that is kept")]
        await settle()
        with pytest.raises(SandboxError, match="the caller's own"):
            await pool.take(SPECS[0])

    play(scene, size=1)
