"""Threads under each way to bound memory, and the gate that lets a program have threads or processes under rlimits."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

import pytest

from areal_agents.sandbox import ExecResult, ProbeReport, Sandbox, SandboxSpec
from areal_agents.sandboxes import bubblewrap, interpreter, launch, memory, probes, process_gate, seccomp
from tests import sandbox_suite as suite
from tests.sandboxes.test_backends import bwrap, need

__all__ = ["bwrap"]
pytestmark = pytest.mark.usefixtures("bwrap")

THREADS_32 = """
import threading
from concurrent.futures import ThreadPoolExecutor
meeting = threading.Barrier(32)
def work(number):
    meeting.wait(60)  # all 32 run at the same time, or nobody passes
    return len(bytearray(100_000))
with ThreadPoolExecutor(32) as pool:
    print(sum(pool.map(work, range(32))))
"""
FORK = """
import os
try:
    pid = os.fork()
except OSError as error:
    print(error.errno)
else:
    if pid == 0:
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""
THREAD = """
import threading
try:
    thread = threading.Thread(target=print, args=("thread",))
    thread.start()
    thread.join()
except RuntimeError as error:
    print(error)
"""
TREE = """
import os, time
made = 0
try:
    while made < 9:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
except OSError:
    print(made)
"""
LIMITS = "import resource\nprint(*(resource.getrlimit(n)[1] for n in (resource.RLIMIT_AS, resource.RLIMIT_NPROC)))\n"
ALONE, SHARED = f"{296 << 20} 65", f"{(296 << 20) // 3} 4"
"""Address space and places of a default session's program, as test_parts works them out."""


class _ScopeWithoutSystemd(memory.ScopeBound):
    """A scope's limits on a machine without a systemd that makes one."""

    def wrap(self, command: list[str], spec: SandboxSpec) -> list[str]:
        return command


def play(
    monkeypatch: pytest.MonkeyPatch, bound: memory.MemoryBound | None, calls: Callable[[Sandbox], Awaitable[None]]
) -> None:
    """Make calls in a default session whose memory is bounded in that way, by default the best one here."""
    if isinstance(bound, _ScopeWithoutSystemd):  # for want of the scope, its memory probe would not hold
        proved = {(os.geteuid(), interpreter.SYSTEM, ()): (ProbeReport("bubblewrap"), bound, False)}
        monkeypatch.setattr(bubblewrap, "_reports", proved)
    elif bound is not None:
        monkeypatch.setattr(bubblewrap, "_reports", {})
        monkeypatch.setattr(memory, "detect", lambda: bound)

    async def main() -> None:
        backend = bubblewrap.BubblewrapBackend(pool=0)
        async with backend.session(SandboxSpec()) as sandbox:
            await calls(sandbox)

    asyncio.run(main())


def text(result: ExecResult) -> str:
    return (result.stdout + result.stderr).decode().strip()


@pytest.mark.parametrize("bound", [None, _ScopeWithoutSystemd(), memory.RlimitBound()], ids=lambda b: b and b.kind)
def test_32_threads_run_at_the_same_time(bound: memory.MemoryBound | None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def calls(sandbox: Sandbox) -> None:
        for _ in range(3):
            assert text(await suite.run(sandbox, THREADS_32)) == "3200000"

    play(monkeypatch, bound, calls)


def gated() -> None:
    need(seccomp.gate(), "x86_64 or aarch64, Linux 5.9 and libseccomp 2.5")


def test_the_first_thread_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    gated()

    async def calls(sandbox: Sandbox) -> None:
        done = await suite.run(sandbox, LIMITS + THREAD + FORK + LIMITS)
        assert text(done).splitlines() == [ALONE, "thread", str(errno.EAGAIN), ALONE]
        # A program that takes the place of one with threads is still alone.
        done = await suite.run(sandbox, THREAD + "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo one; (echo two)'])")
        assert "two" not in text(done)
        assert text(await suite.run(sandbox, FORK)) == "0"  # the next program decides anew

    play(monkeypatch, memory.RlimitBound(), calls)


def test_the_first_fork_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    gated()

    async def calls(sandbox: Sandbox) -> None:
        done = await suite.run(sandbox, LIMITS + FORK + LIMITS + THREAD + FORK)
        assert text(done).splitlines() == [ALONE, "0", SHARED, "thread", "0"]
        assert text(await suite.run(sandbox, TREE)) == "2"
        for _ in range(20):  # a shell takes SIGCHLD while it forks
            assert text(await sandbox.exec(["/bin/sh", "-c", "echo a | cat; echo b"], timeout=60)) == "a\nb"
        # What is too large for a share cannot become one of several, and may still have threads.
        done = await suite.run(sandbox, "block = bytearray(150 << 20)\n" + FORK + THREAD + LIMITS)
        assert text(done).splitlines() == [str(errno.ENOMEM), "thread", ALONE]

    play(monkeypatch, memory.RlimitBound(), calls)


def test_a_program_beside_a_live_one_has_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    gated()

    async def calls(sandbox: Sandbox) -> None:
        process = await sandbox.spawn([suite.PYTHON, "-I", "-u", "-c", LIMITS + "input()"])
        seen = b""
        while not seen.endswith(b"\n"):
            seen += await process.recv(100, timeout=60)
        assert seen.decode().strip() == SHARED
        assert text(await suite.run(sandbox, LIMITS + FORK)).splitlines() == [SHARED, "0"]
        await process.kill()
        assert text(await suite.run(sandbox, LIMITS)) == ALONE

    play(monkeypatch, memory.RlimitBound(), calls)


def test_memory_holds_whatever_a_program_does_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def calls(sandbox: Sandbox) -> None:
        for arguments in (
            (probes.HOLD, "8", str(100 << 20)),
            (probes.HOLD, "8", str(60 << 20)),
            (probes.THREAD_AND_FORK,),
        ):
            done = await sandbox.exec([suite.PYTHON, "-I", "-c", *arguments], timeout=60)
            held = max((int(line) for line in done.stdout.split() if line.isdigit()), default=0)
            assert held <= (296 << 20), done
        assert held > 200 << 20  # a program alone does have the memory
        assert text(await suite.run(sandbox, "print('lives')")) == "lives"

    gated()
    play(monkeypatch, memory.RlimitBound(), calls)


@pytest.mark.parametrize(
    ("held", "alone", "expected"),
    [
        (10, True, {"AS": 100, "NPROC": 4}),  # three of 74 fit in 300; there are no more places than others have
        (86, True, {"AS": 150, "NPROC": 3}),  # 86 and 64 of room are 150
        (236, True, {"AS": 300, "NPROC": 2}),
        (237, True, None),
        (36, False, {"AS": 100, "NPROC": 4}),
        (37, False, None),
    ],
)
def test_a_fork_of_an_interpreter_fits_or_is_none(held: int, alone: bool, expected: dict[str, int] | None) -> None:
    request = {"limits": {"AS": 100 << 20, "NPROC": 4}, "alone": alone, "gate": {"limits": {"AS": 300 << 20}}}
    found = process_gate.fits(request, held << 20)
    assert (found and {"AS": found["AS"] >> 20, "NPROC": found["NPROC"]}) == expected
    del request["gate"]  # of a kernel without one: everything has a share
    assert (process_gate.fits(request, held << 20) is None) == (held > 36)
    assert process_gate.fits({"limits": {"CPU": 1}, "alone": True}, held << 40) == {"CPU": 1}


@pytest.mark.parametrize("room", [64, 120])
def test_what_is_imported_counts_in_every_process(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more room to each, in place of modules that take much: there are fewer processes, or new interpreters."""
    gated()
    monkeypatch.setattr(bubblewrap, "_reports", {})
    monkeypatch.setattr(memory, "detect", memory.RlimitBound)
    source, given = launch.supervisor_source(True), b"ROOM = %d << 20"
    assert given % 64 in source
    monkeypatch.setattr(launch, "supervisor_source", lambda warm: source.replace(given % 64, given % room))
    mark = "import sys\nprint('decimal' in sys.modules)\n"

    async def main() -> None:
        backend = bubblewrap.BubblewrapBackend(preload="json,decimal", pool=0)
        async with backend.session(SandboxSpec()) as sandbox:
            done = await suite.run(sandbox, mark + FORK + LIMITS)
            shared = SHARED if room == 64 else f"{(296 << 20) // 2} 3"
            assert text(done).splitlines() == ["True", "0", shared]
            process = await sandbox.spawn(["/bin/cat"])
            done = await suite.run(sandbox, mark + LIMITS)
            assert text(done).splitlines() == [str(room == 64), SHARED]
            await process.kill()
            done = await sandbox.exec(["/bin/sh", "-c", "echo a | cat; python3 -I -c 'print(1)'"], timeout=60)
            assert text(done) == "a\n1"
        assert any("What is imported" in note for note in (await backend.probe()).notes)
        await backend.aclose()

    asyncio.run(main())


PRLIMIT = """
import os, resource, time
pid = os.fork()
if pid == 0:
    time.sleep(600)
for other in (1, pid):
    try:
        resource.prlimit(other, resource.RLIMIT_NOFILE, (8, 8))
    except PermissionError:
        print("refused")
"""


@pytest.mark.parametrize("lacks", ["nothing", "the filter", "the listener"])
def test_limits_of_others_are_kept_with_and_without_a_gate(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = seccomp.gate()
    if lacks == "the filter":
        gate = None
    elif lacks == "the listener":  # as on a kernel older than 5.5, or below another listener
        assert gate is not None
        gate = {**gate, "halting": ""}
    monkeypatch.setattr(seccomp, "gate", lambda: gate)
    seccomp.program.cache_clear()

    async def calls(sandbox: Sandbox) -> None:
        assert text(await suite.run(sandbox, PRLIMIT)).splitlines() == ["refused", "refused"]
        assert text(await suite.run(sandbox, LIMITS)) == (ALONE if lacks == "nothing" else SHARED)
        assert text(await suite.run(sandbox, FORK + THREAD)).splitlines() == ["0", "thread"]

    try:
        play(monkeypatch, memory.RlimitBound(), calls)
    finally:
        seccomp.program.cache_clear()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["python3", "-I", "-"], True),
        (["/usr/bin/python3.11"], True),
        (["/bin/sh", "-c", "exec python3 -I - 2>&1"], True),
        (["/bin/sh", "-c", "exec /srv/e/bin/python x.py"], True),
        (["python3", "-c", "print(1 | 2); exit()"], True),
        (["/bin/sh", "-c", "exec /srv/e/bin/python x.py | cat"], False),
        (["/bin/sh", "-c", "exec python3 x.py; ls"], False),
        (["/bin/sh", "-c", "python3 x.py | cat"], False),
        (["/bin/sh", "-c", "ls"], False),
        (["/bin/pythonic"], False),
        (["/usr/bin/make", "python3"], False),
    ],
)
def test_which_programs_pass_the_gate(argv: list[str], expected: bool) -> None:
    assert process_gate.passes(argv) == expected


def test_a_gate_decides_once() -> None:
    gate = process_gate.Gate({"clone": 56}, {"AS": 1 << 62, "NPROC": 4, "CPU": 1}, alone=True)
    assert [gate.decide(1, thread) for thread in (True, False, True, False)] == [0, errno.EAGAIN, 0, errno.EAGAIN]
    gate = process_gate.Gate({"clone": 56}, {"AS": 1 << 62, "NPROC": 4, "CPU": 1}, alone=False)
    assert [gate.decide(1, thread) for thread in (False, True, False)] == [0, 0, 0]
