"""A process that has imported SymPy, and forks the verifier's workers in milliseconds: as the host sees it.

    ForkServer.fork ── a socket for the worker ──▶ worker.py, once a pool ── fork ──▶ a worker, which reads that socket
              .end  ── its number ───────────────▶           kills it, and says how it ended if it had ended before

Workers share the memory of what was imported. They end with their server, and it ends with its host. Another module
that calls ``worker.serve`` may stand in worker.py's place, for code of others that must be ended by a deadline too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import areal_agents
from areal_agents.errors import InfraError

NUMBER = 8
"""Bytes of each message between the two: a process's number, or one of those below."""
FORK = 0
READY = 0
ENDED_HERE = 1 << 32
"""No exit status: the worker lived until it was ended."""
_START_SECONDS = 120.0
_REPLY_SECONDS = 30.0
"""A server that was stopped answers nothing."""


def number(value: int) -> bytes:
    """Spell a message."""
    return value.to_bytes(NUMBER, "big", signed=True)


@dataclass(frozen=True, slots=True)
class Forked:
    """A worker, and the socket that requests and replies go through."""

    pid: int
    socket: socket.socket
    server: subprocess.Popen[bytes]


class _Gone(Exception):
    """The server ended, or does not answer."""


class ForkServer:
    """One process, started when it is first needed and again after its end. Threads may share it."""

    def __init__(
        self,
        module: str = "areal_agents.rewards.mathematics.worker",
        what: str = "the mathematics verifier",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start nothing yet.

        Args:
            module: whose ``__main__`` calls ``worker.serve``.
            what: begins the messages.
            environment: variables of the process, over those of this one.
        """
        self._module, self._what, self._environment = module, what, environment
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def fork(self) -> Forked:
        """Return a new worker. Raises InfraError where there can be none."""
        with self._lock:
            for _ in range(2):  # somebody may have ended the server, or end it now
                with contextlib.suppress(_Gone):
                    return self._forked()
                self._close()
        raise InfraError(f"{self._what}'s process did not start: its message stands on stderr")

    def end(self, worker: Forked, *, hung_up: bool = False) -> int | None:
        """Kill a worker, and return the exit status with which it had ended before, below zero for a signal.

        None where it had not. ``hung_up`` says that its socket is closed, so that it is about to end.
        """
        worker.socket.close()
        with self._lock:
            if worker.server is self._process:
                try:
                    status = self._asked(-worker.pid if hung_up else worker.pid)
                    return None if status == ENDED_HERE else status
                except _Gone:
                    self._close()
        return -signal.SIGKILL  # it ended with its server

    def close(self) -> None:
        """End the server, and with it its workers."""
        with self._lock:
            self._close()

    def _forked(self) -> Forked:
        if self._process is None:
            self._start()
        assert self._process is not None
        mine, other = socket.socketpair()
        try:
            with other:
                pid = self._asked(FORK, other)
        except _Gone:
            mine.close()
            raise
        if pid < 0:
            mine.close()
            raise InfraError(f"{self._what} cannot fork a worker: {os.strerror(-pid)}")
        return Forked(pid, mine, self._process)

    def _asked(self, what: int, passed: socket.socket | None = None) -> int:
        """Send a message and return the reply. Raises _Gone where there is none."""
        assert self._control is not None
        try:
            socket.send_fds(self._control, [number(what)], [passed.fileno()] if passed else [])
            return self._reply()
        except OSError as error:  # TimeoutError too
            raise _Gone from error

    def _reply(self) -> int:
        assert self._control is not None
        reply = self._control.recv(NUMBER, socket.MSG_WAITALL)
        if len(reply) < NUMBER:
            raise _Gone
        return int.from_bytes(reply, "big", signed=True)

    def _start(self) -> None:
        root = str(Path(areal_agents.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._control, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
                | dict(self._environment),
                start_new_session=True,  # Ctrl-C is the run's
            )
        self._control.settimeout(_START_SECONDS)
        try:
            self._reply()
        except OSError as error:
            raise _Gone from error
        self._control.settimeout(_REPLY_SECONDS)

    def _close(self) -> None:
        process, control, self._process, self._control = self._process, self._control, None, None
        if control is not None:
            control.close()
        if process is not None:
            process.kill()
            process.wait()
