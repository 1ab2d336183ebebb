"""What must go on to its end although whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from areal_agents.utils.outcomes import to_its_end


class Work:
    """Work that waits until it may end, and that somebody awaits."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.begun, self.may_end, self.done = fails, asyncio.Event(), asyncio.Event(), False

    async def __call__(self) -> int:
        self.begun.set()
        await self.may_end.wait()
        self.done = True
        if self.fails:
            raise ValueError(self.fails)
        return 3

    async def awaited(self) -> asyncio.Task[int]:
        task = asyncio.create_task(to_its_end(self))
        await self.begun.wait()
        return task


async def turns(n: int = 10) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


def test_its_result_or_error_is_the_callers() -> None:
    async def main() -> None:
        work, failing = Work(), Work("no")
        for one in (work, failing):
            one.may_end.set()
        assert await to_its_end(work) == 3
        with pytest.raises(ValueError, match="no"):
            await to_its_end(failing)

    asyncio.run(main())


def test_a_cancelled_caller_waits_for_the_end_and_is_cancelled_then() -> None:
    async def main() -> None:
        work = Work()
        task = await work.awaited()
        task.cancel()
        await turns()
        assert not task.done()
        work.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.done

    asyncio.run(main())


def test_a_second_cancellation_ends_the_wait_and_not_the_work() -> None:
    async def main() -> None:
        work = Work()
        task = await work.awaited()
        task.cancel()
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not work.done
        work.may_end.set()
        await turns()
        assert work.done

    asyncio.run(main())


def test_an_error_that_nobody_waits_for_any_more_is_no_news() -> None:
    told: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, said: told.append(said))
        for cancellations in (1, 2):
            work = Work("late")
            task = await work.awaited()
            for _ in range(cancellations):
                task.cancel()
                await turns()
            work.may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await turns()
            assert work.done
        gc.collect()
        await turns()

    asyncio.run(main())
    assert told == []
