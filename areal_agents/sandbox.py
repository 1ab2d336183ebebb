"""The sandbox contract: hostile code runs inside, and only bytes come out.

A *backend* proves itself with ``probe`` and opens *sessions*. A session is one episode's private ``/work``. ``exec``
never raises for what the code does (that is an ``ExecResult``). It raises ``SandboxError`` when the sandbox itself
failed. Implementations live in ``areal_agents.sandboxes``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal, Protocol

from areal_agents.errors import ConfigError, SandboxUnavailable
from areal_agents.utils.system import is_linux

ExecStatus = Literal["ok", "error", "timeout", "oom", "output_limit"]


@dataclass(frozen=True, slots=True)
class ExecResult:
    """The end of one process.

    ``stdout`` and ``stderr`` hold what it printed until its end, however it ended.
    """

    status: ExecStatus
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float


ConsoleKind = Literal["python", "shell"]
CallStatus = Literal["ok", "error", "timeout", "interrupted", "output_limit", "ended"]
ConsoleState = Literal["kept", "restored", "lost"]


@dataclass(frozen=True, slots=True)
class CallResult:
    """The end of one call to a console."""

    status: CallStatus
    """``ended``: the interpreter itself is gone, by its own code, a crash or the kernel (memory, CPU time)."""
    exit_code: int | None
    """Of the shell's last command; 0 or 1 of Python; minus a signal's number where one ended the interpreter."""
    output: bytes
    """What was printed, stdout and stderr as they came, at most ``max_output`` bytes."""
    state: ConsoleState
    """What the next call finds: what this one left, what was before this one, or a fresh interpreter."""
    left: tuple[str, ...]
    """Command lines of the processes that it left running: ended, or going on in a console with ``background``."""
    seconds: float


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """The limits of a session, with sizes in bytes and times in seconds."""

    memory: int = 512 << 20
    """Bound on everything the session's processes and tmpfs hold together."""
    cpu_seconds: int = 10
    """CPU time of one process."""
    processes: int = 64
    """Processes and threads at one time."""
    disk: int = 64 << 20
    """Size of /work, and separately of /tmp and /dev/shm."""
    open_files: int = 256
    image: str = ""
    """What the session runs in, for backends that have images; "" is the backend's own."""

    def refuse_image(self, backend: str) -> None:
        """Raise ConfigError where the spec names an image and ``backend`` has none."""
        if self.image:
            raise ConfigError(f"sandbox {backend!r} has no images, and image {self.image!r} is asked for: use docker.")


@dataclass(frozen=True, slots=True)
class Probe:
    """One self-probe: what was asked, whether it held, what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The self-probes of a backend, all of which held."""

    backend: str
    probes: tuple[Probe, ...] = ()
    memory_bound: str = ""
    """How total memory is bounded: ``cgroup-v1``, ``cgroup-v2``, ``systemd-scope`` or ``rlimits``."""
    notes: tuple[str, ...] = field(default=())


class Process(Protocol):
    """A process that lives across turns (a REPL, a shell)."""

    async def send(self, data: bytes) -> None: ...
    async def recv(self, max_bytes: int, *, timeout: float) -> bytes: ...
    async def kill(self) -> None: ...


class Console(Protocol):
    """A Python REPL or a shell that lives across turns, opened with ``open_console``.

    Its calls run one after the other in /work. What one prints is data: it ends no call and breaks no console.
    """

    async def call(self, code: str, *, timeout: float, max_output: int = 1 << 20) -> CallResult:
        """Run code to its end, whatever that is.

        Args:
            code: Python, whose last expression is echoed, or shell commands.
            timeout: seconds until it is interrupted, and killed where it goes on.
            max_output: bytes of output, beyond which it is interrupted too.

        Raises:
            SandboxError: when the sandbox itself failed.
            ValueError: for a NUL in shell commands, or text that is no UTF-8.
        """
        ...

    async def interrupt(self) -> None:
        """Interrupt the call under way, which ends with status ``interrupted``. Does nothing where there is none."""
        ...

    async def close(self) -> None: ...


class Sandbox(Protocol):
    """One session.

    Processes die after each ``exec``. Files in /work live until the session closes.
    """

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float, max_output: int = 1 << 20
    ) -> ExecResult:
        """Run a program in /work to its end, whatever that is.

        Args:
            argv: the program and its arguments.
            stdin: the bytes that the program reads.
            timeout: seconds until it is killed.
            max_output: bytes of stdout and stderr together, beyond which it is killed.

        Raises:
            SandboxError: when the sandbox itself failed.
        """
        ...

    async def spawn(self, argv: Sequence[str]) -> Process: ...
    async def write_file(self, path: str, data: bytes) -> None: ...
    async def read_file(self, path: str, max_bytes: int) -> bytes: ...
    async def snapshot(self) -> bytes: ...
    async def restore(self, data: bytes) -> None: ...


class SandboxBackend(Protocol):
    """A kind of sandbox, which opens sessions."""

    name: str

    async def probe(self) -> ProbeReport:
        """Prove the isolation from inside.

        Raises SandboxUnavailable with the failed probe and its remedy.
        """
        ...

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """Open a session.

        It is lazy: resources are taken at the first call that needs them.
        """
        ...

    async def aclose(self) -> None:
        """Free pools and helper processes, and end sessions that are still open."""
        ...


def require_linux(backend: str) -> None:
    """Raise SandboxUnavailable on a system without what ``backend`` is made of."""
    if not is_linux():
        raise SandboxUnavailable(
            backend,
            f"it needs Linux (memfd_create, pidfd_open and /proc), and the platform is {sys.platform}",
            "Use a Linux host, or an environment whose tools need no sandbox.",
        )


async def open_console(sandbox: Sandbox, kind: ConsoleKind, *, background: bool = False) -> Console:
    """Start a Python REPL or a shell in a session of any backend.

    Args:
        sandbox: the session. Its ``snapshot`` has the files, and nothing of the interpreter.
        kind: which of the two.
        background: processes that a call of the shell left running go on, and are listed; else they are ended.
    """
    console: Console = await importlib.import_module("areal_agents.sandboxes.console").start(
        sandbox, kind, background=background
    )
    return console


def backends() -> ModuleType:
    """Return ``areal_agents.sandboxes``. It is imported by name and late: the core does not depend on a collection."""
    return importlib.import_module("areal_agents.sandboxes")
