"""What ``sandboxes.py`` calls: programs in sessions, in sessions of their own, in plain processes, by a bare exec."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from areal_agents.sandbox import Sandbox, SandboxBackend, SandboxSpec

CODES = {
    "trivial": "print(1)",
    "numeric": "import numpy, sympy; print(sympy.Integer(2) ** 10 + int(numpy.ones(3).sum()))",
}
ANSWERS = {"trivial": b"1\n", "numeric": b"1027\n"}
SPEC = SandboxSpec(memory=1 << 30, disk=32 << 20)
MOST_LOST = 20
"""Calls of a bare exec without an answer, which are made again within their time, before it is a failure."""
Call = Callable[[], Awaitable[None]]


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


async def measure(call: Call, concurrency: int, seconds: float) -> dict[str, Any]:
    """Make calls, ``concurrency`` at a time, for so many seconds, and one of each at least."""
    took: list[float] = []
    begun, start = 0, time.perf_counter()

    async def worker() -> None:
        nonlocal begun
        while begun < concurrency or time.perf_counter() - start < seconds:
            begun += 1
            one = time.perf_counter()
            await call()
            took.append((time.perf_counter() - one) * 1000)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    wall = time.perf_counter() - start
    shares = {f"p{share}_ms": round(percentile(took, share / 100), 2) for share in (50, 95, 99)}
    raw = " ".join(f"{ms:.2f}" for ms in took)
    return {"n": len(took), "calls_per_second": round(len(took) / wall, 1), **shares, "ms": raw}


def check(stdout: bytes, code: str, told: object) -> None:
    if stdout != ANSWERS[code]:
        raise RuntimeError(f"a call did not answer: {told!r:.400}")


async def call_in(sandbox: Sandbox, code: str) -> None:
    result = await sandbox.exec(["python3", "-I", "-c", CODES[code]], timeout=120)
    check(result.stdout, code, result)


@contextlib.asynccontextmanager
async def plain(python: str, code: str, concurrency: int) -> AsyncIterator[Call]:
    """Calls that are plain processes of an interpreter.

    Each has a session of its own, as a sandbox's process has: Linux gives each session the same share of the processors
    (autogroups), and on a busy machine all calls of one session together would have as much as one call of a sandbox.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    async def call() -> None:
        process = await asyncio.create_subprocess_exec(python, "-I", "-c", CODES[code], start_new_session=True, **pipes)
        out, error = await process.communicate()
        check(out, code, error)

    yield call


@contextlib.asynccontextmanager
async def in_sessions(backend: SandboxBackend, code: str, concurrency: int) -> AsyncIterator[Call]:
    """Calls in sessions that are open: as many as calls at one time."""
    async with contextlib.AsyncExitStack() as stack:
        free: list[Sandbox] = [await stack.enter_async_context(backend.session(SPEC)) for _ in range(concurrency)]
        await asyncio.gather(*(call_in(sandbox, "trivial") for sandbox in free))

        async def call() -> None:
            sandbox = free.pop()
            await call_in(sandbox, code)
            free.append(sandbox)

        yield call


@contextlib.asynccontextmanager
async def session_each(backend: SandboxBackend, code: str, concurrency: int) -> AsyncIterator[Call]:
    """Calls with a session of its own for each, when the backend has had one: a zygote has imported what it imports."""
    async with backend.session(SPEC) as sandbox:
        await call_in(sandbox, "trivial")

    async def call() -> None:
        async with backend.session(SPEC) as sandbox:
            await call_in(sandbox, code)

    yield call


@contextlib.asynccontextmanager
async def bare_exec(image: str, code: str, concurrency: int) -> AsyncIterator[Call]:
    """Calls that are an ``exec`` of the engine in a running container, by its SDK, a thread a call.

    The container is a plain one without a network. The SDK is faster than ``docker exec``, which starts a process more.
    """
    import docker

    client = docker.from_env(max_pool_size=concurrency + 4)
    container = client.containers.run(image, ["sleep", "infinity"], network_mode="none", init=False, detach=True)

    lost = 0

    def one() -> None:
        nonlocal lost
        api, out, error = client.api, None, None
        while out is None and error is None:
            made = api.exec_create(container.id, ["python3", "-I", "-c", CODES[code]], stdout=True, stderr=True)
            out, error = api.exec_start(made["Id"], demux=True)
            lost += out is None and error is None  # a busy engine (20.10) loses what an exec printed now and then
            if lost > MOST_LOST:
                raise RuntimeError(f"the engine lost the output of {lost} calls")
        check(out or b"", code, error)

    try:
        async with _Threads(concurrency) as threads:
            await threads.call(one)

            async def call() -> None:
                await threads.call(one)

            yield call
    finally:
        container.remove(force=True, v=True)
        client.close()


class _Threads:
    """As many threads as calls at one time: the loop's own pool has too few."""

    def __init__(self, size: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._pool = ThreadPoolExecutor(size)

    async def __aenter__(self) -> _Threads:
        return self

    async def __aexit__(self, *failure: object) -> None:
        self._pool.shutdown()

    async def call(self, function: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, function)
