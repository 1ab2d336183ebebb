"""The keeper of a console inside a sandbox: it starts the interpreter, passes calls on, ends what they left.

Sent to the sandbox as text, so it imports only the standard library. It shares neither memory nor pipes with the
interpreter: it is not dumpable, speaks with the host on pipes of its own, and takes the interpreter's word for nothing
but the end of a call, from the process that runs it (the kernel says who wrote).

    host ── frames ── this process ── requests ──→ interpreter (holder ── forks ── runner of the call)
                                   ←── output, reports ──┘

Frames, both ways: kind, number of the call, size, and that many bytes.

    host → here   CALL code    INTERRUPT   KILL
    here → host   READY   OUTPUT bytes   DONE JSON: code, state, left, ended
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Collection
from typing import Any

FRAME = struct.Struct("!BII")
CALL, INTERRUPT, KILL, READY, OUTPUT, DONE = 1, 2, 3, 4, 5, 6
REQUEST = struct.Struct("!II")
CREDENTIALS = struct.Struct("=iii")
CHUNK = 1 << 16
MAX_LEFT, MAX_COMMAND = 32, 200
SET_DUMPABLE, SET_CHILD_SUBREAPER = 4, 36

SHELL_START = "exec 2>&1; set +H +o history; unset PROMPT_COMMAND MAILCHECK; HISTFILE=\n"
# Where bash could not fork a background job (254, or 130 when interrupted at that), its next command waits for the job
# before that one, however long it runs: unless bash has no record of it.
SHELL_END = (
    "case $?:${{!-}} in (254:?*|130:?*) builtin eval "
    "\"{{ builtin disown ${{!}} || :; }} 2>/dev/null; builtin printf 'done {ident} $?' >&9\";; "
    "(*) builtin printf 'done {ident} %d' \"$?\" >&9;; esac\n"
)


def read_exactly(descriptor: int, size: int) -> bytes:
    """Read ``size`` bytes. Raises EOFError where there are fewer."""
    data = b""
    while len(data) < size:
        more = os.read(descriptor, size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Driver:
    """One console: an interpreter at rest, or a call under way."""

    def __init__(self, kind: str, background: bool, repl: str) -> None:
        self.kind, self.background, self.repl = kind, background, repl
        self.host_in, self.host_out = os.dup(0), os.dup(1)
        null = os.open(os.devnull, os.O_RDWR)
        for target in (0, 1, 2):
            os.dup2(null, target)
        self.wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.ident = 0
        """Number of the call under way, 0 for none."""
        self.holder = self.runner = 0
        """Who has the state from before the call, and who runs it: the same process in a shell and beside threads."""
        self.ended = 0
        """How the last interpreter ended."""
        self.interrupted = False
        self.before: set[int] = set()
        """Processes of earlier calls, where those may go on."""
        self.requests = self.output = -1
        self.reports: socket.socket | None = None
        self.deaf = False
        self.start()

    def send(self, kind: int, data: bytes = b"") -> None:
        write_all(self.host_out, FRAME.pack(kind, self.ident, len(data)) + data)

    def start(self) -> None:
        """Start a fresh interpreter."""
        for descriptor in (self.requests, self.output):
            if descriptor >= 0:
                os.close(descriptor)
        if self.reports is not None:
            self.reports.close()
        source, self.requests = os.pipe()
        self.output, sink = os.pipe()
        self.reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reports.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.reports.setblocking(False)
        os.set_blocking(self.output, False)
        pid = os.fork()
        if pid == 0:
            try:
                self.become(source, sink, theirs.fileno())
            finally:
                os._exit(127)
        for descriptor in (source, sink):
            os.close(descriptor)
        theirs.close()
        self.holder, self.runner, self.deaf = pid, 0, False
        if self.kind == "shell":
            write_all(self.requests, SHELL_START.encode())

    def become(self, source: int, sink: int, reports: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        shell = self.kind == "shell"
        # A shell reads its commands from stdin and has a report's descriptor at 9, above those that scripts use.
        fds = {0: source, 2: sink, 9: reports} if shell else {3: source, 2: sink, 4: reports}
        fds[1] = sink
        for target, fd in {target: _above(fd) for target, fd in fds.items()}.items():
            os.dup2(fd, target)
        os.closerange(10 if shell else 5, 1 << 16)
        if shell:
            os.closerange(3, 9)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says of a missing terminal
            os.closerange(3, 9)
            os.environ.update(PS1="", PS2="", TERM="dumb", PAGER="cat", GIT_PAGER="cat")
            os.execvp("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])
        os.environ.setdefault("MPLBACKEND", "Agg")
        os.execvp("python3", ["python3", "-I", "-u", "-X", "utf8", "-c", self.repl])

    def serve(self) -> None:
        """Serve the host until it closes its end, and then end everything."""
        self.send(READY)
        try:
            while True:
                assert self.reports is not None
                # What others print between the calls waits in the pipe, so that this process never waits for the host.
                inside: list[Any] = [self.output, *([] if self.deaf else [self.reports])] if self.ident else []
                ready, _, _ = select.select([self.host_in, self.wake, *inside], [], [])
                if self.output in ready:
                    self.pass_output()
                if self.reports in ready:
                    self.take_report()
                if self.wake in ready:
                    os.read(self.wake, 4096)
                    self.reap()
                if self.host_in in ready:
                    self.take_frame()
        except (EOFError, BrokenPipeError):
            self.end(set())

    def take_frame(self) -> None:
        kind, ident, size = FRAME.unpack(read_exactly(self.host_in, FRAME.size))
        data = read_exactly(self.host_in, size)
        if kind == CALL:
            self.begin(ident, data)
        elif ident == self.ident and kind == INTERRUPT:
            self.interrupted = True
            self.interrupt()
        elif ident == self.ident and kind == KILL:
            self.kill()

    def begin(self, ident: int, code: bytes) -> None:
        self.reap()
        self.ident, self.interrupted = ident, False
        if self.holder == 0:  # it ended between the calls
            self.finish(0, self.ended, "lost", ended=True)
            return
        self.before = self.strays() - {self.holder} if self.background else set()
        self.runner = self.holder if self.kind == "shell" else 0
        self.signal(self.holder, signal.SIGCONT)
        request = REQUEST.pack(ident, len(code)) + code
        if self.kind == "shell":
            # The second line runs also where the first one was interrupted or failed as a whole.
            text = f"eval {shlex.quote(code.decode())} </dev/null 9>&-\n{SHELL_END.format(ident=ident)}"
            request = text.encode()
        try:
            self.feed(request)
        except BrokenPipeError:
            self.reap()

    def feed(self, request: bytes) -> None:
        """Write a request, and pass output on meanwhile: an interpreter may be slow to read."""
        os.set_blocking(self.requests, False)
        view = memoryview(request)
        while view:
            ready, writable, _ = select.select([self.output, self.host_in], [self.requests], [])
            if self.output in ready:
                self.pass_output()
            if writable:
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(self.requests, view) :]
            elif self.host_in in ready:
                return  # it does not read, and the host has something to say of that

    def pass_output(self) -> bool:
        try:
            data = os.read(self.output, CHUNK)
        except BlockingIOError:
            return False
        if data:
            self.send(OUTPUT, data)
        return bool(data)

    def take_report(self) -> None:
        """Take ``run N``, ``done N CODE`` or ``fell N CODE`` from a process that may say so, and nothing else."""
        assert self.reports is not None
        try:
            data, ancillary, _, _ = self.reports.recvmsg(64, socket.CMSG_SPACE(CREDENTIALS.size))
        except OSError:
            return
        pid = next((CREDENTIALS.unpack(value)[0] for _, kind, value in ancillary if kind == socket.SCM_CREDENTIALS), 0)
        words = data.split()
        if (
            not data and not pid
        ):  # nobody is left to report: how the process ended is seen by its end, or by the deadline
            self.deaf = True
            return
        if len(words) < 2 or words[1] != str(self.ident).encode():
            return
        if words[0] == b"run" and not self.runner and pid:
            self.runner = pid
            if self.interrupted:
                self.interrupt()
        elif words[0] == b"done" and pid == self.runner:
            self.finish(pid, _code(words), "kept")
        elif words[0] == b"fell" and pid == self.holder != self.runner:
            self.finish(pid, _code(words), "restored", ended=True)

    def interrupt(self) -> None:
        if self.kind == "shell":
            # The shell first, and what reads from others before them: an end of what it reads would end it well.
            for pid in sorted(self.strays(self.before), key=lambda pid: (pid != self.holder, -pid)):
                self.signal(pid, signal.SIGINT)
        elif self.runner:
            self.signal(self.runner, signal.SIGINT)

    def kill(self) -> None:
        """Kill what runs the call, all but the state from before it where another process has that."""
        if self.kind == "shell" and self.strays(self.before) - {self.holder}:
            self.end({self.holder}, self.before)
            self.signal(self.holder, signal.SIGINT)
            return
        apart = self.holder if self.holder != self.runner else 0
        self.end({apart}, self.before)

    def finish(self, keep: int, code: int, state: str, *, ended: bool = False) -> None:
        """Report the end of a call, after which ``keep`` alone goes on, with what background work there may be."""
        old = self.holder
        self.holder, self.runner = keep, 0
        others = self.strays() - {keep, old}
        if self.background:
            self.signal(old if old != keep else 0, signal.SIGKILL)
        left = sorted(filter(None, map(_command, others)))[:MAX_LEFT]
        if not self.background:
            self.signal(keep, signal.SIGSTOP)  # its threads stand still between the calls
            self.end({keep})
        while self.pass_output():
            if self.background:
                break
        if not keep:
            self.start()
        report = {"code": code, "state": state, "left": left, "ended": ended}
        self.send(DONE, json.dumps(report).encode())
        self.ident = 0

    def reap(self) -> None:
        """Collect the dead, and end the call where its interpreter is among them."""
        gone = False
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                if pid in (self.holder, self.runner):
                    gone, self.ended = True, os.waitstatus_to_exitcode(status)
                    self.holder = 0 if pid == self.holder else self.holder
                    self.runner = 0 if pid == self.runner else self.runner
        # A runner without its holder goes on, and a holder without its runner says so itself.
        if gone and self.ident and not self.holder and not self.runner:
            self.finish(0, self.ended, "lost", ended=True)

    def strays(self, apart: Collection[int] = ()) -> set[int]:
        """Find every process below this one, but for ``apart`` and what is below those."""
        parents: dict[int, int] = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                    if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
                        parents[int(name)] = int(fields[1])
        mine, own = set(), os.getpid()
        for pid in parents:
            above, steps = pid, 0
            while above in parents and above != own and above not in apart and steps <= len(parents):
                above, steps = parents[above], steps + 1
            if above == own and pid != own:
                mine.add(pid)
        return mine

    def end(self, keep: set[int], apart: Collection[int] = ()) -> None:
        """Stop all but ``keep``, and ``apart`` with what is below it, until nobody forks, and kill it."""
        stopped: set[int] = set()
        for _ in range(1000):
            fresh = self.strays(apart) - keep - stopped
            if not fresh:
                break
            for pid in fresh:
                self.signal(pid, signal.SIGSTOP)
            stopped |= fresh
        for pid in stopped:
            self.signal(pid, signal.SIGKILL)
        for _ in range(4000):
            if not self.strays() & stopped:
                break
            time.sleep(0.0005)

    def signal(self, pid: int, number: int) -> None:
        if pid > 1:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _above(descriptor: int) -> int:
    """Duplicate a descriptor to a number above those that an interpreter gets."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 32)


def _code(words: list[bytes]) -> int:
    with contextlib.suppress(ValueError, IndexError):
        return max(-255, min(int(words[2][:8]), 255))
    return 1


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            text = file.read(MAX_COMMAND).replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""
    return f"{pid} {text}" if text else ""


def main(argv: list[str]) -> None:
    if argv[1] == "shell" and shutil.which("bash") is None:
        sys.exit("there is no bash in this sandbox")
    libc: Any = ctypes.CDLL(None, use_errno=True)
    # Without the first the interpreter could write into the pipe to the host; without the second, orphans get away.
    if libc.prctl(SET_DUMPABLE, 0, 0, 0, 0) or libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    Driver(argv[1], argv[2] == "background", argv[3]).serve()


if __name__ == "__main__" and len(sys.argv) == 4:
    main(sys.argv)
