"""What a backend that isolates must hold back. Plain asserts, as in ``sandbox_suite``.

As a program it runs the whole suite and prints one JSON object, check name → what failed ("" when it passed):
``python -m tests.sandbox_containment bubblewrap``.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import traceback

from areal_agents.sandbox import SandboxBackend, SandboxSpec
from areal_agents.sandboxes import get, launch, probes
from tests.sandbox_suite import FUNCTIONAL, NAMES, PYTHON, SPEC, Check, raised, run, run_check, value

SECRET = "areal-secret-5f3a9c"


async def memory_of_many_processes_is_bounded(backend: SandboxBackend) -> None:
    async with backend.session(SPEC) as sandbox:
        result = await sandbox.exec([PYTHON, "-I", "-c", probes.HOLD, "8", str(300 << 20)], timeout=60)
        held = max(int(line) for line in result.stdout.split() if line.isdigit())
        assert held <= SPEC.memory, result
        bound = (await backend.probe()).memory_bound
        assert (result.status == "oom") == (bound != "rlimits"), result
        one = await run(sandbox, "block = bytearray(800 << 20)\nfor i in range(0, len(block), 4096): block[i] = 1")
        assert one.status == ("error" if bound == "rlimits" else "oom"), one
        assert (await run(sandbox, "print('lives')")).stdout == b"lives\n"


async def disk_is_bounded(backend: SandboxBackend) -> None:
    code = """
import json, os, sys
written = {}
for folder in ("/work", "/tmp", "/dev/shm"):
    total = 0
    try:
        for number in range(8):
            with open(f"{folder}/{number}", "wb", buffering=0) as file:
                for _ in range(64):
                    total += file.write(b"x" * (1 << 20))
    except OSError:
        pass
    written[folder] = total
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
print(json.dumps(written))
"""
    async with backend.session(SPEC) as sandbox:
        assert await value(sandbox, code) == dict.fromkeys(("/work", "/tmp", "/dev/shm"), SPEC.disk)
        full = await raised(sandbox.write_file("big", b"x" * (SPEC.disk + 1)))
        assert isinstance(full, OSError)
        assert full.errno == errno.ENOSPC


async def fork_bomb_is_contained(backend: SandboxBackend) -> None:
    spec = SandboxSpec(memory=512 << 20, disk=16 << 20, processes=16)
    count = """
import json, os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
except OSError as error:
    print(json.dumps([made, error.errno]))
"""
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    async with backend.session(spec) as sandbox:
        made, code = await value(sandbox, count)
        assert code == errno.EAGAIN
        assert made + 1 <= 16
        for _ in range(2):
            assert (await run(sandbox, bomb, timeout=0.5)).status == "timeout"
            assert await value(sandbox, PIDS) == 2
        process = await sandbox.spawn(["/bin/cat"])
        assert (await run(sandbox, bomb, timeout=0.5)).status == "timeout"
        assert await value(sandbox, PIDS) <= 3  # pid 1, this one, and the spawned one if the sweep could spare it
        await process.kill()


PIDS = "import os; print(len([name for name in os.listdir('/proc') if name.isdigit()]))"


async def daemons_die_with_their_call(backend: SandboxBackend) -> None:
    daemon = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", flush=True)
        time.sleep(600)
    os._exit(0)
time.sleep(0.2)
"""
    async with backend.session(SPEC) as sandbox:
        result = await run(sandbox, daemon)
        assert (result.status, result.stdout) == ("ok", b"daemon\n")
        assert await value(sandbox, PIDS) == 2
        process = await sandbox.spawn(["/bin/cat"])
        assert (await run(sandbox, daemon)).status == "ok"
        assert await value(sandbox, PIDS) == 3
        await process.kill()
        assert await value(sandbox, PIDS) == 2


async def nothing_outside_can_be_written(backend: SandboxBackend) -> None:
    code = """
import json, sys
refused = []
for path in sys.argv[1:]:
    try:
        open(path, "w").close()
    except OSError:
        refused.append(path)
print(json.dumps(refused))
"""
    paths = ["/x", "/etc/x", "/usr/x", "/usr/bin/python3", "/var/tmp/x", "/dev/x", "/proc/x", "/home/x", "/root/x"]
    paths += ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/sys/x"]
    async with backend.session(SPEC) as sandbox:
        assert await value(sandbox, code, *paths) == paths


async def host_network_is_out_of_reach(backend: SandboxBackend) -> None:
    code = """
import json, socket, sys
def connect(family, address):
    try:
        with socket.socket(family) as s:
            s.settimeout(2)
            s.connect(address)
    except OSError as error:
        return error.errno
print(json.dumps([connect(socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))),
                  connect(socket.AF_UNIX, "\\0" + sys.argv[2]), connect(socket.AF_INET, ("8.8.8.8", 53))]))
"""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind("\0areal-test-" + str(os.getpid()))
        unix.listen()
        async with backend.session(SPEC) as sandbox:
            seen = await value(sandbox, code, str(tcp.getsockname()[1]), unix.getsockname()[1:].decode())
    assert seen == [errno.ECONNREFUSED, errno.ECONNREFUSED, errno.ENETUNREACH]


async def host_environment_is_hidden(backend: SandboxBackend) -> None:
    code = """
import json, os
seen = str(dict(os.environ))
for name in os.listdir("/proc"):
    if name.isdigit():
        for file in ("environ", "cmdline"):
            try:
                with open(f"/proc/{name}/{file}", "rb") as f:
                    seen += f.read().decode("utf-8", "replace")
            except OSError:
                pass
print(json.dumps([seen, sorted(os.environ)]))
"""
    os.environ["AREAL_SECRET"] = SECRET
    try:
        fresh = get(NAMES[-1])
        async with fresh.session(SPEC) as sandbox:
            seen, names = await value(sandbox, code)
        await fresh.aclose()
    finally:
        del os.environ["AREAL_SECRET"]
    assert "AREAL_SECRET" not in seen
    assert SECRET not in seen
    assert set(names) <= {*launch.ENVIRONMENT, "PWD", "LC_CTYPE"}


async def pid_1_cannot_be_touched(backend: SandboxBackend) -> None:
    code = """
import json, os, signal
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
opened = []
for name in ("environ", "mem", "maps", "fd/0", "root"):
    try:
        os.listdir("/proc/1/fd") if name == "fd/0" else open("/proc/1/" + name, "rb").read(1)
        opened.append(name)
    except OSError:
        pass
print(json.dumps(opened))
"""
    async with backend.session(SPEC) as sandbox:
        await sandbox.write_file("kept", b"kept")
        assert await value(sandbox, code) == []
        assert await sandbox.read_file("kept", 10) == b"kept"


async def dangerous_calls_fail(backend: SandboxBackend) -> None:
    code = """
import ctypes, json, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(name, *args):
    number = dict(zip(("ptrace", "unshare", "mount", "setns", "bpf", "clone3", "clone", "io_uring_setup", "userfaultfd",
        "keyctl", "memfd_create", "open_by_handle_at", "personality", "process_vm_readv", "shmget", "perf_event_open"),
        NUMBERS))[name]
    ctypes.set_errno(0)
    return ctypes.get_errno() if libc.syscall(number, *args) == -1 else 0
def family(number, kind=socket.SOCK_DGRAM):
    try:
        socket.socket(number, kind).close()
    except OSError as error:
        return error.errno
    return 0
def attempt(function, *args):
    try:
        function(*args)
    except PermissionError:
        return 1
    return 0
buffer = ctypes.create_string_buffer(256)
NUMBERS = {"x86_64": (101, 272, 165, 308, 321, 435, 56, 425, 323, 250, 319, 304, 135, 310, 29, 298),
           "aarch64": (117, 97, 40, 268, 280, 435, 220, 425, 282, 219, 279, 265, 92, 270, 194, 241)}[os.uname().machine]
print(json.dumps({
    "ptrace": call("ptrace", 16, 1, 0, 0), "unshare": call("unshare", 0x10000000),
    "mount": call("mount", 0, 0, 0, 0, 0),
    "setns": call("setns", 0, 0), "bpf": call("bpf", 0, buffer, 64), "clone": call("clone", 0x10000011, 0, 0, 0, 0),
    "io_uring_setup": call("io_uring_setup", 1, buffer), "userfaultfd": call("userfaultfd", 0),
    "keyctl": call("keyctl", 0, 0), "memfd_create": call("memfd_create", b"m", 0),
    "open_by_handle_at": call("open_by_handle_at", 0, buffer, 0), "personality": call("personality", 0x40000),
    "process_vm_readv": call("process_vm_readv", 1, 0, 0, 0, 0, 0), "shmget": call("shmget", 0, 4096, 0o1600),
    "perf_event_open": call("perf_event_open", buffer, 0, -1, -1, 0), "clone3": call("clone3", buffer, 88),
    "families": [family(16, socket.SOCK_RAW), family(17, socket.SOCK_RAW), family(38), family(40, socket.SOCK_STREAM)],
    "prlimit": attempt(resource.prlimit, 1, resource.RLIMIT_NOFILE, (8, 8)),
    "own limits": resource.prlimit(0, resource.RLIMIT_CORE),
}))
"""
    async with backend.session(SPEC) as sandbox:
        seen = await value(sandbox, code)
    assert seen.pop("families") == [errno.EAFNOSUPPORT] * 4
    assert (seen.pop("prlimit"), seen.pop("own limits"), seen.pop("clone3")) == (1, [0, 0], errno.ENOSYS)
    assert seen == dict.fromkeys(seen, errno.EPERM)


async def sessions_do_not_share_files_or_processes(backend: SandboxBackend) -> None:
    leave = "[open(p + '/areal-left', 'w').close() for p in ('/work', '/tmp', '/dev/shm')]"
    look = "import json, os; print(json.dumps(sum([os.listdir(p) for p in ('/work', '/tmp', '/dev/shm')], [])))"
    async with backend.session(SPEC) as first, backend.session(SPEC) as second:
        process = await first.spawn(["/bin/cat"])
        assert (await run(first, leave)).status == "ok"
        assert await value(second, look) == []
        assert await value(second, PIDS) == 2
        await process.kill()


CONTAINMENT: tuple[Check, ...] = (
    memory_of_many_processes_is_bounded,
    disk_is_bounded,
    fork_bomb_is_contained,
    daemons_die_with_their_call,
    nothing_outside_can_be_written,
    host_network_is_out_of_reach,
    host_environment_is_hidden,
    pid_1_cannot_be_touched,
    dangerous_calls_fail,
    sessions_do_not_share_files_or_processes,
)


def main(name: str) -> None:
    results: dict[str, str] = {}
    for check in FUNCTIONAL + CONTAINMENT:
        try:
            run_check(name, check)
        except Exception:  # noqa: BLE001  (recorded, and reported by the caller)
            results[check.__name__] = traceback.format_exc()
        else:
            results[check.__name__] = ""
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
