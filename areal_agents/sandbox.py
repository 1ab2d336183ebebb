"""The sandbox contract: hostile code runs inside, and only bytes come out.

A *backend* proves itself with ``probe`` and opens *sessions*. A session is one episode's private ``/work``. ``exec``
never raises for what the code does (that is an ``ExecResult``). It raises ``SandboxError`` when the sandbox itself
failed. Implementations live in ``areal_agents.sandboxes``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Final, Literal, Protocol, runtime_checkable

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


MAX_TIMEOUT: Final = 10**7
"""Seconds of the longest call."""
MAX_OUTPUT: Final = 1 << 31
"""Bytes of the longest output."""
MAX_SERVICES: Final = 8
MIN_SERVICE_MEMORY: Final = 32 << 20
"""Bytes. Pid 1 of a service takes about 12 MB of them."""
_BOUNDS: Final = {
    "memory": (16 << 20, 1 << 50, "bytes, and pid 1 alone takes 12 MB"),
    "cpu_seconds": (1, 10**9, "seconds"),
    "processes": (1, 1 << 20, "processes"),
    "disk": (1 << 12, 1 << 50, "bytes, and a page is the least"),  # of 0 bytes, a file system in memory has no bound
    "open_files": (64, 1 << 20, "files, and a console alone takes some 40"),
}
"""The least and the most that a limit may be, and of what."""
_TAKEN: Final = (
    "localhost", "sandbox",
    *(f"ip6-{name}" for name in ("localhost", "loopback", "localnet", "mcastprefix", "allnodes", "allrouters")),
)  # fmt: skip
"""Names that mean another host inside: an engine writes them to /etc/hosts."""

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


def _beyond(counts: Mapping[str, tuple[object, int, int, str]]) -> str:
    """Say which of some limits, each with its least, its most and what it counts, cannot be, or return ""."""
    for name, (value, least, most, what) in counts.items():
        if type(value) is not int:
            return f"{name}={value!r}: its limits must be whole numbers, of {what}"
        if not least <= value <= most:
            return f"{name}={value}: it must be at least {least} and at most {most} {what}"
    return ""


def _is_number(value: object, least: float, most: float) -> bool:
    """Say whether a limit is a number (no NaN, no truth value) of a size that can be."""
    return type(value) is not bool and isinstance(value, int | float) and least <= value <= most


def check_call(timeout: float, max_output: int) -> None:
    """Raise ConfigError for what is no limit of a call: seconds that are no number, say."""
    if not _is_number(timeout, 0, MAX_TIMEOUT):
        raise ConfigError(f"timeout={timeout!r}: it must be a number of seconds, at least 0 and at most {MAX_TIMEOUT}.")
    if type(max_output) is not int or not 0 <= max_output <= MAX_OUTPUT:
        raise ConfigError(
            f"max_output={max_output!r}: it must be a whole number of bytes, at least 0 and at most {MAX_OUTPUT}."
        )


def _is_host_name(name: str) -> bool:
    """Say whether code inside finds a host by this name: a number (``7``, ``0x7f``) is an address by itself."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        return False
    return name not in _TAKEN and not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name)


@dataclass(frozen=True, slots=True)
class Service:
    """A container beside a session: a database, a web app.

    It starts before the session's first call and is discarded with it. The session reaches it by its name, on a network
    that only this session and its services are on. It has no other network, a read-only root, and the folders that its
    image declares as volumes, ``writable`` ones, /tmp, /run, /var/tmp and /dev/shm are empty and in memory. Where it
    ends before its session, the session ends with a SandboxError.
    """

    name: str
    """Its host name: small letters, digits and ``-``."""
    image: str
    port: int = 0
    """It has started when this TCP port takes a connection of the session; 0 is not tried."""
    ready: tuple[str, ...] = ()
    """It has started when this program, run inside it, ends with 0; empty is not tried."""
    command: tuple[str, ...] = ()
    """The program and its arguments, in place of the image's own."""
    environment: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    """Variables besides the image's own. What is secret among them is in no message."""
    writable: tuple[str, ...] = ()
    """Folders that it must be able to write to."""
    user: str = ""
    """Whom it runs as, a name or numbers; "" is the image's user, which is often root with few capabilities."""
    memory: int = 512 << 20
    processes: int = 128
    cpus: float = 1.0
    disk: int = 256 << 20
    """Size of each folder that it may write to. What lies there counts as memory too."""
    start_seconds: float = 120.0
    """How long it may take to start."""

    def __post_init__(self) -> None:
        """Raise ConfigError for what no container can be made of."""
        if not _is_host_name(self.name):
            raise ConfigError(
                f"service {self.name!r}: its name must be a host name: small letters, digits, '-', and no number."
            )
        if not isinstance(self.environment, Mapping):
            given = type(self.environment).__name__
            raise ConfigError(f"service {self.name!r}: environment must be names with values, not a {given}.")
        object.__setattr__(self, "environment", dict(self.environment))
        lists = {"ready": self.ready, "command": self.command, "writable": self.writable}
        texts = [part for parts in lists.values() if isinstance(parts, tuple) for part in parts]
        texts += [text for pair in self.environment.items() for text in pair] + [self.image, self.user]
        bounds = _BOUNDS | {"memory": (MIN_SERVICE_MEMORY, 1 << 50, "bytes (32 MiB at least)")}
        counts = {name: (getattr(self, name), *bounds[name]) for name in ("memory", "processes", "disk")}
        problem = ""
        if wrong := [name for name, parts in lists.items() if not isinstance(parts, tuple)]:
            problem = f"{wrong[0]} must be a tuple of texts, not a {type(lists[wrong[0]]).__name__}"
        elif wrong := [repr(text) for text in texts if not isinstance(text, str) or "\0" in text]:
            problem = f"{wrong[0]} is no text, or has a NUL"
        elif not self.image:
            problem = "it has no image"
        elif type(self.port) is not int or not 0 <= self.port < 1 << 16:
            problem = f"port {self.port!r} is none"
        elif not (self.port or self.ready):
            problem = "say how it is seen that it has started: port=5432, or ready=('pg_isready',)"
        elif wrong := [p for p in self.writable if not re.fullmatch(r"(/(?!\.{1,2}(/|$))[^/:,\n]+)+", p)]:
            problem = f"writable {wrong[0]!r} is no absolute path of a folder"
        elif wrong := [name for name in self.environment if not name or "=" in name]:
            problem = f"{wrong[0]!r} is no name of a variable"
        elif problem := _beyond(counts):
            pass
        elif not _is_number(self.cpus, 0.01, 1024):
            problem = f"cpus={self.cpus!r}: write a number such as 0.5 or 2"
        elif not _is_number(self.start_seconds, 1e-3, 1e6):
            problem = f"start_seconds={self.start_seconds!r}: it must be more than 0, and at most a million"
        if problem:
            raise ConfigError(f"service {self.name!r}: {problem}.")


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
    services: tuple[Service, ...] = ()
    """Containers beside it, for backends that have images."""

    def __post_init__(self) -> None:
        """Raise ConfigError for limits that are none, and for services that cannot be told apart."""
        if problem := _beyond({name: (getattr(self, name), *bound) for name, bound in _BOUNDS.items()}):
            raise ConfigError(f"SandboxSpec: {problem}.")
        if not isinstance(self.image, str) or re.search(r"[\0\n]", self.image):
            raise ConfigError(f"SandboxSpec: image={self.image!r} is no name of an image, and no path.")
        if not isinstance(self.services, tuple) or not all(isinstance(one, Service) for one in self.services):
            raise ConfigError(f"services must be a tuple of Service, not {self.services!r}.")
        names = [service.name for service in self.services]
        if len(set(names)) < len(names) or len(names) > MAX_SERVICES:
            raise ConfigError(f"services must be a tuple of at most {MAX_SERVICES} with different names: {names}.")

    def refuse_image(self, backend: str) -> None:
        """Raise ConfigError where the spec asks for an image, the session's or a service's: ``backend`` has none."""
        if self.image:
            raise ConfigError(f"sandbox {backend!r} has no images, and image {self.image!r} is asked for: use docker.")
        for service in self.services:
            raise ConfigError(f"sandbox {backend!r} has no services, and {service.name!r} is asked for: use docker.")


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
            ValueError: for a NUL in shell commands, text that is no UTF-8, or a limit that is none.
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
            ConfigError: for a timeout or a limit that is none (``check_call``).
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

        It is lazy: resources are taken at the first call that needs them. Raises ConfigError for an image or services
        where the backend has none (``SandboxSpec.refuse_image``).
        """
        ...

    async def aclose(self) -> None:
        """Free pools and helper processes, and end sessions that are still open."""
        ...


@runtime_checkable
class Preparing(SandboxBackend, Protocol):
    """A backend that can have what sessions need ready ahead of them."""

    async def prepare(self, specs: Iterable[SandboxSpec]) -> None:
        """Pull and build images, with progress on standard error.

        Raises SandboxUnavailable and ConfigError where a spec's session could not be opened.
        """
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
