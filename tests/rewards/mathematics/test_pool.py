"""The verifier's processes: a deadline ends them, a loss costs nothing, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from areal_agents.errors import ConfigError
from areal_agents.rewards.mathematics.pool import MathPool
from tests.processes import wait_gone

SLOW = "+".join(rf"\sqrt{{{n}+\sqrt{{{n + 1}+\pi^{{{n}}}}}}}" for n in range(2, 120))
"""Takes longer than the deadline that the tests set."""
HOSTILE = [
    "9^" * 40 + "9", "10^{10^{10}}", "99999!", "5!!!!!!!", "(" * 4000, "{" * 2000 + "}" * 2000, r"\frac{" * 600,
    "1" * 4000, "1+" * 2000, r"\sqrt{" * 40 + "2" + "}" * 40, r"(1+\sqrt2)^{9999}", r"\binom{100000}{50000}",
    "(x+1)^{10^9}", "e^{e^{e^{e^{9}}}}", r"\sin(10^{1000})", "x^{x^{x^{x^x}}}", "__import__('os').system('id')",
    r"\input{/etc/passwd}", r"\def\x{\x\x}\x", "a" * 4000, "$" * 4000, r"\boxed{" * 600 + "}" * 600, "1," * 2000,
    "|x|" * 500, "x^" * 40 + "2", "0.(3)" * 800, r"\gcd(10^{4000},10^{3999})", r"\log(10^{4000}+1)",
    r"\sqrt{10^{4000}+1}", r"\max(" + ",".join(f"x_{i}" for i in range(300)) + ")", r"\lfloor 10^{4000}\pi\rfloor",
    "1e4096*1e4096", r"\sin" * 200 + "x", "2^{2^{17}}", "5\u0000", "٣", "x" * (1 << 20), r"\pm 1" * 30,
]  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    pool = MathPool(2, deadline=30.0)
    yield pool
    pool.close()


def pids(pool: MathPool) -> list[int]:
    workers = [pool._idle.get() for _ in range(pool.workers)]
    for worker in workers:
        pool._idle.put(worker)
    return [w._process.pid for w in workers if w._process is not None]


def test_answers_at_once_come_back_in_order(pool: MathPool) -> None:
    async def work() -> None:
        found = await asyncio.gather(*(pool.verify(str(i), f"{i % 3}") for i in range(30)))
        assert [v.score for v in found] == [1, 1, 1] + [0] * 27

    asyncio.run(work())


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_within_the_deadline(pool: MathPool, text: str) -> None:
    found = asyncio.run(pool.verify("5", text))
    assert found.status in ("wrong", "parse_error", "no_answer"), found
    assert found.elapsed_ms < 1000 * pool.deadline


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
from areal_agents.rewards.mathematics.pool import MathPool
pool = MathPool(1, deadline=60.0)
asyncio.run(pool.verify("1", "1"))
print(pool._idle.get()._process.pid, flush=True)
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
