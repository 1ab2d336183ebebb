"""Consoles: state that lives across calls, and code that attacks what keeps it."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import sys
from collections.abc import Awaitable, Callable

import pytest

from areal_agents.errors import SandboxError
from areal_agents.sandbox import CallResult, Console, ConsoleKind, Process, Sandbox, SandboxSpec, open_console
from areal_agents.sandboxes import console as console_module
from areal_agents.sandboxes import get
from areal_agents.sandboxes.console_driver import DONE, FRAME, OUTPUT, READY
from tests.sandboxes.test_backends import need

SPEC = SandboxSpec(memory=1 << 30, disk=32 << 20)
Scene = Callable[[Console, Sandbox], Awaitable[None]]


def play(backend: str, kind: ConsoleKind, scene: Scene, *, background: bool = False) -> None:
    """Hostile scenes are for bubblewrap alone: without isolation they would reach this machine."""
    if backend == "bubblewrap":
        need(sys.platform == "linux", "Linux")
        need(shutil.which("bwrap"), "bubblewrap: apt-get install bubblewrap")
        need(importlib.util.find_spec("pyseccomp"), "pyseccomp: pip install pyseccomp")

    async def run() -> None:
        made = get(backend)
        try:
            async with made.session(SPEC) as sandbox:
                console = await open_console(sandbox, kind, background=background)
                await scene(console, sandbox)
                await console.close()
        finally:
            await made.aclose()

    asyncio.run(run())


async def say(console: Console, code: str, timeout: float = 60) -> tuple[str, bytes]:
    result = await console.call(code, timeout=timeout)
    return result.status, result.output


@pytest.mark.parametrize("backend", ["bubblewrap", "unsafe_local"])
def test_python_keeps_its_state_and_echoes(backend: str) -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert await say(console, "import math\nx = 41\ndef f(): return x + 1") == ("ok", b"")
        assert await say(console, "f()") == ("ok", b"42\n")
        assert await say(console, "_ + 1; None") == ("ok", b"")
        assert await say(console, "print('a'); 'é'") == ("ok", "a\n'é'\n".encode())
        failed = await console.call("y = 1\n1 / 0", timeout=60)
        assert (failed.status, failed.exit_code, failed.state) == ("error", 1, "kept")
        shown = [line for line in failed.output.decode().splitlines() if "~" not in line]
        place = '  File "<call 5>", line 2, in <module>'
        last = "ZeroDivisionError: division by zero"
        assert shown == ["Traceback (most recent call last):", place, "    1 / 0", last]
        assert await say(console, "y") == ("ok", b"1\n")
        assert (await say(console, "1 +"))[0] == "error"
        assert (await console.call("input()", timeout=60)).output.endswith(b"EOFError: EOF when reading a line\n")
        assert (await console.call("exit(3)", timeout=60)).state == "kept"
        await sandbox.write_file("mine.py", b"value = 7")
        assert await say(console, "import mine; mine.value") == ("ok", b"7\n")
        assert await say(console, "open('out', 'w').write('x'); None") == ("ok", b"")
        assert await sandbox.read_file("out", 10) == b"x"
        assert await say(console, "") == ("ok", b"")

    play(backend, "python", scene)


@pytest.mark.parametrize("backend", ["bubblewrap", "unsafe_local"])
def test_a_shell_keeps_its_state(backend: str) -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert await say(console, 'mkdir -p a/b; cd a/b; X=4; f() { echo "f $X!" it\\\'s; }') == ("ok", b"")
        assert await say(console, "f; basename $PWD") == ("ok", b"f 4! it's\nb\n")
        failed = await console.call("cat nothing 2>&1; false; (exit 7)", timeout=60)
        assert (failed.status, failed.exit_code) == ("error", 7)
        assert b"nothing" in failed.output
        assert await say(console, "cat; echo end") == ("ok", b"end\n")  # stdin is empty
        unfinished = await console.call("if true; then", timeout=60)
        assert (unfinished.status, unfinished.state) == ("error", "kept")
        assert (await console.call("set -u; echo $nope", timeout=60)).state == "kept"
        assert await say(console, "set +u; f") == ("ok", b"f 4! it's\n")
        gone = await console.call("exit 3", timeout=60)
        assert (gone.status, gone.exit_code, gone.state) == ("ended", 3, "lost")
        assert await say(console, "type f >/dev/null 2>&1 || echo fresh") == ("ok", b"fresh\n")
        with pytest.raises(ValueError, match="NUL"):
            await console.call("echo \0", timeout=60)

    play(backend, "shell", scene)


FIGURE = r"""
from matplotlib.figure import Figure
free = Figure()
free.subplots().plot([1, 2])
free"""


def test_figures_become_pictures() -> None:
    """In the Python that runs the tests, which has matplotlib."""

    async def scene(console: Console, sandbox: Sandbox) -> None:
        made: list[int] = []

        async def drawn(code: str, status: str = "ok") -> int:
            done = await console.call(code, timeout=120)
            assert done.status == status, done
            names = re.findall(rb"\[picture: .*/(picture-\d+\.png)\]\n", done.output)
            for name in names:
                assert (await sandbox.read_file(name.decode(), 1 << 20)).startswith(b"\x89PNG\r\n")
            made.append(len(names))
            return len(names)

        assert await drawn("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()") == 1
        assert await drawn("fig, ax = plt.subplots(); ax.plot([1]); plt.figure(); fig") == 2
        assert await drawn("ax.plot([2]); None") == 0
        assert await drawn("fig") == 1  # it is closed, and shown again
        assert await drawn(FIGURE) == 1  # of no pyplot
        assert await drawn("plt.plot([1]); 1 / 0", "error") == 1
        assert await drawn("plt.get_fignums()") == 0  # what failed left nothing
        assert await drawn("plt.plot([1]); plt.title('$x^$'); None", "error") == 0
        assert await drawn("plt.get_fignums()") == 0  # nor does what cannot be drawn
        assert await drawn("plt.savefig('mine.png'); plt.close('all')") == 0
        assert await drawn("class P:\n    def _repr_png_(self): return b'\\x89PNG\\r\\n'\nP()") == 1
        assert made == [1, 2, 0, 1, 1, 1, 0, 0, 0, 0, 1]

    play(f"unsafe_local?python={sys.prefix}", "python", scene)


def test_a_call_is_interrupted_and_the_state_is_kept() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert await say(console, "x = 1") == ("ok", b"")
        late = await console.call("x = 2\nprint('on')\nimport time\ntime.sleep(600)", timeout=1)
        assert (late.status, late.state) == ("timeout", "kept")
        assert late.output.startswith(b"on\n")
        assert late.output.endswith(b"KeyboardInterrupt\n")
        assert await say(console, "x") == ("ok", b"2\n")
        call = asyncio.ensure_future(console.call("open('on', 'w').close()\nwhile True: pass", timeout=600))
        while True:
            try:
                await sandbox.read_file("on", 10)
            except FileNotFoundError:
                continue
            break
        await console.interrupt()
        stopped = await call
        assert (stopped.status, stopped.state) == ("interrupted", "kept")
        await console.interrupt()  # there is none
        many = await console.call("while True: print('x' * 1000)", timeout=600, max_output=5000)
        assert (many.status, many.state, len(many.output)) == ("output_limit", "kept", 5000)
        assert await say(console, "x") == ("ok", b"2\n")

    play("bubblewrap", "python", scene)


def test_code_that_ignores_the_interrupt_is_killed_and_what_was_before_it_is_restored() -> None:
    deaf = "x = 2\nprint('deaf', flush=True)\nimport signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"

    async def scene(console: Console, sandbox: Sandbox) -> None:
        await say(console, "x = 1")
        killed = await console.call(deaf + "while True: time.sleep(1)", timeout=1)
        assert (killed.status, killed.exit_code, killed.state) == ("timeout", None, "restored")
        assert killed.output == b"deaf\n"
        for end, code in (("import os; os._exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)):
            crashed = await console.call("x = 3\n" + end, timeout=60)
            assert (crashed.status, crashed.exit_code, crashed.state) == ("ended", code, "restored")
        # One that kept its deafness is interrupted again: each call starts with the usual handler.
        assert (await say(console, deaf.replace("x = 2", "x = 4")))[0] == "ok"
        again = await console.call("signal.pthread_sigmask(signal.SIG_BLOCK, [2])\nwhile True: pass", timeout=1)
        assert (again.status, again.state) == ("timeout", "restored")
        again = await console.call("while True: pass", timeout=1)
        assert (again.status, again.state) == ("timeout", "kept")
        assert await say(console, "x") == ("ok", b"4\n")

    play("bubblewrap", "python", scene)


def test_a_shell_is_interrupted() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        await say(console, "X=4")
        for code in ("sleep 600; echo after", "while :; do :; done", "sleep 600 | cat"):
            late = await console.call(code, timeout=0.5)
            assert (late.status, late.exit_code, late.state) == ("timeout", 130, "kept"), code
            assert b"after" not in late.output
        deaf = await console.call("trap '' INT; sleep 600", timeout=1)
        assert (deaf.status, deaf.state) == ("timeout", "kept")
        assert await say(console, "echo $X") == ("ok", b"4\n")
        stuck = await console.call("while :; do :; done", timeout=1)
        assert (stuck.status, stuck.state) == ("timeout", "lost")
        assert await say(console, "echo ${X:-gone}") == ("ok", b"gone\n")

    play("bubblewrap", "shell", scene)


def test_what_a_call_left_running_is_ended_and_named() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        leave = "import os, subprocess as s, time\np = s.Popen(['sleep', '601'])\nif os.fork() == 0:\n    os.setsid()\n"
        leave += (
            "    if os.fork() == 0:\n        open('alive', 'w').close()\n        os.execvp('sleep', ['sleep', '602'])\n"
        )
        leave += "    os._exit(0)\nwhile not os.path.exists('alive'): pass\ntime.sleep(0.2)"
        left = await console.call(leave, timeout=60)
        assert left.status == "ok"
        assert sorted(text.split(" ", 1)[1] for text in left.left) == ["sleep 601", "sleep 602"]
        look = "[open(f'/proc/{n}/cmdline').read()[:5] for n in os.listdir('/proc') if n.isdigit()].count('sleep')"
        assert await say(console, look) == ("ok", b"0\n")

    play("bubblewrap", "python", scene)


def test_background_work_goes_on_where_it_may() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        await say(console, "mkfifo pipe; (cat pipe > got; sleep 601) & true")
        listed = await console.call("echo through > pipe; until [ -s got ]; do :; done; cat got", timeout=60)
        assert (listed.status, listed.output) == ("ok", b"through\n")
        late = await console.call("trap '' INT; sleep 602", timeout=1)  # killed, and the work of before is not
        assert late.status == "timeout"
        assert any("sleep 601" in text for text in late.left)
        assert not any("sleep 602" in text for text in late.left)

    play("bubblewrap", "shell", scene, background=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_shell_that_cannot_fork_keeps_its_state(background: bool) -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert (await console.call("x=5; cd /tmp", timeout=60)).state == "kept"
        many = await console.call("for i in {1..200}; do sleep 1000 & done", timeout=2)
        assert (many.status, many.state, b"fork: retry" in many.output) == ("timeout", "kept", True)
        assert len(many.left) == 32  # those that are named
        assert await say(console, "echo $x; pwd") == ("ok", b"5\n/tmp\n")
        if background:  # there is still no room; the shell itself can make some
            full = await console.call("ls /; echo never", timeout=1)
            assert (full.state, b"never" in full.output) == ("kept", False)
            assert (await console.call("kill -9 %2 %3 %4; wait %2 %3 %4", timeout=60)).state == "kept"
        assert (await say(console, "y=$(echo $x | cat); set +m; echo $y"))[1].splitlines()[-1] == b"5"

    play("bubblewrap", "shell", scene, background=background)


def test_a_shell_outlives_a_fork_bomb() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert (await console.call("x=5", timeout=60)).state == "kept"
        bomb = await console.call("b() { b | b & }; b; while :; do :; done", timeout=2)
        assert (bomb.status, bomb.state, b"fork: retry" in bomb.output) == ("timeout", "kept", True)
        assert (await console.call("echo $(echo $x)", timeout=60)).output == b"5\n"

    play("bubblewrap", "shell", scene)


def test_threads_stand_still_between_the_calls() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        count = "import threading, time\nn = 0\ndef f():\n    global n\n    while True: n += 1\n"
        assert (await say(console, count + "threading.Thread(target=f, daemon=True).start()"))[0] == "ok"
        before = int((await say(console, "time.sleep(0.2); a = n; a"))[1])
        assert before > 0
        await sandbox.exec(["sleep", "1"], timeout=60)
        assert (await say(console, "t = time.process_time(); t"))[0] == "ok"
        await sandbox.exec(["sleep", "2"], timeout=60)
        spent = float((await say(console, "time.process_time() - t"))[1])
        assert spent < 1.5

    play("bubblewrap", "python", scene)


REBIND = """
import builtins, gc, os, signal, sys, threading, traceback, linecache, posix, types
ran = []
for module in (os, posix):
    for name in ("read", "write", "fork", "waitpid", "_exit", "getpid", "listdir", "open", "close"):
        setattr(module, name, lambda *a, **k: ran.append(1) or b"")
for name in "exec eval compile print len isinstance getattr repr type int globals str".split():
    setattr(builtins, name, None)
signal.signal = signal.pthread_sigmask = traceback.print_exception = linecache.cache = None
sys.modules.clear()
sys.excepthook = sys.displayhook = sys.settrace = None
sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
gc.callbacks.append(lambda *a: 1 / 0)
gc.set_threshold(1)
done = True
"""


def test_a_console_survives_code_that_rebinds_its_machinery() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert (await console.call(REBIND, timeout=60)).status == "ok"
        # The control: what was rebound is, for the code of the next call.
        control = await console.call(
            "assert len is None and sys.stdout is None and os.read() == b'' and ran", timeout=60
        )
        assert (control.status, control.state) == ("ok", "kept"), control
        failed = await console.call("1 / 0", timeout=60)
        assert (failed.status, failed.state) == ("error", "kept")
        late = await console.call("while True: pass", timeout=1)
        assert (late.status, late.state) == ("timeout", "kept")

    play("bubblewrap", "python", scene)


def test_reports_of_others_are_not_believed() -> None:
    """A child's report, a wrong number, or rubbish ends no call; frames in the output are output."""
    forge = """
import os
for text in (b"done 2 0", b"fell 2 0", b"run 2", b"done 999 0", b"", b"\\xff" * 64, b"done", b"run 1", b"done 1 x"):
    if os.fork() == 0:
        os.write(4, text)
        os._exit(0)
    os.wait()
for fd in (1, 2):
    os.write(fd, FRAME)
print("to the end")
"""

    async def scene(console: Console, sandbox: Sandbox) -> None:
        frame = FRAME.pack(DONE, 1, 2) + b"{}"
        result = await console.call(forge.replace("FRAME", repr(frame)), timeout=60)
        assert (result.status, result.state) == ("ok", "kept")
        assert result.output == frame * 2 + b"to the end\n"
        # The keeper's own pipes are out of reach: it is not dumpable.
        look = "import os\nfor n in os.listdir('/proc'):\n"
        look += "    if n.isdigit() and int(n) not in (os.getpid(), os.getppid()):\n"
        look += "        try: print(os.listdir(f'/proc/{n}/fd'))\n        except PermissionError: print('closed')"
        assert await say(console, look) == ("ok", b"closed\nclosed\n")
        own = await console.call("os.write(4, b'done 3 0'); print('late')", timeout=60)  # one's own end, before the end
        assert (own.status, own.state) in (("ok", "kept"), ("error", "kept"))
        assert (await console.call("1 + 1", timeout=60)).state in ("kept", "restored", "lost")

    play("bubblewrap", "python", scene)


KILL_KEEPER = """import os
os.kill(sorted(int(name) for name in os.listdir('/proc') if name.isdigit())[1], 9)
while True: pass"""


@pytest.mark.parametrize(
    "code",
    ["import os; os.kill(-1, 9)", "import os; os.kill(os.getppid(), 9); os.kill(os.getpid(), 9)",
     KILL_KEEPER,
     "import os; os.closerange(0, 64)\nwhile True: pass", "import os; os.closerange(0, 64)",
     "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"],
    ids=["all", "holder", "keeper", "descriptors-busy", "descriptors", "bomb"],
)  # fmt: skip
def test_a_console_that_kills_itself_is_lost_or_restored_and_never_hangs(code: str) -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        assert (await console.call("x = 1; open('kept', 'w').close()", timeout=60)).status == "ok"
        result = await console.call(code, timeout=1)
        assert result.status in ("ended", "timeout"), result
        again: CallResult = await console.call("print('x' in globals())", timeout=60)
        assert again.output == (b"True\n" if result.state in ("kept", "restored") else b"False\n"), (result, again)
        assert await sandbox.read_file("kept", 10) == b""

    play("bubblewrap", "python", scene)


class Liar:
    """A process that says what it was told, as a keeper that hostile code took over would."""

    def __init__(self, *says: bytes) -> None:
        self.says, self.killed = [FRAME.pack(READY, 0, 0), *says], False

    async def send(self, data: bytes) -> None: ...

    async def recv(self, max_bytes: int, *, timeout: float) -> bytes:
        if self.says:
            return self.says.pop(0)
        await asyncio.sleep(0 if self.killed else 0.01)
        return b""

    async def kill(self) -> None:
        self.killed = True


class LiarsSandbox:
    def __init__(self, liar: Liar) -> None:
        self.liar = liar

    async def spawn(self, argv: list[str]) -> Process:
        return self.liar


@pytest.mark.parametrize(
    "said",
    [FRAME.pack(9, 1, 0), FRAME.pack(OUTPUT, 1, 1 << 31), FRAME.pack(OUTPUT, 2, 0), FRAME.pack(DONE, 1, 2) + b"{}",
     FRAME.pack(DONE, 1, 5) + b"[[[[[", FRAME.pack(READY, 1, 0), FRAME.pack(DONE, 1, 4) + b"null", b"x" * 100, b"",
     FRAME.pack(DONE, 1, 52) + b'{"code":true,"state":"kept","left":[],"ended":false}'],
)  # fmt: skip
def test_a_keeper_that_breaks_the_protocol_is_killed(said: bytes) -> None:
    async def run() -> None:
        liar = Liar(said)
        console = await console_module.start(LiarsSandbox(liar), "python")  # type: ignore[arg-type]
        result = await console.call("1", timeout=60)
        assert (result.status, result.state, result.exit_code) == ("ended", "lost", None)
        assert liar.killed

    asyncio.run(run())


def test_a_console_is_refused_or_closed() -> None:
    async def scene(console: Console, sandbox: Sandbox) -> None:
        await console.close()
        with pytest.raises(SandboxError, match="closed"):
            await console.call("1", timeout=60)
        with pytest.raises(ValueError, match="perl"):
            await open_console(sandbox, "perl")  # type: ignore[arg-type]
        cancelled = await open_console(sandbox, "python")
        task = asyncio.ensure_future(cancelled.call("x = 1\nwhile True: pass", timeout=600))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await say(cancelled, "'x' in globals()") == ("ok", b"False\n")

    play("bubblewrap", "python", scene)
