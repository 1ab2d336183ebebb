"""Who held the event loop for how long, on a clock that the calls themselves move on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents.utils.blocking import BlockingWatch, timed


class Clock:
    now = 0.0

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("areal_agents.utils.blocking.time.perf_counter", lambda: clock.now)
    return clock


def test_the_longest_but_one(clock: Clock) -> None:
    with BlockingWatch() as watch:
        for seconds in (9.0, 1.0, 2.0, 0.5):
            timed("slow", clock.spend, seconds)
        timed("once", clock.spend, 7.0)
    timed("slow", clock.spend, 50.0)  # nobody looks on any more
    assert watch.longest() == {"slow": 2.0}


def test_what_runs_inside_another_is_its_own(clock: Clock) -> None:
    def outer(seconds: float) -> None:
        clock.spend(1.0)
        timed("inner", clock.spend, seconds)
        clock.spend(2.0)

    with BlockingWatch() as watch:
        for _ in range(2):
            timed("outer", outer, 10.0)
    assert watch.longest() == {"inner": 10.0, "outer": 3.0}


def test_a_coroutine_is_timed_between_its_awaits(clock: Clock) -> None:
    async def slow(seconds: float) -> str:
        clock.spend(1.0)
        await asyncio.sleep(0)
        clock.spend(seconds)
        await timed("inner", inner, 4.0)
        return "done"

    async def inner(seconds: float) -> None:
        clock.spend(seconds)
        await asyncio.sleep(0)
        clock.spend(0.5)

    async def main() -> BlockingWatch:
        with BlockingWatch() as watch:
            assert [await asyncio.create_task(run()) for _ in range(2)] == ["done"] * 2
        return watch

    async def run() -> Any:
        return await timed("slow", slow, 3.0)

    assert asyncio.run(main()).longest() == {"slow": 3.0, "inner": 4.0}


def test_errors_and_cancellations_pass(clock: Clock) -> None:
    seen: list[str] = []

    async def waits(what: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(what)
            raise

    async def fails(what: str) -> None:
        await asyncio.sleep(0)
        raise KeyError(what)

    async def main() -> None:
        with BlockingWatch():

            async def run(function: Any) -> None:
                await timed("x", function, "a")

            waiting = asyncio.create_task(run(waits))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(KeyError, match="a"):
                await run(fails)
            with pytest.raises(ZeroDivisionError):
                timed("y", lambda x: 1 // x, 0)

    asyncio.run(main())
    assert seen == ["a"]
