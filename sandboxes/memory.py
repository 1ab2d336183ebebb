"""The bound on the memory of a whole session: a cgroup, else a systemd scope, else rlimits.

A cgroup bounds what all processes hold together. Without one, the number of processes times the address space of each
(RLIMIT_AS), plus the tmpfs sizes, must stay below the limit. Beside a cgroup nothing limits address space: threads
reserve far more than they touch (64 MB of heap and 8 MB of stack each).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from areal_agents.errors import ConfigError, SandboxError
from areal_agents.sandbox import SandboxSpec

Kind = Literal["cgroup-v1", "cgroup-v2", "systemd-scope", "rlimits"]

SUPERVISOR: Final = 24 << 20
"""What pid 1 of a sandbox and bwrap itself hold, with slack (measured: 12 MB resident)."""
MIN_ADDRESS_SPACE: Final = 96 << 20
"""Address space that one process gets at least: system Python with a little room."""
FEW: Final = 4
ROOMY: Final = 192 << 20
"""Address space of each where there are more than a few: a Python that imports numpy takes half of it."""

RECENT: Final = 60.0
"""Seconds within which a sandbox fills the cgroup that it has made."""
_OF_A_HOST: Final = re.compile(r"areal-agents-u([0-9]+)-[0-9]+")

STACK: Final = 2 << 20
"""Stack of each thread unless the program says otherwise, where address space is short."""


class Meter(Protocol):
    """The running bound of one session."""

    def attach(self, pid: int) -> None: ...
    def oom_kills(self) -> int: ...
    def close(self) -> None: ...


class MemoryBound(Protocol):
    """A way to bound sessions on this host."""

    @property
    def kind(self) -> Kind: ...
    def wrap(self, command: list[str], spec: SandboxSpec) -> list[str]: ...
    def environment(self) -> dict[str, str]: ...
    def limits(self, spec: SandboxSpec) -> dict[str, int]:
        """Return RLIMIT names and values for each process.

        Raises ConfigError for a spec that leaves no room for a process.
        """
        ...

    def meter(self, name: str, spec: SandboxSpec) -> Meter: ...


def _left_by_disk(spec: SandboxSpec) -> int:
    """Return the bytes left for processes when /work, /tmp and /dev/shm are full.

    The files count as memory. Without this room a full disk would leave nothing to kill but the sandbox itself. Raises
    ConfigError when no process fits.
    """
    left = spec.memory - 3 * spec.disk - SUPERVISOR
    if left < MIN_ADDRESS_SPACE:
        need = 3 * spec.disk + SUPERVISOR + MIN_ADDRESS_SPACE
        raise ConfigError(
            f"SandboxSpec(memory={spec.memory}, disk={spec.disk}) leaves no room for a process when /work, /tmp and "
            f"/dev/shm are full. Set memory to {need} or more, or disk lower."
        )
    return left


def _limits(spec: SandboxSpec, processes: int) -> dict[str, int]:
    """Return the RLIMIT values of one process, except for its address space.

    NPROC counts threads, and pid 1 of the sandbox takes one of its places.
    """
    return {
        "CPU": spec.cpu_seconds,
        "NPROC": processes + 1,
        "FSIZE": spec.disk,
        "CORE": 0,
        "NOFILE": spec.open_files,
    }


@dataclass(frozen=True, slots=True)
class CgroupMeter:
    """The cgroup of one session."""

    folder: Path
    version: Literal[1, 2]

    def attach(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def oom_kills(self) -> int:
        """Count the processes that the kernel killed here for memory."""
        file = self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")
        try:
            fields = dict(line.split() for line in file.read_text().splitlines())
        except OSError:
            return 0
        return int(fields.get("oom_kill", 0))

    def close(self) -> None:
        """Remove the cgroup.

        The kernel may need a moment after the last process, so this tries for about 0.1 s.
        """
        for _ in range(50):
            try:
                self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.002)
            else:
                return


@dataclass(frozen=True, slots=True)
class CgroupBound:
    """A bound by cgroups, one child of ``parent`` for each session.

    ``parent`` has the memory controller for its children.
    """

    parent: Path
    version: Literal[1, 2]

    @property
    def kind(self) -> Kind:
        return "cgroup-v1" if self.version == 1 else "cgroup-v2"

    def wrap(self, command: list[str], spec: SandboxSpec) -> list[str]:
        return command

    def environment(self) -> dict[str, str]:
        return {}

    def limits(self, spec: SandboxSpec) -> dict[str, int]:
        _left_by_disk(spec)
        return _limits(spec, spec.processes)

    def meter(self, name: str, spec: SandboxSpec) -> CgroupMeter:
        """Create the cgroup ``name`` with the limit set.

        Raises SandboxError where it cannot be created.
        """
        meter = CgroupMeter(self.parent / name, self.version)
        try:
            with contextlib.suppress(FileNotFoundError):
                meter.folder.rmdir()
            meter.folder.mkdir()
            if self.version == 1:
                (meter.folder / "memory.limit_in_bytes").write_text(str(spec.memory))
                swap = meter.folder / "memory.memsw.limit_in_bytes"
            else:
                (meter.folder / "memory.max").write_text(str(spec.memory))
                swap = meter.folder / "memory.swap.max"
            # v1 counts memory and swap together, v2 counts swap alone: both values leave no swap.
            if swap.exists():
                swap.write_text(str(spec.memory if self.version == 1 else 0))
        except OSError as error:
            raise SandboxError(f"cannot create the cgroup {meter.folder}: {error}") from error
        return meter

    def reap(self) -> None:
        """Remove the cgroups that killed hosts left: what was in them died with its host, and nobody takes their names.

        Those of slots are left to the next holder of the slot.
        """
        for folder in self.parent.iterdir():
            host = _OF_A_HOST.fullmatch(folder.name)
            if host is not None and not Path("/proc", host[1]).exists():
                with contextlib.suppress(OSError):  # another host removes it too, or it is not empty yet
                    # A host whose pid this namespace does not know may have made it just now, and fill it next.
                    if time.time() - folder.stat().st_mtime > RECENT:
                        folder.rmdir()


class NoMeter:
    """A meter for sessions without a cgroup."""

    def attach(self, pid: int) -> None:
        pass

    def oom_kills(self) -> int:
        return 0

    def close(self) -> None:
        pass


class ScopeMeter:
    """A meter that counts in the cgroup that systemd made.

    Systemd removes that cgroup with its last process.
    """

    def __init__(self) -> None:
        self._meter: CgroupMeter | None = None

    def attach(self, pid: int) -> None:
        """Find the cgroup that systemd put ``pid`` in."""
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                self._meter = CgroupMeter(Path("/sys/fs/cgroup") / path.lstrip("/"), 2)

    def oom_kills(self) -> int:
        return self._meter.oom_kills() if self._meter else 0

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class ScopeBound:
    """A bound by transient scopes of the user's systemd, one for each session."""

    @property
    def kind(self) -> Kind:
        return "systemd-scope"

    def wrap(self, command: list[str], spec: SandboxSpec) -> list[str]:
        properties = (f"MemoryMax={spec.memory}", "MemorySwapMax=0", f"TasksMax={spec.processes + 8}")
        options = [part for value in properties for part in ("-p", value)]
        return ["systemd-run", "--user", "--scope", "--quiet", "--collect", *options, "--", *command]

    def environment(self) -> dict[str, str]:
        """Return what systemd-run needs to find the user's manager.

        bwrap's --clearenv keeps it out of the sandbox.
        """
        names = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
        return {name: os.environ[name] for name in names if name in os.environ}

    def limits(self, spec: SandboxSpec) -> dict[str, int]:
        _left_by_disk(spec)
        return _limits(spec, spec.processes)

    def meter(self, name: str, spec: SandboxSpec) -> ScopeMeter:
        return ScopeMeter()


@dataclass(frozen=True, slots=True)
class RlimitBound:
    """A bound by rlimits alone.

    Fewer processes may run, each with a share of the memory that /work, /tmp and /dev/shm leave.
    """

    @property
    def kind(self) -> Kind:
        return "rlimits"

    def wrap(self, command: list[str], spec: SandboxSpec) -> list[str]:
        return command

    def environment(self) -> dict[str, str]:
        return {}

    def limits(self, spec: SandboxSpec) -> dict[str, int]:
        """Divide the memory among a few processes, and among more only where each has ample room.

        Before Linux 5.14 NPROC counts every process of the user on the host, so that fewer may start.
        """
        left = _left_by_disk(spec)
        few = min(FEW, left // MIN_ADDRESS_SPACE)
        processes = min(spec.processes, max(few, left // ROOMY))
        return _limits(spec, processes) | {"AS": left // processes}

    def meter(self, name: str, spec: SandboxSpec) -> NoMeter:
        return NoMeter()


def alone(spec: SandboxSpec) -> dict[str, int]:
    """Return the limits of a program that is the only one while rlimits bound memory, in place of ``limits``.

    It has all the memory and the places for threads, and no process beside it: ``process_gate`` sees to that.
    """
    return {"AS": _left_by_disk(spec), "NPROC": spec.processes + 1, "STACK": STACK}


def detect(own: str | None = None, mounts: str | None = None) -> MemoryBound:
    """Find the best bound that this host allows.

    ``own`` and ``mounts`` default to the texts of /proc/self/cgroup and /proc/self/mountinfo.
    """
    if os.geteuid() == 0:
        own = Path("/proc/self/cgroup").read_text() if own is None else own
        mounts = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
        bound = find_cgroup(own, mounts)
        if bound is not None:
            return bound
    elif _scope_works():
        return ScopeBound()
    return RlimitBound()


def find_cgroup(own: str, mounts: str) -> CgroupBound | None:
    """Find a cgroup under which this process may create children with a memory limit.

    The host may have v1, v2 or both (hybrid). Returns None where there is no such cgroup.
    """
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in own.splitlines()}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
            parent = _below(mount, root, path)
            if parent and _can_create(parent, "memory.limit_in_bytes"):
                return CgroupBound(parent, 1)
        elif kind == "cgroup2" and (parent := _below(mount, root, paths.get(""))):
            # In v2 a cgroup that holds processes gives its children no memory controller: look further up too.
            for folder in (parent, *parent.parents):
                if not folder.is_relative_to(mount):
                    break
                if _enabled(folder) and _can_create(folder, "memory.max"):
                    return CgroupBound(folder, 2)
    return None


def _below(mount: str, root: str, path: str | None) -> Path | None:
    """Locate the cgroup ``path`` under ``mount``, which shows the hierarchy from ``root`` on."""
    if path is None:
        return None
    inner = path.removeprefix(root.rstrip("/")) if path.startswith(root) else ""
    return Path(mount) / inner.lstrip("/")


def _enabled(folder: Path) -> bool:
    """Say whether children of a v2 cgroup get the memory controller.

    Asks for it where the kernel allows.
    """
    control = folder / "cgroup.subtree_control"
    with contextlib.suppress(OSError):
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
        return "memory" in control.read_text().split()
    return False


def _can_create(parent: Path, limit: str) -> bool:
    trial = parent / f"areal-agents-trial-{os.getpid()}"
    try:
        trial.mkdir()
    except OSError:
        return False
    try:
        (trial / limit).write_text(str(64 << 20))
    except OSError:
        return False
    else:
        return True
    finally:
        with contextlib.suppress(OSError):
            trial.rmdir()


def _scope_works() -> bool:
    """Start a scope, and say whether it really gets its limit.

    The user's manager accepts a limit also where it has no memory controller.
    """
    look = 'read -r line < /proc/self/cgroup; cat "/sys/fs/cgroup${line#0::}/memory.max"'
    spec = SandboxSpec(memory=64 << 20)
    command = ScopeBound().wrap(["/bin/sh", "-c", look], spec)
    environment = {"PATH": "/usr/bin:/bin", **ScopeBound().environment()}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == str(spec.memory).encode()
