"""Attacks on what a machine has: time, processes, memory, disk and whoever reads the output."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import tarfile

from areal_agents.errors import SandboxError
from areal_agents.sandbox import ExecResult, Sandbox, SandboxSpec
from areal_agents.sandboxes import probes
from areal_agents.sandboxes.subject import SPEC, Subject, held, raised, run, tried, value

PIDS = "import os; print(len([name for name in os.listdir('/proc') if name.isdigit()]))"


async def lives(sandbox: Sandbox) -> None:
    """Check that the session still runs what it is given."""
    done = await run(sandbox, "print('lives')")
    held(done.stdout == b"lives\n", done)


async def alone(sandbox: Sandbox) -> None:
    """Check that no process is left inside but pid 1, and that which counts."""
    held((count := await value(sandbox, PIDS)) == 2, f"{count} processes are left")


async def infinite_loop(subject: Subject) -> str:
    code = "import sys\nsys.stdout.write('loops')\nsys.stdout.flush()\nwhile True:\n    pass"
    async with subject.session(SPEC) as sandbox:
        done = await run(sandbox, code, timeout=1.0)
        tried(done.stdout == b"loops", done)
        held(done.status == "timeout" and done.seconds < 30, done)
        await lives(sandbox)
    return f"ended after {done.seconds:.1f} s of 1.0"


async def fork_bomb(subject: Subject) -> str:
    spec = SandboxSpec(memory=512 << 20, disk=16 << 20, processes=16)
    count = """
import json, os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
except OSError as error:
    print(json.dumps([made, error.errno]))
else:
    print(json.dumps([made, 0]))
"""
    bomb = "import os\nos.write(1, b'x')\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    async with subject.session(spec) as sandbox:
        made, code = await value(sandbox, count)
        tried(made > 0, f"{made} forks, errno {code}")
        held(code == errno.EAGAIN and made + 1 <= 16, f"{made} forks, errno {code}")
        for _ in range(2):
            done = await run(sandbox, bomb, timeout=0.5)
            tried(done.stdout, done)
            held(done.status == "timeout", done)
            await alone(sandbox)
        process = await sandbox.spawn(["/bin/cat"])
        held((await run(sandbox, bomb, timeout=0.5)).status == "timeout", "a bomb beside a live process")
        left = await value(sandbox, PIDS)  # the live one too, if the sweep could spare it
        held(left <= 3, f"{left} processes are left")
        await process.kill()
    return f"{made} of 16 processes, then EAGAIN; none is left"


async def memory_by_one(subject: Subject) -> str:
    code = "block = bytearray(800 << 20)\nfor i in range(0, len(block), 4096): block[i] = 1\nprint('held')"
    small = "block = bytearray(100 << 20)\nfor i in range(0, len(block), 4096): block[i] = 1\nprint('held')"
    async with subject.session(SPEC) as sandbox:
        tried((control := await run(sandbox, small)).stdout == b"held\n", control)
        done = await run(sandbox, code)
        held(b"held" not in done.stdout, done)
        held(done.status == ("error" if subject.memory_bound == "rlimits" else "oom"), done)
        await lives(sandbox)
    return f"800 MB of 512: {done.status}"


def _most_held(done: ExecResult) -> int:
    return max((int(line) for line in done.stdout.split() if line.isdigit()), default=0)


async def memory_by_many(subject: Subject) -> str:
    async with subject.session(SPEC) as sandbox:
        done = await sandbox.exec(["python3", "-I", "-c", probes.HOLD, "8", str(300 << 20)], timeout=60)
        most = _most_held(done)
        if not most and done.status != "oom":  # each may have been refused its share: the program must hold small ones
            small = await sandbox.exec(["python3", "-I", "-c", probes.HOLD, "2", str(1 << 20)], timeout=60)
            tried(_most_held(small), (done, small))
        held(most <= SPEC.memory, f"{most >> 20} MB held")
        held((done.status == "oom") == (subject.memory_bound != "rlimits"), done)
        await lives(sandbox)
    return f"8 processes of 300 MB held {most >> 20} of 512 MB"


async def disk_fill(subject: Subject) -> str:
    code = """
import json, os, sys
written = {}
for folder in ("/work", "/tmp", "/dev/shm"):
    total = 0
    try:
        for number in range(8):
            with open(f"{folder}/{number}", "wb", buffering=0) as file:
                for _ in range(64):
                    total += file.write(b"x" * (1 << 20))
    except OSError:
        pass
    written[folder] = total
    for number in range(8):
        try:
            os.unlink(f"{folder}/{number}")
        except OSError:
            pass
print(json.dumps(written))
"""
    async with subject.session(SPEC) as sandbox:
        written = await value(sandbox, code)
        tried(all(total > 1 << 20 for total in written.values()), written)
        held(written == dict.fromkeys(("/work", "/tmp", "/dev/shm"), SPEC.disk), written)
        full = await raised(sandbox.write_file("big", b"x" * (SPEC.disk + 1)))
        held(isinstance(full, OSError) and full.errno == errno.ENOSPC, full)
    return "16 MB in each of /work, /tmp and /dev/shm, then ENOSPC, for uploads too"


async def inode_fill(subject: Subject) -> str:
    spec = SandboxSpec(memory=144 << 20, disk=4 << 20)
    code = """
import os
for number in range(250_000):
    try:
        os.mknod(f"/tmp/{number}")
    except OSError as error:
        print(error.errno)
        break
    if number % 10_000 == 0:
        print(number, flush=True)
else:
    print("all")
"""
    taken = []
    for _ in range(3):  # others on this machine make files too, and not the same number each time
        free = os.statvfs("/tmp").f_ffree
        async with subject.session(spec) as sandbox:
            done = await run(sandbox, code, timeout=60)
            taken.append(free - os.statvfs("/tmp").f_ffree)
        tried(done.stdout.startswith(b"0\n10000\n"), done)
        if taken[-1] < 5_000:
            break
    else:
        held(False, f"{taken} inodes of the host's /tmp")
    if subject.memory_bound == "rlimits":
        return "not on the host's disk; kernel memory is not bounded by rlimits, as the backend's notes say"
    held(b"all" not in done.stdout, "250000 files: their kernel memory is not bounded")
    async with subject.session(spec) as sandbox:
        await lives(sandbox)
    if done.stdout.split()[-1] == str(errno.ENOSPC).encode():
        return f"ENOSPC after {done.stdout.split()[-2].decode()} files or a few more"
    return f"{done.status} after {done.stdout.split()[-1].decode()} files or a few more: they fill the session's memory"


async def endless_output(subject: Subject) -> str:
    code = "import os\nblock = b'x' * (1 << 20)\nfor _ in range(1024):\n    os.write(1, block)"
    async with subject.session(SPEC) as sandbox:
        done = await run(sandbox, code, timeout=120)
        tried(len(done.stdout) >= 1 << 20, done.status)
        held(done.status == "output_limit" and len(done.stdout) == 1 << 20, (done.status, len(done.stdout)))
        await lives(sandbox)
    return f"1 GB: cut at 1 MB after {done.seconds:.2f} s"


async def daemons(subject: Subject) -> str:
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    try:
        second = os.fork()
    except OSError:  # there is no place for a third: the second is the daemon
        second = 0
    if second == 0:
        print("daemon", flush=True)
        while True:
            with open("/work/beat", "a") as file:
                file.write("x")
            time.sleep(0.01)
    os._exit(0)
time.sleep(0.3)
"""
    async with subject.session(SPEC) as sandbox:
        done = await run(sandbox, code)
        tried(done.stdout == b"daemon\n", done)
        beats = len(await sandbox.read_file("beat", 1 << 20))
        tried(beats > 1, f"{beats} beats")
        await alone(sandbox)
        held(len(await sandbox.read_file("beat", 1 << 20)) == beats, "the daemon goes on")
        process = await sandbox.spawn(["/bin/cat"])
        await run(sandbox, code)
        left = await value(sandbox, PIDS)
        held(left == 3, f"{left} processes beside a live one")
        await process.kill()
        await alone(sandbox)
    return f"a grandchild with a session of its own beat {beats} times and died with its call"


async def deep_recursion(subject: Subject) -> str:
    code = """
import os, sys
sys.setrecursionlimit(10 ** 9)
deepest = 0
class Node:
    def __repr__(self):  # through C, so that the stack of C grows
        global deepest
        deepest += 1
        if deepest == 1000:
            os.write(1, b"deep")
        return repr([self])
try:
    repr(Node())
except (RecursionError, MemoryError):
    sys.exit(9)
"""
    async with subject.session(SPEC) as sandbox:
        done = await run(sandbox, code, timeout=3)
        tried(done.stdout == b"deep", done)
        held(done.status in ("error", "oom", "timeout"), done)
        await lives(sandbox)
    return f"more than 1000 frames of C, then {done.status}"


def tar_bomb(size: int) -> bytes:
    """Make an archive of one file that claims to hold ``size`` bytes and does not."""
    member = tarfile.TarInfo("bomb")
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(20 * 512)


async def bombs(subject: Subject) -> str:
    inflate = """
import zlib
packer = zlib.compressobj(9, zlib.DEFLATED, -15)
block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
bomb = block * 1024 + packer.flush()
print(len(bomb), flush=True)
blown = zlib.decompress(bomb, -15)
print("held", len(blown))
"""
    pickled = """
import os, pickle, sys
class Bomb:
    def __reduce__(self):
        return os.mkdir, (sys.argv[1],)
with open("/work/bomb", "wb") as file:
    file.write(pickle.dumps(Bomb()))
print("written")
"""
    mark = f"/tmp/areal-attack-{os.urandom(8).hex()}"
    async with subject.session(SPEC) as sandbox:
        done = await run(sandbox, inflate, timeout=60)
        tried(done.stdout.strip().isdigit(), done)
        held(done.status in ("oom", "error") and b"held" not in done.stdout, done)
        tried((wrote := await run(sandbox, pickled, mark)).stdout == b"written\n", wrote)
        tried(mark.encode() in await sandbox.read_file("bomb", 1000), "the pickle does not hold its call")
        await sandbox.restore(await sandbox.snapshot())
        held(not os.path.exists(mark), "the host ran a pickle")
        for bomb in (tar_bomb(1 << 40), tar_bomb(SPEC.disk + 4096)):
            error = await raised(sandbox.restore(bomb))
            held(isinstance(error, (OSError, ValueError)), error)
        await lives(sandbox)
    return (
        f"{done.stdout.decode().strip()} bytes that inflate to 1 GB: {done.status}; a pickle and a tar bomb are bytes"
    )


async def terminal_escapes(subject: Subject) -> str:
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b31m\x1bP+q\x1b\\\r\b\u202eabc\x00"
    async with subject.session(SPEC) as sandbox:
        code = "import sys; sys.stdout.buffer.write(bytes.fromhex(sys.argv[1]))"
        done = await run(sandbox, code, nasty.encode().hex())
    tried(done.stdout == nasty.encode(), done)
    shown = json.dumps(done.stdout.decode())
    held(shown.isascii() and shown.isprintable(), shown)
    return "bytes arrive as they are, and in JSON none is a control character"


async def rebound_machinery(subject: Subject) -> str:
    code = """
import builtins, io, os, sys
print("before", flush=True)
builtins.print = builtins.open = builtins.input = lambda *a, **k: "rebound"
sys.stdout = sys.__stdout__ = io.StringIO()
real, os.write = os.write, lambda *a: 1 / 0
sys.exit = os._exit = lambda *a: None
sys.excepthook = lambda *a: real(1, b"hook")
for number in range(1, 65):
    try:
        import signal; signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
real(1, b"EXIT ok 0\\n")
while True:
    pass
"""
    async with subject.session(SPEC) as sandbox:
        process = await sandbox.spawn(["python3", "-I", "-u", "-c", code])
        seen = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(30):
                while not seen.endswith(b"EXIT ok 0\n"):
                    seen += await process.recv(1000, timeout=5)
        tried(seen == b"before\nEXIT ok 0\n", seen)
        await lives(sandbox)
        await process.kill()
        await alone(sandbox)
        held(await process.recv(10, timeout=0.1) == b"", "it prints after its end")
        error = await raised(process.send(b"x"))
        held(isinstance(error, (OSError, SandboxError)), error)
        done = await run(
            sandbox, "import os; os.write(1, b'READY 0'); os.close(1); os.close(2); os.kill(os.getpid(), 9)"
        )
        held((done.status, done.exit_code, done.stdout) == ("error", -9, b"READY 0"), done)
    return "a live program that rebinds its machinery and takes all signals is ended; the session goes on"
