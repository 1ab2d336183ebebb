"""Calls of a sandbox: how many a second, how long each takes, and what is left behind.

    python benchmarks/sandboxes.py [--json benchmarks/results/sandboxes.json]    # about 15 minutes
    python benchmarks/sandboxes.py --quick                                       # half a minute

A call is ``python3 -I -c CODE``. ``trivial`` prints, ``numeric`` imports numpy and sympy and uses both. Each is
measured in sessions that are open (``in a session``) and with a session of its own for each call (``a session each``),
at several concurrencies: plain subprocesses, bubblewrap as it is, bubblewrap from a zygote that has both imported, and
docker where it is named. The order is turned around from round to round, so that a busy machine slows all sides alike.
The environment with numpy and sympy is ``bubblewrap?packages=numpy,sympy``, which the first run builds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from measure import Progress, paired_ratio, table
from record import ROOT, Check, write

sys.path.insert(0, str(ROOT))
from areal_agents import sandboxes
from areal_agents.sandbox import Sandbox, SandboxBackend, SandboxSpec
from areal_agents.sandboxes.packages import ensure, requirements

PACKAGES = "numpy,sympy"
CODES = {
    "trivial": "print(1)",
    "numeric": "import numpy, sympy; print(sympy.Integer(2) ** 10 + int(numpy.ones(3).sum()))",
}
ANSWERS = {"trivial": b"1\n", "numeric": b"1027\n"}
SPEC = SandboxSpec(memory=1 << 30, disk=32 << 20)
Call = Callable[[], Awaitable[None]]


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


async def measure(call: Call, concurrency: int, count: int) -> dict[str, Any]:
    """Make ``count`` calls, ``concurrency`` at a time."""
    seconds: list[float] = []
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            start = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    wall = time.perf_counter() - start
    shares = {f"p{share}_ms": round(percentile(seconds, share / 100) * 1000, 2) for share in (50, 95, 99)}
    return {"calls_per_second": round(count / wall, 1), **shares, "seconds": [round(s, 5) for s in seconds]}


def check(stdout: bytes, code: str, told: object) -> None:
    if stdout != ANSWERS[code]:
        raise RuntimeError(f"a call did not answer: {told!r:.400}")


@contextlib.asynccontextmanager
async def plain(python: str, code: str, concurrency: int) -> AsyncIterator[Call]:
    async def call() -> None:
        process = await asyncio.create_subprocess_exec(
            python, "-I", "-c", CODES[code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, error = await process.communicate()
        check(out, code, error)

    yield call


@contextlib.asynccontextmanager
async def in_sessions(backend: SandboxBackend, code: str, concurrency: int) -> AsyncIterator[Call]:
    """Calls in sessions that are open: as many as calls at one time."""
    async with contextlib.AsyncExitStack() as stack:
        free: list[Sandbox] = [await stack.enter_async_context(backend.session(SPEC)) for _ in range(concurrency)]
        for sandbox in free:
            await sandbox.exec(["python3", "-I", "-c", "print(1)"], timeout=60)

        async def call() -> None:
            sandbox = free.pop()
            result = await sandbox.exec(["python3", "-I", "-c", CODES[code]], timeout=120)
            check(result.stdout, code, result)
            free.append(sandbox)

        yield call


@contextlib.asynccontextmanager
async def session_each(backend: SandboxBackend, code: str, concurrency: int) -> AsyncIterator[Call]:
    async def call() -> None:
        async with backend.session(SPEC) as sandbox:
            result = await sandbox.exec(["python3", "-I", "-c", CODES[code]], timeout=120)
        check(result.stdout, code, result)

    yield call


def left_behind() -> dict[str, int]:
    """Count what a sandbox could leave on this host."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    own = os.getpid()
    children = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            children += int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == own
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "processes": children,
        "descriptors": len(os.listdir("/proc/self/fd")),
        # A Docker engine on this machine makes and removes mounts of its own meanwhile.
        "mounts": sum("docker" not in line for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": len(list(Path("/sys/fs/cgroup").glob(f"**/areal-agents-*u{own}-*"))),
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


async def leak_check(name: str, calls: int) -> dict[str, Any]:
    """Make calls with a session each, and count what is left before and after them."""

    async def play(count: int) -> None:
        backend = sandboxes.get(name)
        try:
            async with session_each(backend, "trivial", 8) as call:
                await measure(call, 8, count)
        finally:
            await backend.aclose()

    await play(16)
    before = left_behind()
    await play(calls)
    return {"calls": calls, "before": before, "after": left_behind()}


async def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure every side. Returns the rows, with raw seconds, and what the leak checks saw."""
    folder = await asyncio.to_thread(ensure, requirements(PACKAGES))
    cold, warm = f"bubblewrap?packages={PACKAGES}", f"bubblewrap?packages={PACKAGES}&preload={PACKAGES}"
    names = {"bubblewrap": cold, "zygote": warm, **({"docker": args.docker} if args.docker else {})}
    backends = {side: sandboxes.get(name) for side, name in names.items()}
    work: list[tuple[str, str, str, Callable[[str, int], Any]]] = []
    for code in CODES:
        python = str(folder / "bin" / "python3")
        work.append(("subprocess", "new process", code, lambda code, n, python=python: plain(python, code, n)))
        for side, backend in backends.items():
            if side == "docker" and code == "numeric":
                continue  # its image has neither
            work.append((side, "in a session", code, lambda code, n, b=backend: in_sessions(b, code, n)))
            work.append((side, "a session each", code, lambda code, n, b=backend: session_each(b, code, n)))
    rows: list[dict[str, Any]] = []
    progress = Progress(args.rounds * len(args.concurrency) * len(work) + 1)
    try:
        for backend in backends.values():
            await backend.probe()
        for turn in range(args.rounds):
            for concurrency in args.concurrency:
                for side, way, code, make in work if turn % 2 == 0 else work[::-1]:
                    count = max(concurrency, args.calls // (8 if code == "numeric" and side != "zygote" else 1))
                    async with make(code, concurrency) as call:
                        found = await measure(call, concurrency, count)
                    rows.append({"side": side, "way": way, "code": code, "concurrency": concurrency, **found})
                    progress(f"{side} {way} {code} at {concurrency}: {found['calls_per_second']} a second")
    finally:
        for backend in backends.values():
            await backend.aclose()
    leaks = {side: await leak_check(name, args.leak) for side, name in names.items() if side != "docker"}
    progress("leaks")
    return rows, leaks


def pick(rows: list[dict[str, Any]], side: str, way: str, code: str, at: int, what: str) -> list[float]:
    wanted = (side, way, code, at)
    return [r[what] for r in rows if (r["side"], r["way"], r["code"], r["concurrency"]) == wanted]


def checks(rows: list[dict[str, Any]], leaks: dict[str, Any], concurrencies: list[int]) -> list[Check]:
    """Compare with the goals."""
    found = []
    for at in concurrencies:
        ours = pick(rows, "zygote", "in a session", "trivial", at, "calls_per_second")
        theirs = pick(rows, "subprocess", "new process", "trivial", at, "calls_per_second")
        ratio = paired_ratio(ours, theirs)
        found.append(Check(f"zygote/subprocess calls, trivial, at {at}", ratio, ">= 1", ratio >= 1))
    p50 = min(pick(rows, "zygote", "in a session", "numeric", concurrencies[0], "p50_ms"))
    found.append(Check("zygote p50 ms with numpy and sympy, best round", p50, "<= 20", p50 <= 20))
    for side, seen in leaks.items():
        grown = {name: seen["after"][name] - seen["before"][name] for name in seen["before"]}
        kept = all(value <= (16 if name == "memory_mib" else 0) for name, value in grown.items())
        goal = "no more of any, and at most 16 MiB"
        found.append(Check(f"{side}: left after {seen['calls']} calls", grown, goal, kept))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls, two concurrencies, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--calls", type=int, default=400, help="for each measurement (default: 400)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (default: 3)")
    parser.add_argument("--leak", type=int, default=10_000, help="calls of the leak check (default: 10000)")
    parser.add_argument("--docker", default="", help="a docker backend to measure too, as docker?image=…")
    args = parser.parse_args()
    args.concurrency = [1, 8] if args.quick else [1, 2, 8, 32]
    if args.quick:
        args.calls, args.rounds, args.leak = 24, 1, 64
    rows, leaks = asyncio.run(run(args))
    print(table([{name: value for name, value in row.items() if name != "seconds"} for row in rows]))
    write(args.json, "sandboxes", rows, checks(rows, leaks, args.concurrency), leaks=leaks)


if __name__ == "__main__":
    main()
