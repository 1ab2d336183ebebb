"""Sandboxes forked from a zygote, and programs forked from an interpreter: as good as new ones, and apart."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import ExecResult, Sandbox, SandboxSpec
from areal_agents.sandboxes import memory, warm_python
from areal_agents.sandboxes.bubblewrap import BubblewrapBackend
from areal_agents.sandboxes.launch import Tools
from areal_agents.sandboxes.zygote import obstacle
from tests.sandboxes.test_backends import ROOT, need

SPEC = SandboxSpec(disk=16 << 20)
MODULES = "json,decimal"


def play(scene: Callable[[BubblewrapBackend], Awaitable[None]], preload: str = MODULES) -> None:
    need(sys.platform == "linux", "Linux")
    need(shutil.which("bwrap"), "bubblewrap: apt-get install bubblewrap")
    need(importlib.util.find_spec("pyseccomp"), "pyseccomp: pip install pyseccomp")

    async def run() -> None:
        backend = BubblewrapBackend(preload=preload, pool=0)
        try:
            await scene(backend)
        finally:
            await backend.aclose()

    asyncio.run(run())


async def python(sandbox: Sandbox, code: str, *args: str) -> ExecResult:
    return await sandbox.exec(["python3", "-I", "-c", code, *args], timeout=60)


PROGRAMS: list[tuple[list[str], bytes]] = [
    (["-I", "-c", "import sys; print(sys.argv, __name__, input()); print('e', file=sys.stderr)", "a", "-b"], b"in\n"),
    (["-I", "-u", "-X", "utf8", "-", "x"], b"import sys\nprint(sys.argv, sys.stdin.read() == '')\n1 / 0"),
    (["-I", "-B", "made.py", "y"], b""),
    (["-I", "missing.py"], b""),
    (["-I", "-c", "def f(:"], b""),
    (["-I", "-c", "raise SystemExit('said')"], b""),
    (["-I", "-c", "raise SystemExit(300)"], b""),
    (["-I", "-c", "import os; os.abort()"], b""),
    (["-I", "-c", "raise KeyboardInterrupt"], b""),
    (["-I", "-c", "import atexit; atexit.register(print, 'bye'); f = open('out', 'w'); f.write('kept')"], b""),
    (["-I", "-c", "print(open('out').read()); import os; print(os.listdir('.'), sorted(os.environ))"], b""),
    (["-I", "-c", "class D:\n def __del__(self): print('gone')\nd = D()"], b""),
    (["-I", "-c", "import threading; threading.Thread(target=lambda: print('thread')).start()"], b""),
    (["-I", "-c", "def f(n): return f(n + 1)\nf(0)"], b""),
    (["-I", "-c", "import sys\nsys.excepthook = lambda *a: print('hooked', a[1])\n1 / 0"], b""),
    (["-I", "-c", "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:3], os.getpid() != 1)"], b""),
    (["-I", "-c", "import json, pickle\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__)"], b""),
    (["-I", "-c", "import multiprocessing as m\nprint(m.get_context('fork').Pool(2).map(abs, [-1, 2]))"], b""),
    (["-I", "-c", "print('x' * 100000, flush=True); import sys; sys.stdout.close()"], b""),
]  # fmt: skip


def test_a_program_in_a_fork_ends_as_one_of_its_own_does() -> None:
    """Each runs twice in the same kind of sandbox: forked, and as ``/usr/bin/env python3 …``, which is not."""

    async def scene(backend: BubblewrapBackend) -> None:
        async with backend.session(SPEC) as warm, backend.session(SPEC) as cold:
            for sandbox in (warm, cold):
                await sandbox.write_file("made.py", b"import sys\nprint(sys.argv, __file__)\nraise ValueError('here')")
            mark = "import sys; print('decimal' in sys.modules)"
            assert (await python(warm, mark)).stdout == b"True\n"  # the control: one is forked and the other not
            assert (await cold.exec(["env", "python3", "-I", "-c", mark], timeout=60)).stdout == b"False\n"
            for words, stdin in PROGRAMS:
                one = await warm.exec(["python3", *words], stdin=stdin, timeout=60)
                other = await cold.exec(["env", "python3", *words], stdin=stdin, timeout=60)
                assert (one.status, one.exit_code, one.stdout) == (other.status, other.exit_code, other.stdout), words
                if b"recursion" in one.stderr:  # it says how many lines are like the last one
                    assert one.stderr.splitlines()[-1] == other.stderr.splitlines()[-1]
                else:
                    assert one.stderr == other.stderr, words

    play(scene)


def test_nothing_stays_from_one_program_to_the_next() -> None:
    leave = """
import builtins, decimal, gc, json, os, sys
json.left = builtins.left = sys.left = True
decimal.getcontext().prec = 3
os.environ["LEFT"] = "1"
sys.modules["left"] = json
seen = [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in ("socket", "Supervisor")]
print(sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "Supervisor" in seen)
print(__import__("random").random())
"""
    look = """
import builtins, decimal, json, os, random, sys
print([hasattr(o, "left") for o in (json, builtins, sys)], decimal.getcontext().prec, "LEFT" in os.environ,
      "left" in sys.modules, random.random())
"""

    async def scene(backend: BubblewrapBackend) -> None:
        numbers = set()
        async with backend.session(SPEC) as first, backend.session(SPEC) as second:
            left = (await python(first, leave)).stdout.decode().splitlines()
            # A copy of pid 1's objects is there, and no descriptor that they could be used with.
            assert left[0] == "[0, 1, 2] True"
            numbers.add(left[1])
            for sandbox in (first, first, second):
                words = (await python(sandbox, look)).stdout.decode().strip().rsplit(" ", 1)
                assert words[0] == "[False, False, False] 28 False False"
                numbers.add(words[1])
        assert len(numbers) == 4

    play(scene)


def test_a_dead_zygote_is_replaced_and_its_sandboxes_are_reported() -> None:
    async def scene(backend: BubblewrapBackend) -> None:
        async with backend.session(SPEC) as sandbox:
            assert (await python(sandbox, "print(1)")).stdout == b"1\n"
            assert backend._zygote is not None
            assert backend._zygote._holder is not None
            os.kill(backend._zygote._holder.pid, signal.SIGKILL)

            async def until_lost() -> None:
                while True:  # the kernel takes everything below it
                    await python(sandbox, "print(1)")

            with pytest.raises(SandboxError):
                await until_lost()
        async with backend.session(SPEC) as sandbox:
            assert (await python(sandbox, "print(2)")).stdout == b"2\n"

    play(scene)


def test_a_module_that_is_not_there_is_said() -> None:
    async def scene(backend: BubblewrapBackend) -> None:
        with pytest.raises(SandboxUnavailable, match="No module named 'no_such_module'") as caught:
            await backend.probe()
        assert "packages=" in str(caught.value)

    play(scene, "no_such_module")
    for wrong in ("json;", "json,", "a b", "../x"):
        with pytest.raises(ValueError, match="no module"):
            BubblewrapBackend(preload=wrong)


COLLAPSED = """
import re, sys
from areal_agents.sandboxes import warm_python
def huge():
    return int(re.search(r"AnonHugePages:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1]) >> 10
before = huge()
warm_python.preload(["much"])
import gc, much
print(before, huge(), len(much.kept), gc.get_freeze_count() > 1000)
"""


def test_what_was_imported_lies_in_huge_pages_and_is_whole(tmp_path: Path) -> None:
    (tmp_path / "much.py").write_text("kept = [str(n) * 10 for n in range(200_000)]")  # 20 MB of small objects
    release = tuple(int(text) for text in re.findall(r"\d+", os.uname().release)[:2])
    need(release >= (6, 1) and Path("/sys/kernel/mm/transparent_hugepage").exists(), "Linux 6.1 with huge pages")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", COLLAPSED], env=environment, capture_output=True, text=True, check=True
    )
    before, after, kept, frozen = done.stdout.split()
    assert (int(before) < 2, int(after) >= 8, kept, frozen) == (True, True, "200000", "True"), done.stdout


def test_where_sandboxes_are_not_forked() -> None:
    tools = Tools("bwrap", None, preload=("json",))
    assert obstacle(Tools("bwrap", None), memory.RlimitBound()) != ""
    assert "systemd" in obstacle(tools, memory.ScopeBound())
    if os.uname().machine in ("x86_64", "aarch64"):
        assert obstacle(tools, memory.RlimitBound()) == ""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["python3", "-I", "-c", "1"], ("-c", "1", ["-c"], False, False)),
        ([sys.executable, "-I", "-u", "-X", "utf8", "-", "a"], ("-", "", ["-", "a"], True, False)),
        (["/bin/sh", "-c", "exec python3 -I -u -X utf8 - 2>&1"], ("-", "", ["-"], True, True)),
        (["/bin/sh", "-c", "exec python3 -I main.py"], ("main.py", "", ["main.py"], False, False)),
        (["python3", "-I", "-S", "-c", "1"], None),
        (["python3", "-c", "1"], None),
        (["python3", "-I"], None),
        (["python3", "-I", "-c"], None),
        (["python3", "-I", "-m", "json"], None),
        (["python3", "-I", "-X", "dev", "-c", "1"], None),
        (["python3", "-I", "-c", "a\0b"], None),
        (["/bin/sh", "-c", "exec python3 -I $X"], None),
        (["/bin/sh", "-c", "exec python3 -I a.py; ls"], None),
        (["/bin/sh", "-c", "exec python3 -I *.py"], None),
        (["/bin/sh", "-c", "exec python3 -I a.py", "x"], None),
        (["/work/python3", "-I", "-c", "1"], None),
        (["ls"], None),
    ],
)
def test_which_programs_are_forked(argv: list[str], expected: tuple[object, ...] | None) -> None:
    program = warm_python.program(argv)
    assert (program and tuple(program)[:5]) == expected, json.dumps(argv)


def test_files_without_content_are_bounded_in_number() -> None:
    """Their memory is the kernel's: without a bound of their own they end as a session that has no memory left."""
    code = """
import os
for folder in ("/work", "/tmp", "/dev/shm"):
    try:
        for number in range(100_000):
            os.mknod(f"{folder}/{number}")
    except OSError as error:
        print(folder, number, error.errno)
"""

    async def scene(backend: BubblewrapBackend) -> None:
        async with backend.session(SandboxSpec(disk=4 << 20)) as sandbox:
            done = await python(sandbox, code)
            assert done.status == "ok", done
            for line, folder in zip(done.stdout.decode().splitlines(), ("/work", "/tmp", "/dev/shm"), strict=True):
                seen, number, error = line.split()
                assert (seen, int(error)) == (folder, errno.ENOSPC)
                assert 19_900 < int(number) <= 20_000
        async with backend.session(SandboxSpec(disk=64 << 20)) as sandbox:
            many = await python(sandbox, "import os; s = os.statvfs('/work'); print(s.f_files)")
            assert many.stdout == b"65536\n"

    play(scene)
