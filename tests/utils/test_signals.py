"""When a stop counts: before, during and together with the work it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import pty
import signal
import subprocess
import sys

import pytest

from areal_agents.utils.signals import Stop, StopRequested, stop_on_signals


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


def test_what_still_runs_some_time_after_a_stop_is_cancelled_however_often_it_takes() -> None:
    cancelled: list[int] = []

    async def main() -> None:
        stop = Stop()

        async def stubborn() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(1)
            await asyncio.Event().wait()

        async def short() -> str:
            return "done"

        tasks = {"a": asyncio.create_task(stubborn()), "b": asyncio.create_task(short())}
        with stop.cancelling(tasks, seconds=0.0):
            assert await tasks["b"] == "done"
            stop.request(signal.SIGINT)
            await asyncio.wait(tasks.values())
        assert tasks["a"].cancelled()

    asyncio.run(main())
    assert cancelled == [1]


def test_a_failure_together_with_the_stop_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        stop = Stop()

        async def fails() -> None:
            raise RuntimeError("gone")

        racing = asyncio.create_task(stop.race(fails()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it has failed, and its caller has not looked yet
        racing.cancel()
        await asyncio.wait({racing})

    asyncio.run(main())
    gc.collect()
    assert not caplog.records


STUCK = """
import asyncio, os, signal, sys, time
from areal_agents.utils import signals
signals._LAST_RESORT_SECONDS = 0.2

async def main():
    with signals.stop_on_signals(lambda text: None) as stop:
        stop.farewell = lambda: f"stopped by {stop.name}; step 3 of 9 is saved"
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0)
        while True:  # as a learner's thread, which cannot be stopped inside a step
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

asyncio.run(main())
"""


def test_what_does_not_end_by_itself_still_says_how_to_go_on_and_gives_the_cursor_back() -> None:
    ours, its = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", STUCK], stdout=its, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (130, "stopped by SIGINT; step 3 of 9 is saved\n")
        assert b"\x1b[?25h" in os.read(ours, 100)
    finally:
        os.close(ours)
        os.close(its)


@pytest.mark.parametrize(
    ("racing", "at_once", "said"),
    [
        (False, False, "SIGINT: finishing the step. Once more stops at once"),
        (True, False, "SIGINT: saving what is done. Once more stops at once"),
        (True, True, "SIGINT: stopping"),
    ],
)
def test_a_step_is_finished_only_where_there_is_one(racing: bool, at_once: bool, said: str) -> None:
    """An evaluation and a wait for a batch end at once, and no line promises that something is finished."""
    told: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.5 if not racing else 60)

    async def main() -> None:
        with stop_on_signals(told.append, doing="finishing the step") as stop:
            stop.at_once = at_once
            with contextlib.suppress(StopRequested, asyncio.CancelledError):
                await (stop.race(work()) if racing else work())

    asyncio.run(main())
    assert told == [said]
