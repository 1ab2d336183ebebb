"""When a stop counts: before, during and together with the work it ends."""

from __future__ import annotations

import asyncio
import signal

import pytest

from areal_agents.utils.signals import Stop, StopRequested


def test_after_a_stop_nothing_begins() -> None:
    """Not even work that would be done at once: a batch that is ready would cost one more step."""
    begun: list[str] = []

    async def work() -> None:
        begun.append("work")

    async def main() -> None:
        stop = Stop()
        await stop.race(work())
        stop.request(signal.SIGTERM)
        with pytest.raises(StopRequested):
            await stop.race(work())

    asyncio.run(main())
    assert begun == ["work"]


def test_a_stop_cancels_what_waits_and_sees_its_end() -> None:
    ended: list[str] = []

    async def main() -> None:
        stop = Stop()

        async def work() -> None:
            try:
                stop.request(signal.SIGINT)
                await asyncio.Event().wait()
            finally:
                ended.append("work")

        with pytest.raises(StopRequested):
            await stop.race(work())

    asyncio.run(main())
    assert ended == ["work"]


def test_a_result_that_comes_together_with_the_stop_is_kept() -> None:
    async def main() -> str:
        stop = Stop()

        async def work() -> str:
            stop.request(signal.SIGINT)
            return "done"

        return await stop.race(work())

    assert asyncio.run(main()) == "done"
