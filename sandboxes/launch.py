"""The bwrap command line, and what stands in its way on this host."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import ConfigError, SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import interpreter, memory, seccomp, uids
from areal_agents.sandboxes.pipes import Fds

ENVIRONMENT: Final = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/work",
    "LANG": "C.UTF-8",
    "PYTHONUNBUFFERED": "1",  # what a program printed is seen also when it is killed
    "OMP_NUM_THREADS": "1",  # OpenBLAS, MKL and OpenMP start a thread a core otherwise, past the limit on large hosts
    "MALLOC_ARENA_MAX": "1",  # each arena reserves 64 MB of address space
}
"""All that a sandboxed process finds in its environment."""

FILES: Final = {
    "/etc/passwd": b"sandbox:x:1000:1000::/work:/bin/sh\n",
    "/etc/group": b"sandbox:x:1000:\n",
    "/etc/hosts": b"127.0.0.1 localhost sandbox\n::1 localhost\n",
    "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files\n",
}
"""What programs ask about themselves: who they are, and where localhost is."""

_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_SYSTEM: Final = interpreter.Interpreter(interpreter.SYSTEM)
_INSIDE_ID: Final = "1000"

APPARMOR_PROFILE: Final = """\
abi <abi/4.0>,
include <tunables/global>
profile bwrap /usr/bin/bwrap flags=(unconfined) {
  userns,
  include if exists <local/bwrap>
}
"""


_FIELDS: Final = {
    "NPROC": "processes", "NOFILE": "open_files", "CPU": "cpu_seconds", "FSIZE": "disk", "AS": "memory of a process",
}  # fmt: skip
"""What a SandboxSpec says of them."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The paths of the programs that start a sandbox."""

    bwrap: str
    setpriv: str | None
    """None unless the host is root."""
    python: interpreter.Interpreter = _SYSTEM
    """What code inside runs on."""
    preload: tuple[str, ...] = ()
    """Modules that pid 1 imports before anything runs, for the Python programs to share."""

    @property
    def supervisor(self) -> str:
        """The Python of pid 1: the system's where there is one, and the code's own where that shares its modules."""
        if self.preload:
            return self.python.executable
        return interpreter.SYSTEM if Path(interpreter.SYSTEM).exists() else self.python.executable

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "PATH": self.python.search_path}


def find_tools(*, root: bool, python: str, preload: tuple[str, ...] = ()) -> Tools:
    """Locate the programs that start a sandbox.

    ``python`` is the path of an environment or an interpreter, ``preload`` modules of it. Raises SandboxUnavailable,
    which names what is missing.
    """
    bwrap, setpriv = (shutil.which(name, path=_PATH) for name in ("bwrap", "setpriv"))
    if bwrap is None:
        remedy = "Install it: apt-get install bubblewrap (Debian, Ubuntu) or dnf install bubblewrap (Fedora, RHEL)."
        raise SandboxUnavailable("bubblewrap", "bwrap was not found", remedy)
    if root and setpriv is None:
        remedy = "Install it (apt-get or dnf install util-linux), or run as a plain user."
        raise SandboxUnavailable("bubblewrap", "setpriv was not found", remedy)
    inside = interpreter.find(python, "bubblewrap")
    if root and (closed := interpreter.unreadable(inside)):
        problem = f"{python} cannot run as the plain user that a root host's sandbox is: {closed} is closed to others"
        remedy = f"Make the environment where everybody may read it. {interpreter.MAKE}"
        raise SandboxUnavailable("bubblewrap", problem, remedy)
    return Tools(bwrap, setpriv if root else None, inside, preload)


_SENT = ("fresh_namespaces", "process_gate", "warm_python", "work_files")
"""Modules that the supervisor imports."""
_SENT_WARM = ("fresh_namespaces", "warm_python")
"""Those of them that a sandbox without imported modules never calls: it starts faster without their text."""


@cache
def supervisor_source(warm: bool = False) -> bytes:
    """Read the program of pid 1, which gets it on its stdin, with the modules that it imports."""
    program = Path(__file__).with_name("supervisor.py").read_text()
    own = f"from areal_agents.sandboxes import {', '.join(_SENT)}\n"
    assert own in program
    sent = ["import types\n"]
    for name in _SENT:
        text = Path(__file__).with_name(f"{name}.py").read_text() if warm or name not in _SENT_WARM else ""
        sent.append(f"{name} = types.ModuleType({name!r}); exec({text!r}, {name}.__dict__)\n")
    return program.replace(own, "".join(sent)).encode()


def given(tools: Tools, bound: memory.MemoryBound, spec: SandboxSpec) -> dict[str, Any]:
    """Return what every request tells pid 1 of the programs it starts."""
    told: dict[str, Any] = {"env": tools.environment} | ({"warm": True} if tools.preload else {})
    gate = seccomp.gate() if bound.kind == "rlimits" else None
    return told | ({"gate": gate | {"limits": memory.alone(spec)}} if gate else {})


def require_limits(limits: Mapping[str, int], hard: Mapping[str, int]) -> None:
    """Raise ConfigError for a limit beyond the hard one of where programs run, -1 for no bound: none could start."""
    for name, value in limits.items():
        most = hard.get(name, -1)
        if 0 <= most < value + (name == "CPU"):
            raise ConfigError(f"{_FIELDS[name]}={value}: programs may have {most} here (a hard limit, ulimit -H).")


def _system_folders() -> list[str]:
    """Return the arguments that mount /usr and its neighbours read-only.

    Links stay links.
    """
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    # Shared libraries and commands that Debian reaches through links kept in /etc, and where fonts are.
    for name in ("/etc/alternatives", "/etc/ld.so.cache", "/etc/fonts"):
        arguments += ["--ro-bind-try", name, name]
    return arguments


def command(
    tools: Tools,
    spec: SandboxSpec,
    *,
    uid: int | None,
    control: int,
    filter_fd: int | None,
    info: int,
    files: Mapping[str, int],
    zygote: bool = False,
) -> list[str]:
    """Build the bwrap command that starts the supervisor, whose source comes on its stdin.

    Args:
        tools: paths of the programs.
        spec: its ``disk`` is the size of each tmpfs, in bytes.
        uid: user to become first, on a root host; None stays the caller.
        control: descriptor of the supervisor's end of the control socket.
        filter_fd: descriptor of the filter, as BPF; None for a zygote, whose forks load theirs.
        info: descriptor to which bwrap writes the supervisor's pid, as JSON.
        files: path inside → descriptor with the content, of ``FILES``.
        zygote: start the zygote, which has the modules of ``tools`` and forks sandboxes.
    """
    drop = []
    if uid is not None:
        assert tools.setpriv is not None
        drop = [tools.setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--"]
    # --unshare-all only tries user and cgroup namespaces, so each is named. A user namespace owned by host root would
    # map to uid 0 and could write /proc/sys: hence the drop.
    namespaces = [f"--unshare-{name}" for name in ("user", "pid", "net", "ipc", "uts", "cgroup")]
    identity = ["--uid", _INSIDE_ID, "--gid", _INSIDE_ID, "--hostname", "sandbox", "--cap-drop", "ALL"]
    life = ["--as-pid-1", "--new-session", "--die-with-parent", "--clearenv"]
    for name, value in tools.environment.items():
        life += ["--setenv", name, value]
    mounts = [*_system_folders(), "--proc", "/proc", "--dev", "/dev"]
    for path in ("/dev/shm", "/tmp", "/work"):
        mounts += ["--size", str(spec.disk), "--tmpfs", path]
    for path, descriptor in files.items():
        mounts += ["--ro-bind-data", str(descriptor), path]
    # After /tmp, which one of them may lie below.
    fixed = tools.python.covered["fixed"]
    for path in fixed:
        mounts += ["--size", "4096", "--tmpfs", path]
    for path in tools.python.mounts:
        mounts += ["--ro-bind", path, path]
    for path, target in tools.python.links:
        mounts += ["--symlink", target, path]
    # Last, because bwrap makes mount points in both: they would be writable, shared and unbounded otherwise.
    for path in (*fixed, "/dev", "/"):
        mounts += ["--remount-ro", path]
    mounts += ["--chdir", "/work"]
    fds = [*([] if filter_fd is None else ["--seccomp", str(filter_fd)]), "--info-fd", str(info)]
    inner = [tools.supervisor, "-I", "-S", "-", str(control)]
    if tools.preload:
        inner = [tools.supervisor, "-I", "-X", "utf8", "-", str(control), ",".join(tools.preload)]
        inner += ["zygote"] if zygote else []
    return [*drop, tools.bwrap, *namespaces, *identity, *life, *mounts, *fds, "--", *inner]


def popen(
    tools: Tools,
    spec: SandboxSpec,
    bound: memory.MemoryBound,
    slot: uids.Slot | None,
    filter_fd: int | None,
    info: int,
    errors: int,
    zygote: bool = False,
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start bwrap with pid 1 in it, and return the host's end of the control socket with the process. Raises OSError.

    Call it in the loop's thread: --die-with-parent means the thread that started it.
    """
    fds = Fds()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        source = fds.memfd("supervisor", supervisor_source(bool(tools.preload)))
        control = theirs.fileno()
        files = {path: fds.memfd("file", data) for path, data in FILES.items()}
        inner = command(
            tools,
            spec,
            uid=slot.uid if slot else None,
            control=control,
            filter_fd=filter_fd,
            info=info,
            files=files,
            zygote=zygote,
        )
        process = subprocess.Popen(
            bound.wrap(inner, spec),
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", **bound.environment()},
            pass_fds=(control, *([] if filter_fd is None else [filter_fd]), info, *files.values()),
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        fds.close()
    return ours, process


def inner_pid(info: int) -> int:
    """Read the supervisor's pid on the host, which bwrap wrote before it started it."""
    os.set_blocking(info, False)
    try:
        return int(json.loads(os.read(info, 4096))["child-pid"])
    except (OSError, ValueError, KeyError) as error:
        raise SandboxError(f"bwrap did not say which process it started: {error!r}") from error


def explain(stderr: str) -> tuple[str, str]:
    """Return what failed and its remedy, for a bwrap that did not start."""
    problem = f"bwrap did not start: {stderr.strip()[-400:] or 'no message'}"
    if stderr.startswith("preload: "):
        return stderr.strip()[-400:], "Name modules that the Python inside has: packages=… or python=… give it more."
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        remedy = (
            "AppArmor denies unprivileged user namespaces (Ubuntu 24.04). Write this to /etc/apparmor.d/bwrap and run "
            f"`apparmor_parser -r /etc/apparmor.d/bwrap` as root:\n{APPARMOR_PROFILE}"
        )
    elif _setting("kernel/unprivileged_userns_clone") == "0":
        remedy = "Allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1."
    elif _setting("user/max_user_namespaces") == "0":
        remedy = "Allow user namespaces: sysctl -w user.max_user_namespaces=15000."
    elif "Unknown option" in stderr:
        remedy = "Install bubblewrap 0.5 or later."
    else:
        remedy = (
            "Check `bwrap --unshare-user --ro-bind / / true` as the same user. Inside a container, user namespaces "
            "must be allowed (Docker: --security-opt seccomp=unconfined --security-opt systempaths=unconfined)."
        )
    return problem, remedy


def _setting(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""
