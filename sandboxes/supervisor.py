"""Process 1 inside a sandbox: it starts what the host asks for, kills what is left, and moves files.

Sent to the sandbox as text and run by a Python there, so it imports only the standard library and the modules that are
sent with it.
As pid 1 it cannot be signalled from inside, and it is not dumpable, so code with the same uid can neither read its
memory nor its descriptors. The host owns every pipe. This process sees requests and reports exit statuses, nothing
else.

Messages on the SEQPACKET control socket (big-endian, fixed size):

    host → here   START id kind   with descriptors: request (JSON), stdin, stdout, stderr
                  KILL  id 0
                  FORK  0  0    to the zygote: request (JSON), control socket of the new one, seccomp filter, stderr
    here → host   READY 0  0
                  EXIT  id status   exit code, or minus the signal number

Where it is told to, it imports modules before it says that it is ready, and runs Python programs in forks of itself.
The zygote is such a process too: it runs no program at all, and forks others like itself into fresh namespaces.

A ``run`` ends only when no process of it is left: everything that is not a live ``spawn`` or its descendant is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import Any

from areal_agents.sandboxes import fresh_namespaces, process_gate, warm_python, work_files

FRAME = struct.Struct("!Bii")
START, KILL, READY, EXIT, FORK = 1, 2, 3, 4, 5
RUN, SPAWN = 0, 1


def prctl_dumpable(value: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(4, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def child(request: dict[str, Any], fds: list[int], gate: socket.socket) -> int:
    """Become the requested process, or return an exit code where there is no program to become."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    for target, source in enumerate((*fds, gate.fileno())):
        os.dup2(source, target, inheritable=target < 3)
    os.closerange(4, 1 << 16)
    if request["op"] != "exec":
        return work_files.file_operation(request)
    prctl_dumpable(1)
    # The kernel then prefers this process over pid 1 when memory runs out.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    limits = request["limits"]
    if "gate" in request and (listener := process_gate.enter(request["gate"], request["argv"])) >= 0:
        socket.send_fds(socket.socket(fileno=3), [b"."], [listener])
        limits = limits | (request["gate"]["limits"] if request["alone"] else {})
    if "AS" not in limits:  # threads reserve as much address space each
        process_gate.deepen_stack()
    process_gate.set_limits(limits)
    os.chdir(request.get("folder", "/work"))
    if "warm" in request and (program := warm_python.program(request["argv"])) is not None:
        os.closerange(3, 4)  # the socket to this function's caller, which a new program would not have either
        os.environ.clear()
        os.environ.update(request["env"])
        return warm_python.run(program)
    try:
        os.execvpe(request["argv"][0], request["argv"], request["env"])
    except (OSError, ValueError) as error:
        os.write(2, f"{request['argv'][0][:200]}: {error}\n".encode("utf-8", "replace"))
        return 127 if isinstance(error, FileNotFoundError) else 126


class Supervisor:
    """The loop of pid 1, which serves the host's requests."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.running: dict[int, int] = {}
        self.spawned: dict[int, int] = {}
        self.gates = process_gate.Gates()
        self.wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Pid 1 is deaf to signals from inside, except to those with a handler: Python installs one for SIGINT.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def serve(self) -> None:
        self.control.send(FRAME.pack(READY, 0, 0))
        poll = self.gates.poll
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            self.gates.answer(ready)
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.reap()
            if self.control.fileno() in ready and not self.receive():
                return

    def receive(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.control, FRAME.size, 4)
        if not data:
            return False
        kind, ident, mode = FRAME.unpack(data)
        if kind == START:
            self.start(ident, mode, list(fds))
        else:
            for pid, job in (self.running | self.spawned).items():
                if job == ident:
                    os.kill(pid, signal.SIGKILL)
        return True

    def start(self, ident: int, mode: int, fds: list[int]) -> None:
        with open(fds[0], "rb") as file:
            file.seek(0)
            request = json.load(file)
        # A program beside a live one has a share of the memory from the start.
        request["alone"] = mode == RUN and not self.spawned
        if request["op"] == "exec" and "warm" in request and warm_python.program(request["argv"]) is not None:
            limits = process_gate.fits(request, process_gate.address_space(os.getpid()))
            if limits is None:
                del request["warm"]
            else:
                request["limits"] = limits
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            code = 125
            try:
                code = child(request, fds[1:], theirs)
            finally:
                os._exit(code)
        theirs.close()
        for descriptor in fds[1:]:
            os.close(descriptor)
        if request["op"] == "exec" and "gate" in request:
            self.gates.open(ours, request)
        ours.close()
        (self.spawned if mode == SPAWN else self.running)[pid] = ident

    def reap(self, flags: int = os.WNOHANG) -> bool:
        """Collect the dead and report them, and return False when no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, flags)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            code = os.waitstatus_to_exitcode(status)
            if pid in self.running:
                ident = self.running.pop(pid)
                self.sweep()
                self.ended(ident, code)
            elif pid in self.spawned:
                ident = self.spawned.pop(pid)
                # A sweep also kills what a running request started: while there is one, its own end sweeps.
                if not self.running:
                    self.sweep()
                self.ended(ident, code)

    def ended(self, ident: int, code: int) -> None:
        """Tell the host that a request is over."""
        self.control.send(FRAME.pack(EXIT, ident, code))

    def sweep(self) -> None:
        """Kill every process but this one and the live spawned trees, and wait until they are gone."""
        for _ in range(200):
            if not self.spawned:
                break
            doomed = self.strays()
            if not doomed:
                return
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
            self.reap()
        # Atomic in the kernel, so that no fork outruns it. Spawned trees go too when the scan above never came clean.
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        self.reap(0)

    def strays(self) -> list[int]:
        parents: dict[int, int] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and name != "1":
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                    # A zombie with threads is a process whose first thread alone has ended.
                    if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
                        parents[int(name)] = int(fields[1])
        return [pid for pid in parents if not self.protected(pid, parents)]

    def protected(self, pid: int, parents: dict[int, int]) -> bool:
        for _ in range(len(parents) + 1):
            if pid in self.spawned:
                return True
            if pid not in parents:
                return False
            pid = parents[pid]
        return False


def serve_forks(control: socket.socket) -> None:
    """Be the zygote: make one sandbox after the other, until the host closes its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the host sees each one's end itself
    control.send(FRAME.pack(READY, 0, 0))
    while True:
        data, fds, _, _ = socket.recv_fds(control, FRAME.size, 4)
        if not data:
            return
        try:
            if fresh_namespaces.fork() == 0:
                try:
                    control.close()
                    become_sandbox(list(fds))
                finally:
                    os._exit(0)
        except OSError as error:
            os.write(fds[3], str(error).encode())
        for descriptor in fds:
            os.close(descriptor)


def become_sandbox(fds: list[int]) -> None:
    """Be pid 1 of a sandbox that was forked, until its host closes its end."""
    request, control, program, errors = fds
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    try:
        with open(request, "rb") as file, open(program, "rb") as compiled:
            file.seek(0)
            compiled.seek(0)
            fresh_namespaces.settle(json.load(file), compiled.read())
    except OSError as error:
        os.write(2, str(error).encode())
        return
    os.close(errors)
    Supervisor(socket.socket(fileno=control)).serve()


def main(descriptor: int, preload: str = "", zygote: bool = False) -> None:
    prctl_dumpable(0)
    control = socket.socket(fileno=descriptor)
    if preload:
        try:
            warm_python.preload(preload.split(","))
        except Exception as error:  # noqa: BLE001  a module may raise anything; the host says it
            sys.exit(f"preload: {type(error).__name__}: {error}")
        work_files.empty("/work")  # where some keep their caches
    if zygote:
        serve_forks(control)
    else:
        Supervisor(control).serve()


if __name__ == "__main__" and 2 <= len(sys.argv) <= 4:
    main(int(sys.argv[1]), "".join(sys.argv[2:3]), len(sys.argv) == 4)
