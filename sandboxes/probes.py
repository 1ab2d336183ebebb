"""The proof that a backend gives before it runs anything.

Real code tries from inside, and the host decides what that means.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxUnavailable
from areal_agents.sandbox import Probe, ProbeReport, Sandbox, SandboxSpec
from areal_agents.sandboxes import network_look
from areal_agents.sandboxes.interpreter import MAKE, Interpreter
from areal_agents.sandboxes.launch import ENVIRONMENT
from areal_agents.sandboxes.memory import MemoryBound, alone

SPEC: Final = SandboxSpec(memory=256 << 20, disk=8 << 20, processes=32)
"""Small, so that the memory probe is quick."""

_TIMEOUT: Final = 60.0

_INTERFACES: Final = Path(network_look.__file__).read_text()
_LOOK: Final = r"""
import json, os, socket, sys
looking = {}
exec(sys.argv[3], looking)
port, abstract = int(sys.argv[1]), sys.argv[2]
def attempt(function, *args):
    try:
        function(*args)
    except OSError as error:
        return error.strerror or str(error)
    return ""
def connect(family, address):
    with socket.socket(family) as s:
        s.settimeout(2)
        s.connect(address)
def create(path):
    with open(path, "w") as file:
        file.write("x")
def read(path):
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())
print(json.dumps({
    "interfaces": looking["interfaces"](),
    "routes": read("/proc/net/route").splitlines()[1:],
    "host_port": attempt(connect, socket.AF_INET, ("127.0.0.1", port)),
    "host_abstract": attempt(connect, socket.AF_UNIX, "\0" + abstract),
    "outside": attempt(connect, socket.AF_INET, ("1.1.1.1", 53)),
    "writes": {p: attempt(create, p) for p in ("/probe", "/usr/probe", "/dev/probe", "/var/tmp/probe", "/etc/probe")},
    "core_pattern": attempt(create, "/proc/sys/kernel/core_pattern"),
    "hostname": attempt(create, "/proc/sys/kernel/hostname"),
    "uids": [*os.getresuid(), *os.getresgid(), *os.getgroups()],
    "caps": {name: int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")},
    "seccomp": status["Seccomp"].strip(),
    "no_new_privs": status["NoNewPrivs"].strip(),
    "environment": sorted(os.environ),
    "init_environment": read("/proc/1/environ"),
    "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "self": os.getpid(),
}))
"""

# One process after the other touches its share and keeps it; what the living hold is printed as it grows.
HOLD: Final = r"""
import os, sys
count, size = int(sys.argv[1]), int(sys.argv[2])
children = []

def alive(child):
    # One that was killed for memory may not have ended yet, but it can no longer answer.
    ask, answer = child
    try:
        os.write(ask, b"?")
    except BrokenPipeError:
        return False
    return os.read(answer, 1) == b"h"

for _ in range(count):
    asked, ask = os.pipe()
    answer, answered = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        print("fork:", error.strerror)
        break
    if pid == 0:
        try:
            block = bytearray(size)
            for i in range(0, size, 4096):
                block[i] = 1
        except MemoryError:
            os._exit(1)
        os.write(answered, b"h")
        while os.read(asked, 1):
            os.write(answered, b"h")
        os._exit(0)
    os.close(asked)
    os.close(answered)
    os.read(answer, 1)
    children.append((ask, answer))
    living = sum([alive(child) for child in children])
    print(living * size, flush=True)
    if living < len(children):
        break
"""


# A process with a thread takes all it gets, and then a fork of it does: what both hold is printed as it grows.
THREAD_AND_FORK: Final = r"""
import os, threading, time
def touch(block, held):
    for i in range(0, len(block), 4096):
        block[i] = 1
    print(held + len(block), flush=True)
    return held + len(block)
def take(held):
    blocks = []
    try:
        while True:
            blocks.append(bytearray(4 << 20))
            held = touch(blocks[-1], held)
    except MemoryError:
        return blocks, held
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
blocks, held = take(0)
try:
    pid = os.fork()
except OSError as error:
    print("fork:", error.strerror)
else:
    if pid:
        os.waitpid(pid, 0)
    else:
        for block in blocks:
            held = touch(block, held)
        take(held)
os._exit(0)
"""


@contextlib.contextmanager
def _listeners() -> Iterator[tuple[int, str]]:
    """Open a TCP port on the host's loopback and an abstract socket, and yield their names.

    Both must be out of reach from inside.
    """
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind("")  # the kernel picks a free abstract name
        unix.listen()
        yield tcp.getsockname()[1], unix.getsockname()[1:].decode()


_Check = tuple[str, str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], object]]

_NETWORK: Final = ("host_port", "host_abstract", "outside")
_USERNS: Final = "Check that user namespaces are allowed on this kernel and that bwrap is the distribution's own."
CHECKS: Final[tuple[_Check, ...]] = (
    (
        "no network",
        "The network namespace is not private: check that bwrap supports --unshare-net here.",
        lambda s: set(s["interfaces"]) <= {"lo"} and not s["routes"] and all(map(s.get, _NETWORK)),
        lambda s: {name: s[name] for name in ("interfaces", "routes", *_NETWORK)},
    ),
    ("file system read-only", _USERNS, lambda s: all(s["writes"].values()), lambda s: s["writes"]),
    (
        "not host root",
        "Run as a plain user, or as root of the host, which drops to an unprivileged uid.",
        lambda s: s["host_uid"] != 0 and 0 not in s["uids"],
        lambda s: {"uid on the host": s["host_uid"], "ids inside": s["uids"]},
    ),
    ("no capabilities", _USERNS, lambda s: not any(s["caps"].values()), lambda s: s["caps"]),
    (
        "seccomp on",
        "The kernel must have CONFIG_SECCOMP_FILTER.",
        lambda s: bool(s["seccomp"] == "2"),
        lambda s: s["seccomp"],
    ),
    ("no new privileges", _USERNS, lambda s: bool(s["no_new_privs"] == "1"), lambda s: s["no_new_privs"]),
    (
        "environment empty",
        "bwrap must support --clearenv (0.5 or later).",
        lambda s: set(s["environment"]) <= {*ENVIRONMENT, "PWD", "LC_CTYPE"} and not s["init_environment"],
        lambda s: {"variables": s["environment"], "pid 1": s["init_environment"][:200]},
    ),
    (
        "host processes invisible",
        "The pid namespace is not private, or /proc is the host's.",
        lambda s: set(s["pids"]) <= {1, s["self"]},
        lambda s: s["pids"],
    ),
    (
        "/proc/sys read-only",
        "A sandbox must not be owned by host root: check the uid map.",
        lambda s: bool(s["core_pattern"] and s["hostname"]),
        lambda s: {"core_pattern": s["core_pattern"], "hostname": s["hostname"]},
    ),
)


async def run(
    backend: str, sandbox: Sandbox, bound: MemoryBound, host_uid: int, interpreter: Interpreter
) -> ProbeReport:
    """Probe a session that was opened with ``SPEC``.

    Args:
        backend: name of the backend, for the report and the errors.
        sandbox: the session.
        bound: how the session's memory is bounded.
        host_uid: whom the host sees running the sandbox. The uid map inside does not tell: bwrap nests two namespaces.
        interpreter: what code inside runs on.

    Raises:
        SandboxUnavailable: at the first probe that fails.
    """
    passed = [await python_starts(backend, sandbox, interpreter)]
    with _listeners() as (port, abstract):
        argv = ["python3", "-I", "-c", _LOOK, str(port), abstract, _INTERFACES]
        result = await sandbox.exec(argv, timeout=_TIMEOUT)
    try:
        if result.status != "ok":
            raise ValueError(result.status)
        seen = {**json.loads(result.stdout), "host_uid": host_uid}
    except ValueError as error:
        detail = f"{result.status}: {result.stderr.decode('utf-8', 'replace')[-400:]}"
        raise SandboxUnavailable(backend, f"code does not run inside ({detail})", _USERNS) from error
    for name, remedy, holds, detail_of in CHECKS:
        probe = Probe(name, holds(seen), str(detail_of(seen)))
        if not probe.passed:
            raise SandboxUnavailable(backend, f"probe {name!r} failed: {probe.detail}", remedy)
        passed.append(probe)
    passed.append(await _memory(backend, sandbox, bound))
    return ProbeReport(backend, tuple(passed), bound.kind, (*interpreter.notes, *_notes(bound)))


async def python_starts(backend: str, sandbox: Sandbox, interpreter: Interpreter) -> Probe:
    """Start the Python inside. Raises SandboxUnavailable with what it says where it does not start."""
    code = "import sys, json, ctypes, zlib; print(sys.prefix)"
    result = await sandbox.exec([interpreter.executable, "-I", "-c", code], timeout=_TIMEOUT)
    found = result.stdout.decode("utf-8", "replace").strip()
    if result.status != "ok" or interpreter.prefix not in ("", found):
        detail = result.stderr.decode("utf-8", "replace").strip()[-400:] or f"its prefix is {found!r} ({result.status})"
        problem = f"{interpreter.executable} does not start inside: {detail}"
        seen = ", ".join(("/usr", *interpreter.mounts))
        raise SandboxUnavailable(backend, problem, f"It sees {seen} and nothing else of the host. {MAKE}")
    return Probe("python starts", True, found)


async def _memory(backend: str, sandbox: Sandbox, bound: MemoryBound) -> Probe:
    """Let eight processes try to hold 1.5 times the bound at one time; under rlimits, a program with threads too."""
    share = SPEC.memory * 3 // 2 // 8
    attempts = [[HOLD, "8", str(share)], *([[THREAD_AND_FORK]] if bound.kind == "rlimits" else [])]
    detail = ""
    for attempt in attempts:
        result = await sandbox.exec(["python3", "-I", "-c", *attempt], timeout=_TIMEOUT)
        counts = [int(line) for line in result.stdout.split() if line.isdigit()]
        held = max(counts, default=0)
        detail = f"{bound.kind}: status {result.status}, {held >> 20} MB held at most of {SPEC.memory >> 20} MB allowed"
        # Without a count and without ``oom`` the program did not even start, which proves nothing; but one that may be
        # no more than one process says so, and holds nothing in others.
        refused = bound.kind == "rlimits" and result.stdout.startswith(b"fork: ")
        tried = result.status == "oom" or ((bool(counts) or refused) and result.status in ("ok", "error"))
        if not tried or held > SPEC.memory:
            remedy = (
                "Run as root with a writable memory cgroup, or with a systemd user session that delegates the memory "
                "controller (loginctl enable-linger), so that a limit on the whole session holds."
            )
            raise SandboxUnavailable(backend, f"probe 'memory bounded' failed: {detail}", remedy)
    return Probe("memory bounded", True, detail)


def _notes(bound: MemoryBound) -> tuple[str, ...]:
    if bound.kind != "rlimits":
        return ()
    limits, whole = bound.limits(SandboxSpec()), alone(SandboxSpec())
    return (
        f"Memory is bounded by rlimits. A program of a default session has threads and {whole['AS'] >> 20} MB of "
        f"address space; or it starts others, and there are {limits['NPROC'] - 1} processes of {limits['AS'] >> 20} MB "
        "each. Kernel memory (inodes, socket buffers) is not counted.",
    )
