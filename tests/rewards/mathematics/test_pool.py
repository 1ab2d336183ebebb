"""The verifier's processes: a deadline ends them, a loss costs nothing, and nothing is left behind."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Verdict, judge
from areal_agents.rewards import boxed_math
from areal_agents.rewards.mathematics.extract import Slot
from areal_agents.rewards.mathematics.fork_server import ForkServer
from areal_agents.rewards.mathematics.pool import MathPool
from tests.processes import wait_gone
from tests.rewards.mathematics.hostile import HOSTILE
from tests.rewards.mathematics.test_reward import episode

SLOW = "+".join(rf"\sqrt{{{n}+\sqrt{{{n + 1}+\pi^{{{n}}}}}}}" for n in range(2, 120))
"""Takes longer than the deadline that the tests set."""


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    pool = MathPool(2, deadline=30.0)
    yield pool
    pool.close()


def pids(pool: MathPool) -> list[int]:
    workers = [pool._idle.get() for _ in range(pool.workers)]
    for worker in workers:
        pool._idle.put(worker)
    return [w.pid for w in workers if w.pid is not None]


def test_answers_at_once_come_back_in_order(pool: MathPool) -> None:
    async def work() -> None:
        found = await asyncio.gather(*(pool.verify(str(i), f"{i % 3}") for i in range(30)))
        assert [v.score for v in found] == [1, 1, 1] + [0] * 27

    asyncio.run(work())


KNOWN = {"wrong", "parse_error", "no_answer", "timeout"}


@pytest.mark.parametrize("slot", ["answer", "boxed"])
def test_a_hostile_set_is_never_right_keeps_its_deadline_runs_nothing_and_leaves_nothing(
    tmp_path: Path, slot: Slot
) -> None:
    mark = tmp_path / "mark"
    texts = [text.replace("{MARK}", str(mark)) for text in HOSTILE]
    asked = [rf"so \boxed{{{text}}}" if slot == "boxed" else text for text in texts]

    async def work() -> None:
        pool = MathPool(2, deadline=5.0)
        try:
            await asyncio.gather(*(pool.verify("5", str(i)) for i in range(10)))
            before = set(pids(pool))
            found = await asyncio.gather(*(pool.verify("5", text, slot=slot) for text in asked))
            for text, verdict in zip(asked, found, strict=True):
                assert verdict.status in KNOWN, (text[:80], verdict)
            late = sum(verdict.status == "timeout" for verdict in found)
            assert pool.replaced == late <= 4  # killed at its deadline, and nothing else was
            after = set(pids(pool))
            for pid in after:
                process = psutil.Process(pid)
                assert process.memory_info().rss < 600 << 20
                assert process.children() == []
            assert not wait_gone(sorted(before - after), 60)
        finally:
            pool.close()
        assert not wait_gone(sorted(after), 60)

    asyncio.run(work())
    assert not mark.exists()


def test_a_slow_answer_is_ended_and_the_next_one_is_verified() -> None:
    async def work() -> None:
        pool = MathPool(1, deadline=0.05)
        try:
            pool.deadline = 60.0
            assert (await pool.verify("1", "1")).status == "ok"
            before = pids(pool)
            pool.deadline = 0.05
            late = await pool.verify(f"{SLOW}+1", SLOW)
            assert (late.status, late.detail) == ("timeout", "not verified within 0.05 s")
            pool.deadline = 60.0
            assert (await pool.verify("2", "2")).status == "ok"
            assert not wait_gone(before, 60)
            assert pool.replaced == 1
        finally:
            pool.close()

    asyncio.run(work())


def server(pool: MathPool) -> int:
    assert pool._server._process is not None
    return pool._server._process.pid


def test_a_worker_in_place_of_one_that_was_ended_is_forked_and_imports_nothing() -> None:
    async def work() -> None:
        pool = MathPool(2, deadline=60.0)
        try:
            await asyncio.gather(*(pool.verify(str(i), f"{i}.0") for i in range(4)))
            forks, before = server(pool), pids(pool)
            pool.deadline = 0.05
            late = await asyncio.gather(*(pool.verify(f"{SLOW}+{i}", SLOW) for i in (1, 2)))
            assert [v.status for v in late] == ["timeout", "timeout"]
            pool.deadline = 60.0
            assert (await pool.verify("2", "2")).status == "ok"
            assert server(pool) == forks
            assert {child.pid for child in psutil.Process(forks).children()} == set(pids(pool)) - set(before)
        finally:
            pool.close()
        assert not wait_gone([forks], 60)

    asyncio.run(work())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_server_that_is_lost_costs_nothing(kill: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.rewards.mathematics.fork_server._REPLY_SECONDS", 1.0)

    async def work() -> None:
        pool = MathPool(1, deadline=60.0)
        try:
            assert (await pool.verify("1", "1")).status == "ok"
            first, workers = server(pool), pids(pool)
            os.kill(first, kill)
            os.kill(workers[0], signal.SIGKILL)  # so that the server is asked for another
            assert (await pool.verify("x+1", "1+x")).status == "ok"
            assert server(pool) != first
            assert not wait_gone([first, *workers], 60)
        finally:
            pool.close()

    asyncio.run(work())


def test_a_worker_that_is_killed_costs_nothing() -> None:
    async def work() -> None:
        pool = MathPool(1, deadline=60.0)
        try:
            assert (await pool.verify("1", "1")).status == "ok"
            (pid,) = pids(pool)
            os.kill(pid, signal.SIGSTOP)  # it cannot answer before it is killed
            asked = asyncio.create_task(pool.verify("x+1", "1+x"))
            while pool._idle.qsize():  # noqa: ASYNC110  a thread takes it up
                await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            assert (await asked).status == "ok"
            assert pool.replaced == 1
        finally:
            pool.close()

    asyncio.run(work())


def test_an_exception_that_nobody_expected_is_told_as_what_it_is_and_ends_no_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raising = functools.partial(ForkServer, "tests.rewards.mathematics.raising_worker")
    monkeypatch.setattr("areal_agents.rewards.mathematics.pool.ForkServer", raising)

    async def work() -> None:
        pool = MathPool(1, deadline=60.0)
        try:
            assert (await pool.verify("1", "1")).status == "ok"
            before = pids(pool)
            found = await pool.verify("5", "zeta")
            assert (found.status, found.raised) == ("parse_error", "ZeroDivisionError")
            assert found.detail == "the verifier raised ZeroDivisionError: of zeta"
            gold = await pool.look("2 zeta")
            assert (gold.status, gold.raised) == ("gold_error", "ZeroDivisionError")
            assert await judge(boxed_math(pool=pool), episode(r"\boxed{3 zeta}", "5")) == Verdict(
                0.0, {"math(boxed)": 0.0}, status="unverifiable"
            )
            with pytest.raises(TaskError, match="raised ZeroDivisionError"):  # and no 0 for who answered to it
                await judge(boxed_math(pool=pool), episode(r"\boxed{7}", "2 zeta"))
            assert (await pool.verify("2", "2")).status == "ok"
            assert (pids(pool), pool.replaced, pool.raised) == (before, 0, {"ZeroDivisionError": 4})
        finally:
            pool.close()

    asyncio.run(work())


@pytest.mark.parametrize("pred", ["6", "\u00e9" * 60_000 + "5"], ids=["short", "longer than a pipe holds"])
def test_a_worker_that_is_stopped_costs_nothing(pred: str) -> None:
    pool = MathPool(1, deadline=2.0)

    async def scenario() -> None:
        assert (await pool.verify("1", "1")).status == "ok"
        (pid,) = pids(pool)
        os.kill(pid, signal.SIGSTOP)
        found = await asyncio.wait_for(pool.verify("5", pred), 30)
        assert found.status in ("wrong", "parse_error")  # and no timeout, which would be the answer's
        assert pool.replaced == 1

    try:
        asyncio.run(scenario())
    finally:
        pool.close()


def test_answers_that_wait_when_the_pool_is_closed_get_a_verdict() -> None:
    pool = MathPool(1, deadline=30.0, waiting=8)

    async def scenario() -> set[str]:
        assert (await pool.verify("1", "1")).status == "ok"
        asked = [asyncio.ensure_future(pool.verify(f"w+{i}", f"{i}+w")) for i in range(32)]
        await asyncio.sleep(0)  # eight are with the thread now, and the others wait for a place
        await asyncio.to_thread(pool.close)
        return {found.status for found in await asyncio.gather(*asked)}

    assert asyncio.run(scenario()) <= {"ok", "infra_error"}


def test_a_verdict_is_kept_and_a_closed_pool_leaves_nothing() -> None:
    async def work() -> None:
        pool = MathPool(1, deadline=60.0)
        first = await pool.verify("1/2", "0.5")
        left = pids(pool)
        pool.close()
        assert await pool.verify("1/2", "0.5") == first  # no process was asked
        assert (await pool.verify("1/2", "0.25")).status == "infra_error"
        assert not wait_gone(left, 60)

    asyncio.run(work())


def test_no_worker_outlives_its_parent() -> None:
    code = """
import asyncio, os, signal
from areal_agents.rewards.mathematics.extract import Slot
from areal_agents.rewards.mathematics.pool import MathPool
pool = MathPool(1, deadline=60.0)
asyncio.run(pool.verify("1", "1"))
print(pool._idle.get().pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert not wait_gone([int(done.stdout)], 60)


def test_wrong_settings_are_refused(pool: MathPool) -> None:
    with pytest.raises(ConfigError, match="workers = 0"):
        MathPool(0)
    with pytest.raises(ConfigError, match="deadline = 0"):
        MathPool(1, deadline=0)
    with pytest.raises(ConfigError, match="unknown slot 'anywhere'"):
        asyncio.run(pool.verify("1", "1", slot="anywhere"))  # type: ignore[arg-type]
