"""What the contract of ``areal_agents/sandbox.py`` asks of every backend, isolated or not, as checks that run it.

``suite.check`` runs them, with the attacks of ``attacks.py``. A check is a function that raises AssertionError.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import resource
import tarfile
import time

from areal_agents.errors import SandboxError
from areal_agents.sandbox import SandboxBackend, SandboxSpec
from areal_agents.sandboxes.subject import SPEC, Check, Subject, raised, run, value


async def exec_reports_what_the_process_did(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        good = await run(sandbox, "import sys; print('out'); print('err', file=sys.stderr)")
        assert (good.status, good.exit_code, good.stdout, good.stderr) == ("ok", 0, b"out\n", b"err\n")
        bad = await run(sandbox, "print('before'); raise SystemExit(3)")
        assert (bad.status, bad.exit_code, bad.stdout) == ("error", 3, b"before\n")
        killed = await run(sandbox, "import os; os.kill(os.getpid(), 15)")
        assert (killed.status, killed.exit_code) == ("error", -15)
        missing = await sandbox.exec(["no-such-program"], timeout=60)
        assert (missing.status, missing.exit_code) == ("error", 127)
        assert b"no-such-program" in missing.stderr


async def argv_is_checked_but_never_interpreted(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        words = ["$HOME", "a b", "*", "; false", "é😀", ""]
        assert await value(sandbox, "import json, sys; print(json.dumps(sys.argv[1:]))", *words) == words
        for unusable in (["/bin/echo", "x" * (1 << 18)], ["/bin/echo", "a\0b"], ["/bin/echo", "\ud800"]):
            result = await sandbox.exec(unusable, timeout=60)
            assert (result.status, result.exit_code, result.stdout) == ("error", 126, b""), result
        assert isinstance(await raised(sandbox.exec([], timeout=60)), ValueError)
        assert isinstance(await raised(sandbox.exec("ls", timeout=60)), ValueError)


async def stdin_is_delivered(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        data = bytes(range(256)) * 4096
        code = "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
        import hashlib

        assert (await run(sandbox, code, stdin=data)).stdout.decode().strip() == hashlib.sha256(data).hexdigest()
        ignored = await run(sandbox, "print('not read')", stdin=data)
        assert (ignored.status, ignored.stdout) == ("ok", b"not read\n")
        assert (await run(sandbox, "import sys; print(len(sys.stdin.read()))")).stdout == b"0\n"


async def timeout_kills_all_and_keeps_output(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        code = "import os, time; print('partial', flush=True); os.fork(); time.sleep(600)"
        start = time.monotonic()
        result = await run(sandbox, code, timeout=2.0)
        assert (result.status, result.exit_code, result.stdout) == ("timeout", None, b"partial\n")
        assert 2.0 <= result.seconds <= time.monotonic() - start < 50
        assert (await run(sandbox, "print('next')")).stdout == b"next\n"


async def cpu_limit_is_a_timeout(subject: Subject) -> None:
    async with subject.session(SandboxSpec(memory=512 << 20, disk=16 << 20, cpu_seconds=1)) as sandbox:
        assert (await run(sandbox, "while True: pass")).status == "timeout"


async def output_is_cut_promptly(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = "import os\nfor _ in range(1 << 14): os.write(1, b'x' * (1 << 16))"
        result = await sandbox.exec(["python3", "-I", "-c", code], timeout=60, max_output=100_000)
        assert (result.status, result.exit_code, result.stdout) == ("output_limit", None, b"x" * 100_000)
        assert result.seconds < 50
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 << 10, f"{grown} KB more on the host"
        code = "import sys; sys.stderr.write('e' * 700); sys.stderr.flush(); print('o' * 299)"
        exact = await sandbox.exec(["python3", "-I", "-c", code], timeout=30, max_output=1000)
        assert (exact.status, len(exact.stdout), len(exact.stderr)) == ("ok", 300, 700)


async def files_persist_until_the_session_closes(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        blob = bytes(range(256)) * 1000
        await sandbox.write_file("deep/er/blob", blob)
        assert await sandbox.read_file("/work/deep/er/blob", len(blob)) == blob
        assert (await run(sandbox, "print(len(open('deep/er/blob', 'rb').read()))")).stdout == b"256000\n"
        await run(sandbox, "open('made', 'w').write('inside')")
        assert await sandbox.read_file("made", 100) == b"inside"
        await sandbox.write_file("made", b"in")
        assert await sandbox.read_file("made", 100) == b"in"
        await sandbox.write_file("empty", b"")
        assert await sandbox.read_file("empty", 0) == b""
    async with subject.session(SPEC) as sandbox:
        assert isinstance(await raised(sandbox.read_file("made", 100)), FileNotFoundError)


async def file_paths_stay_inside(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        for path in ("../x", "/etc/passwd", "a/../../x", "/work/../x", "", "/work", ".", "a\0b", "/workx/a"):
            assert isinstance(await raised(sandbox.write_file(path, b"")), ValueError), path
            assert isinstance(await raised(sandbox.read_file(path, 10)), ValueError), path
        await run(sandbox, "import os; os.symlink('/etc/hostname', 'link'); os.symlink('/', 'up'); os.mkfifo('pipe')")
        for path in ("link", "up/etc/hostname"):
            for error in (await raised(sandbox.read_file(path, 99)), await raised(sandbox.write_file(path, b"x"))):
                assert isinstance(error, OSError), (path, error)
                assert error.errno in (errno.ELOOP, errno.ENOTDIR), (path, error)
        assert isinstance(await raised(sandbox.read_file("pipe", 10)), OSError)
        await sandbox.write_file("big", b"12345")
        big = await raised(sandbox.read_file("big", 4))
        assert isinstance(big, OSError)
        assert big.errno == errno.EFBIG


async def snapshot_and_restore(subject: Subject) -> None:
    async with subject.session(SPEC) as first, subject.session(SPEC) as second:
        await first.write_file("a/one", b"1" * 100_000)
        await first.write_file("two", b"2")
        await run(first, "import os; os.symlink('two', 'link'); os.mkdir('hollow'); os.chmod('two', 0o755)")
        data = await first.snapshot()
        await second.write_file("old/file", b"goes away")
        await second.restore(data)
        code = (
            "import json, os; print(json.dumps(sorted(os.path.join(d, f) for d, s, n in os.walk('.') for f in s + n)))"
        )
        assert await value(second, code) == ["./a", "./a/one", "./hollow", "./two"]
        assert await second.read_file("a/one", 1 << 20) == b"1" * 100_000
        assert await value(second, "import os; print(os.stat('two').st_mode & 0o777)") == 0o755
        await run(first, "open('two', 'w').write('changed')")
        await first.restore(data)
        assert await first.read_file("two", 10) == b"2"


def _tar(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return buffer.getvalue()


async def restore_rejects_hostile_archives(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        await sandbox.write_file("kept", b"kept")
        hostile = [
            _tar("../out"),
            _tar("/abs"),
            _tar("a/../../b"),
            _tar("s", tarfile.SYMTYPE, "/etc/passwd"),
            _tar("h", tarfile.LNKTYPE, "kept"),
            _tar("d", tarfile.CHRTYPE),
            _tar("p", tarfile.FIFOTYPE),
            b"no tar at all" * 100,
        ]
        for data in hostile:
            assert isinstance(await raised(sandbox.restore(data)), ValueError), data[:40]
        assert await sandbox.read_file("kept", 10) == b"kept"


async def live_process_survives_exec(subject: Subject) -> None:
    code = "import sys\ntotal = 0\nfor line in sys.stdin:\n    total += int(line)\n    print(total, flush=True)"
    async with subject.session(SPEC) as sandbox:
        process = await sandbox.spawn(["python3", "-I", "-c", code])
        await process.send(b"40\n")
        assert await process.recv(100, timeout=60) == b"40\n"
        assert (await run(sandbox, "print('between')")).stdout == b"between\n"
        assert (await run(sandbox, "import time; time.sleep(60)", timeout=0.2)).status == "timeout"
        await process.send(b"2\n")
        assert await process.recv(100, timeout=60) == b"42\n"
        assert await process.recv(100, timeout=0.05) == b""
        waiting = asyncio.ensure_future(process.recv(100, timeout=600))
        await asyncio.sleep(0)
        await process.kill()
        assert await asyncio.wait_for(waiting, 60) == b""
        await process.kill()
        assert isinstance(await raised(process.send(b"1\n")), BrokenPipeError)
        assert (await run(sandbox, "print('after')")).stdout == b"after\n"


async def cancelled_exec_leaves_the_session_usable(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        process = await sandbox.spawn(["/bin/cat"])
        code = "import os, time; open('started', 'w').close(); time.sleep(600)"
        task = asyncio.ensure_future(run(sandbox, code, timeout=600))
        await asyncio.sleep(0.3)
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=60)
        assert done
        assert task.cancelled()
        assert await sandbox.read_file("started", 10) == b""
        assert (await run(sandbox, "print('usable')")).stdout == b"usable\n"
        await process.send(b"alive")
        assert await process.recv(10, timeout=60) == b"alive"


async def sessions_run_side_by_side(subject: Subject) -> None:
    async def one(number: int) -> bytes:
        async with subject.session(SPEC) as sandbox:
            await sandbox.write_file("mine", str(number).encode())
            code = "import os; print(open('mine').read(), sorted(os.listdir('.')))"
            return (await run(sandbox, code)).stdout

    answers = await asyncio.gather(*map(one, range(8)))
    assert answers == [f"{number} ['mine']\n".encode() for number in range(8)]


async def nothing_is_leaked(subject: Subject) -> None:
    async def use(backend: SandboxBackend) -> None:
        try:
            async with backend.session(SPEC) as sandbox:
                await sandbox.spawn(["/bin/cat"])
                await run(sandbox, "print(1)")
                await run(sandbox, "import time; time.sleep(60)", timeout=0.1)
                await sandbox.exec(["python3", "-c", "print('x' * 10**6)"], timeout=60, max_output=10)
        finally:
            await backend.aclose()

    await subject.backend.aclose()  # its pool would come and go meanwhile
    await use(subject.make())
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await use(subject.make())
    assert sorted(os.listdir("/proc/self/fd")) == before


async def a_closed_session_refuses(subject: Subject) -> None:
    async with subject.session(SPEC) as sandbox:
        await run(sandbox, "print(1)")
    assert isinstance(await raised(run(sandbox, "print(1)")), SandboxError)


CONFORMANCE: tuple[Check, ...] = (
    exec_reports_what_the_process_did,
    argv_is_checked_but_never_interpreted,
    stdin_is_delivered,
    timeout_kills_all_and_keeps_output,
    cpu_limit_is_a_timeout,
    output_is_cut_promptly,
    files_persist_until_the_session_closes,
    file_paths_stay_inside,
    snapshot_and_restore,
    restore_rejects_hostile_archives,
    live_process_survives_exec,
    cancelled_exec_leaves_the_session_usable,
    sessions_run_side_by_side,
    nothing_is_leaked,
    a_closed_session_refuses,
)
ALONE: tuple[Check, ...] = (nothing_is_leaked,)
"""Those that close their backend."""
