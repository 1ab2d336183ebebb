"""Threads or processes of a program whose memory only rlimits bound. Pid 1 of a sandbox runs this file.

NPROC counts threads as it counts processes, and each process may fill an address space of its own, each thread may not.
So a program starts alone with all the memory and many places, and what it does first decides, once:

    its first thread    it stays one process: all the memory, many threads, every fork fails
    its first fork      few places, and a share of the memory for each: what is alive can never hold more than all

A seccomp filter halts ``clone``, ``fork`` and ``vfork`` until pid 1 has answered. Their arguments are registers, which
nobody changes meanwhile, and a program that has neither forked nor started a thread does nothing while it waits.

Only Python programs pass the gate. A halted ``fork`` fails when a signal comes whose handler does not restart calls, as
dash's for SIGCHLD, so a shell that starts several programs at once would fail now and then. Others have shares from
the start.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import resource
import select
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CLONE_THREAD = 0x10000
SET_MODE_FILTER, NEW_LISTENER = 1, 1 << 3
RECEIVE, SEND = 0xC0502100, 0xC0182101
NOTE = struct.Struct("=QIIiIQQ40x")
"""The start of ``seccomp_notif``: id, pid, flags, number of the call, architecture, instruction, first argument."""
ANSWER = struct.Struct("=QqiI")
CONTINUE = 1
STACK = 256 << 20
ROOM = 64 << 20
"""Address space that a fork of an interpreter with imported modules gets beside what those have."""
PYTHON = re.compile(r"(\S*/)?python[0-9.]*")
SHELL_PYTHON = re.compile(r"exec (\S*/)?python[0-9.]*( [^|;&]*)?( 2>&1)?")
"""What a shell is told that makes way for Python."""


def passes(argv: Sequence[str]) -> bool:
    """Say whether a program is Python."""
    if list(argv[:2]) == ["/bin/sh", "-c"]:
        return len(argv) == 3 and SHELL_PYTHON.fullmatch(argv[2]) is not None
    return PYTHON.fullmatch(argv[0]) is not None


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def load(gate: Mapping[str, Any], name: str, flags: int) -> int:
    """Put this process under a filter of the gate, and return the listener's descriptor where ``flags`` ask for one.

    Raises OSError.
    """
    code = bytes.fromhex(gate[name])
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    done = libc.syscall(gate["seccomp"], SET_MODE_FILTER, flags, ctypes.byref(program))
    if done < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(done)


def enter(gate: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Pass the gate, and return the listener for pid 1, or -1 where there is none. Raises OSError.

    There is none for a program that starts others as a rule, and on a kernel that gives none.
    """
    if passes(argv):
        with contextlib.suppress(OSError):
            return load(gate, "halting", NEW_LISTENER)
    load(gate, "plain", 0)
    return -1


def deepen_stack() -> None:
    """Let the first thread's stack grow as deep recursion needs. It counts as memory where it is touched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    room = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_STACK, (room, hard))


def set_limits(limits: Mapping[str, int], pid: int = 0) -> None:
    """Set rlimits, of this process by default."""
    for name, value in limits.items():
        # One second between the soft and the hard limit leaves SIGXCPU, which names the cause, ahead of SIGKILL.
        hard = value + 1 if name == "CPU" else value
        resource.prlimit(pid, getattr(resource, f"RLIMIT_{name}"), (value, hard))


def hard_limits(names: Iterable[str]) -> dict[str, int]:
    """Return this process's hard limits: what programs may have at most; -1 is no bound."""
    return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in names}


class Gate:
    """The gate of one program, as pid 1 keeps it."""

    def __init__(self, gate: Mapping[str, Any], shared: Mapping[str, int], *, alone: bool) -> None:
        """Keep the gate of a program.

        Args:
            gate: what the host said of it.
            shared: limits of each process where there are several.
            alone: whether the program started with all the memory, and so has not decided yet.
        """
        self.clone = gate["clone"]
        self.shared = {name: shared[name] for name in ("AS", "NPROC")}
        self.choice = "" if alone else "processes"

    def answer(self, listener: int) -> None:
        """Answer one call that waits."""
        note = bytearray(NOTE.size)
        try:
            fcntl.ioctl(listener, RECEIVE, note)
        except OSError:
            return  # the caller was killed meanwhile, or a signal came first and the poll finds the call again
        ident, pid, _, number, _, _, flags = NOTE.unpack(note)
        try:
            error = self.decide(pid, number == self.clone and bool(flags & CLONE_THREAD))
        except OSError as failure:  # of a caller that is no more
            error = failure.errno or errno.EAGAIN
        answer = ANSWER.pack(ident, 0, -error, 0 if error else CONTINUE)
        with contextlib.suppress(FileNotFoundError):  # the caller was killed meanwhile
            while True:
                try:
                    fcntl.ioctl(listener, SEND, answer)
                except InterruptedError:
                    continue
                break

    def decide(self, pid: int, thread: bool) -> int:
        """Say with which errno a call fails, 0 for none."""
        if not self.choice and thread:
            self.choice = "threads"
        elif not self.choice:
            if address_space(pid) > self.shared["AS"]:
                return errno.ENOMEM
            set_limits(self.shared, pid)
            self.choice = "processes"
        return errno.EAGAIN if self.choice == "threads" and not thread else 0


class Gates:
    """The gates of all programs, whose listeners are in the poll of pid 1."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self.gates: dict[int, Gate] = {}

    def open(self, child: socket.socket, request: Mapping[str, Any]) -> None:
        """Take the listener that a program sent before it started: none, where its kernel has no such filter."""
        for listener in socket.recv_fds(child, 1, 1)[1]:
            self.gates[listener] = Gate(request["gate"], request["limits"], alone=request["alone"])
            self.poll.register(listener, select.POLLIN)

    def answer(self, ready: Mapping[int, int]) -> None:
        """Answer one call of each program that waits, given what the poll found."""
        for listener in self.gates.keys() & ready.keys():
            if ready[listener] & select.POLLIN:
                self.gates[listener].answer(listener)
            else:  # nobody is left behind this gate
                self.poll.unregister(listener)
                os.close(listener)
                del self.gates[listener]


def fits(request: Mapping[str, Any], held: int) -> dict[str, int] | None:
    """Return the limits of a program whose process has ``held`` bytes of address space before it does anything.

    Each process of it has as much, so there is place for fewer. Returns None where it has no room, and must start in an
    interpreter of its own. Beside a live one all have the same share, or they could hold more together than all.
    """
    limits: dict[str, int] = dict(request["limits"])
    if "AS" not in limits:
        return limits
    if "gate" not in request or not request["alone"]:
        return limits if limits["AS"] >= held + ROOM else None
    whole = request["gate"]["limits"]["AS"]
    places = min(limits["NPROC"] - 1, whole // (held + ROOM))
    return limits | {"AS": whole // places, "NPROC": places + 1} if places else None


def address_space(pid: int) -> int:
    """Read the bytes of address space that a process has."""
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
