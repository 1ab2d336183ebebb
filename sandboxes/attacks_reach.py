"""Attacks on what lies outside: the host's files, processes, network, kernel, and other sessions."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from areal_agents.sandboxes import launch
from areal_agents.sandboxes.attacks_resources import alone, lives
from areal_agents.sandboxes.subject import SPEC, Subject, held, run, tried, value

_TRY = """
import json, os, sys
def attempt(function, *args):
    try:
        function(*args)
    except OSError as error:
        return error.errno or -1
    return 0
"""
"""``attempt`` returns an errno, or 0 where the call succeeded."""


async def secret_files(subject: Subject) -> str:
    code = _TRY + "print(json.dumps({p: attempt(lambda: open(p, 'rb').read(1)) for p in sys.argv[1:]}))"
    paths = [
        "/etc/shadow",
        "/etc/gshadow",
        "/root/.ssh/id_rsa",
        "/proc/kcore",
        "/proc/1/environ",
        "/var/run/docker.sock",
    ]
    async with subject.session(SPEC) as sandbox:
        # Inside, one that everybody may read, to show that reading works at all.
        seen = await value(sandbox, code, *paths, "/proc/self/status")
    tried(seen.pop("/proc/self/status") == 0, seen)
    held(all(seen.values()), seen)
    return f"{len(seen)} files, /etc/shadow among them: refused or absent"


@contextlib.contextmanager
def _host_process(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process on the host, with ``mark`` in its command line, that has begun and waits."""
    argv = [sys.executable, "-I", "-S", "-c", "print(flush=True); input()", mark]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as host:
        try:
            assert host.stdout is not None
            host.stdout.readline()
            yield host
        finally:
            host.kill()


async def host_environment(subject: Subject) -> str:
    code = """
import json, os
seen, files = str(dict(os.environ)), 0
for name in os.listdir("/proc"):
    if name.isdigit():
        for file in ("environ", "cmdline", "task/" + name + "/environ"):
            try:
                with open(f"/proc/{name}/{file}", "rb") as f:
                    seen += f.read().decode("utf-8", "replace")
                    files += 1
            except OSError:
                pass
print(json.dumps([seen, sorted(os.environ), files]))
"""
    secret = os.urandom(8).hex()
    os.environ["AREAL_SECRET"] = secret
    backend = subject.make()
    try:
        # /proc has the variables that a process was started with: another one of the host that was given the secret.
        with _host_process("reads nothing") as host:
            tried(secret.encode() in Path(f"/proc/{host.pid}/environ").read_bytes(), "the host has no such variable")
            async with backend.session(SPEC) as sandbox:
                seen, names, files = await value(sandbox, code)
    finally:
        await backend.aclose()
        del os.environ["AREAL_SECRET"]
    tried(files >= 2, f"{files} files of /proc read")
    held(secret not in seen and "AREAL_SECRET" not in seen, "a variable of the host's process is seen")
    strange = set(names) - {*launch.ENVIRONMENT, "PWD", "LC_CTYPE"}
    held(not strange & set(os.environ), f"variables besides its own: {sorted(strange)}")
    return f"{files} files of /proc read, {len(names)} variables, none of the host's"


async def host_processes(subject: Subject) -> str:
    code = (
        _TRY
        + """
import signal
mark, pid = sys.argv[1], int(sys.argv[2])
own, found = open("/proc/self/cmdline").read().count(mark), []
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) != os.getpid():
        try:
            if mark in open(f"/proc/{name}/cmdline").read():
                found.append(int(name))
        except OSError:
            pass
print(json.dumps([own, found, attempt(os.kill, pid, 0), attempt(os.kill, os.getpid(), 0)]))
"""
    )
    mark = f"areal-{os.urandom(8).hex()}"
    with _host_process(mark) as host:
        tried(mark in Path(f"/proc/{host.pid}/cmdline").read_text(), "the host's own process is not there")
        async with subject.session(SPEC) as sandbox:
            # A Python of its own (-S): a fork of an imported one has the command line of that one.
            told = await sandbox.exec(["python3", "-I", "-S", "-c", code, mark, str(host.pid)], timeout=30)
            own, found, signalled, self_signalled = json.loads(told.stdout or b"[0, [], 0, 1]")
        tried(own == 1 and self_signalled == 0, (own, self_signalled))
        held(not found and signalled, f"found as {found}, signal 0: {signalled}")
        held(host.poll() is None, "the host's process is gone")
    return "a process of the host is neither seen nor signalled"


async def network(subject: Subject) -> str:
    code = """
import json, socket, sys
def connect(family, address):
    try:
        with socket.socket(family) as s:
            s.settimeout(2)
            s.connect(address)
    except OSError as error:
        return error.errno or -1
    return 0
own, name = socket.socket(), socket.socket(socket.AF_UNIX)
own.bind(("127.0.0.1", 0)); own.listen()
name.bind("\\0own-" + sys.argv[2]); name.listen()
print(json.dumps([connect(socket.AF_INET, own.getsockname()), connect(socket.AF_UNIX, name.getsockname()),
                  connect(socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))),
                  connect(socket.AF_UNIX, "\\0" + sys.argv[2]), connect(socket.AF_INET, ("8.8.8.8", 53)),
                  connect(socket.AF_INET6, ("2001:4860:4860::8888", 53)),
                  connect(socket.AF_INET, ("169.254.169.254", 80))]))
"""
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket() as check:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind("\0areal-" + os.urandom(8).hex())
        unix.listen()
        check.connect(tcp.getsockname())  # the host reaches it
        async with subject.session(SPEC) as sandbox:
            port, name = str(tcp.getsockname()[1]), unix.getsockname()[1:].decode()
            *own, loopback, abstract, far, far6, metadata = await value(sandbox, code, port, name)
    seen = {"loopback": loopback, "abstract": abstract, "8.8.8.8": far, "IPv6": far6, "169.254.169.254": metadata}
    tried(own == [0, 0], f"its own sockets: {own}")
    held(all(seen.values()), seen)
    refused = ", ".join(f"{place} ({os.strerror(number).lower()})" for place, number in seen.items())
    return f"none of {refused}; it reaches sockets of its own"


async def writes_outside(subject: Subject) -> str:
    code = (
        _TRY
        + """
def write(path):
    if os.path.exists(path):
        os.close(os.open(path, os.O_WRONLY))  # and write nothing
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.unlink(path)
print(json.dumps({path: attempt(write, path) for path in sys.argv[1:]}))
"""
    )
    name = f"areal-{os.urandom(8).hex()}"
    folders = [
        "",
        "/etc",
        "/usr",
        "/usr/bin",
        "/var/tmp",
        "/dev",
        "/proc",
        "/home",
        "/root",
        "/sys",
        "/run",
        "/opt",
        "/boot",
    ]
    files = ["/usr/bin/python3", "/etc/passwd", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname"]
    files += ["/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/sys/fs/cgroup/cgroup.procs"]
    async with subject.session(SPEC) as sandbox:
        own = [f"{folder}/{name}" for folder in ("/work", "/tmp", "/dev/shm")]
        tried(not any((seen := await value(sandbox, code, *own)).values()), seen)
        seen = await value(sandbox, code, *(f"{folder}/{name}" for folder in folders), *files)
    held(all(seen.values()), {path: code for path, code in seen.items() if not code})
    return f"{len(seen)} places outside refuse, /work, /tmp and /dev/shm do not"


async def pid_1(subject: Subject) -> str:
    code = """
import ctypes, json, os, signal
signalled = 0
for number in range(1, 65):
    for target in (1, os.getppid()):
        try:
            os.kill(target, number)
            signalled += 1
        except OSError:
            pass
opened = []
for name in ("environ", "mem", "maps", "fd/0", "root", "cwd"):
    try:
        if name == "fd/0":
            os.listdir("/proc/1/fd")
        elif name in ("root", "cwd"):
            os.listdir("/proc/1/" + name)
        else:
            open("/proc/1/" + name, "rb").read(1)
        opened.append(name)
    except OSError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
traced = [libc.ptrace(16, target, 0, 0) for target in (1, os.getppid())]
print(json.dumps([signalled, opened, traced]))
"""
    slaughter = "import os; os.write(1, b'all'); os.kill(-1, 9); os.write(1, b' lived')"
    async with subject.session(SPEC) as sandbox:
        await sandbox.write_file("kept", b"kept")
        signalled, opened, traced = await value(sandbox, code)
        tried(signalled > 0, "no signal could be sent")
        held(opened == [] and set(traced) == {-1}, f"opened {opened}, ptrace {traced}")
        done = await run(sandbox, slaughter)
        tried(done.stdout.startswith(b"all"), done)
        held(await sandbox.read_file("kept", 10) == b"kept", "its files are gone")
        await lives(sandbox)
    return f"{signalled} signals sent, and SIGKILL to all; pid 1 is deaf and closed"


SYSCALLS = """
import ctypes, json, os, resource, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
NAMES = ("ptrace", "unshare", "mount", "setns", "bpf", "clone3", "clone", "io_uring_setup", "userfaultfd", "keyctl",
    "memfd_create", "open_by_handle_at", "personality", "process_vm_readv", "shmget", "perf_event_open", "getpid")
NUMBERS = {"x86_64": (101, 272, 165, 308, 321, 435, 56, 425, 323, 250, 319, 304, 135, 310, 29, 298, 39),
    "aarch64": (117, 97, 40, 268, 280, 435, 220, 425, 282, 219, 279, 265, 92, 270, 194, 241, 172)}
NUMBERS = NUMBERS.get(os.uname().machine)
if NUMBERS is None or struct.calcsize("P") != 8:
    sys.exit(print(json.dumps([False, f"{os.uname().machine}, {8 * struct.calcsize('P')} bits"])))
def call(name, *args):
    ctypes.set_errno(0)
    done = libc.syscall(dict(zip(NAMES, NUMBERS))[name], *args)
    return ctypes.get_errno() if done == -1 else 0
def family(number, kind=socket.SOCK_DGRAM):
    try:
        socket.socket(number, kind).close()
    except OSError as error:
        return error.errno
    return 0
def attempt(function, *args):
    try:
        function(*args)
    except OSError as error:
        return error.errno
    return 0
buffer = ctypes.create_string_buffer(256)
attributes = ctypes.create_string_buffer(b"\\1\\0\\0\\0\\x70\\0\\0\\0", 256)
print(json.dumps([libc.syscall(NUMBERS[-1]) == os.getpid(), {
    "ptrace": call("ptrace", 16, 1, 0, 0), "unshare": call("unshare", 0x10000000),
    "unshare net": call("unshare", 0x50000000), "mount": call("mount", b"none", b"/tmp", b"tmpfs", 0, 0),
    "setns": call("setns", 0, 0), "bpf": call("bpf", 0, buffer, 64), "clone": call("clone", 0x10000011, 0, 0, 0, 0),
    "io_uring_setup": call("io_uring_setup", 1, buffer), "userfaultfd": call("userfaultfd", 0),
    "keyctl": call("keyctl", 0, -3, 1), "memfd_create": call("memfd_create", b"m", 0),
    "open_by_handle_at": call("open_by_handle_at", -100, buffer, 0), "personality": call("personality", 0x40000),
    "process_vm_readv": call("process_vm_readv", 1, 0, 0, 0, 0, 0), "shmget": call("shmget", 0, 4096, 0o1600),
    "perf_event_open": call("perf_event_open", attributes, 0, -1, -1, 0), "clone3": call("clone3", buffer, 88),
    "netlink": family(16, socket.SOCK_RAW), "packet": family(17, socket.SOCK_RAW), "alg": family(38),
    "vsock": family(40, socket.SOCK_STREAM), "raw": family(2, socket.SOCK_RAW),
    "prlimit of pid 1": attempt(resource.prlimit, 1, resource.RLIMIT_NOFILE, (8, 8)),
    "chroot": attempt(os.chroot, "/tmp"), "sethostname": attempt(socket.sethostname, "x"),
    "setuid": attempt(os.setuid, 0), "mknod": attempt(os.mknod, "/tmp/device", 0o20600, os.makedev(1, 1)),
}]))
"""
"""Calls that have no use in a sandbox. ``getpid``, made in the same way, is the control."""


async def system_calls(subject: Subject) -> str:
    async with subject.session(SPEC) as sandbox:
        works, seen = await value(sandbox, SYSCALLS)
    tried(works, f"the calls' numbers are not known here: {seen}" if isinstance(seen, str) else "getpid is wrong")
    held(all(seen.values()), [name for name, code in seen.items() if not code])
    filtered = (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT, errno.EACCES)
    inner = {"raw": errno.EPROTONOSUPPORT, "setuid": errno.EINVAL}  # where the user namespace has no such id
    strange = {name: code for name, code in seen.items() if code not in filtered and code != inner.get(name)}
    # Another errno: the kernel has looked at the call, and only its arguments were wrong.
    held(not strange, f"these reach the kernel: {strange}")
    return f"{len(seen)} calls refused: {', '.join(sorted(seen))}"


async def devices(subject: Subject) -> str:
    code = (
        _TRY
        + """
def node(number):
    os.mknod("/tmp/node", 0o20666, os.makedev(*number))
    os.unlink("/tmp/node")
def use(path):
    with open(path, "rb") as file:
        os.set_blocking(file.fileno(), False)
        file.read(1)
names = [p for p in sys.argv[1:] if os.path.exists(p)]
print(json.dumps([attempt(use, "/dev/zero"), {p: attempt(use, p) for p in names},
                  [attempt(node, n) for n in ((1, 1), (8, 0), (10, 200), (1, 3))], sorted(os.listdir("/dev"))]))
"""
    )
    known = [
        "mem",
        "kmem",
        "kmsg",
        "sda",
        "vda",
        "nvme0n1",
        "kvm",
        "fuse",
        "net/tun",
        "loop0",
        "loop-control",
        "mapper",
    ]
    paths = [f"/dev/{name}" for name in known]
    there = [path for path in paths if os.path.exists(path)]
    async with subject.session(SPEC) as sandbox:
        zero, opened, made, listing = await value(sandbox, code, *paths)
    tried(zero == 0 and listing, f"/dev/zero: errno {zero}")
    held(all(opened.values()) and all(made), f"opened {opened}, mknod {made}")
    return f"of {len(there)} on the host {len(opened)} are seen and none opens; mknod refused"


async def leftovers(subject: Subject) -> str:
    leave = """
import json, os, sys
left = []
for folder, inner, _ in os.walk("/"):
    if folder.startswith(("/proc", "/sys")) or folder.count("/") > 3:
        inner[:] = []
        continue
    path = os.path.join(folder, sys.argv[1])
    try:
        os.mkdir(path)
        left.append(path)
    except OSError:
        pass
print(json.dumps(left))
"""
    look = "import json, os, sys; print(json.dumps([p for p in sys.argv[1:] if os.path.lexists(p)]))"
    name = f"areal-left-{os.urandom(8).hex()}"
    async with subject.session(SPEC) as first, subject.session(SPEC) as beside:
        await run(beside, "")  # it is there before
        process = await first.spawn(["/bin/cat"])
        left = await value(first, leave, name)
        tried({f"/{folder}/{name}" for folder in ("work", "tmp", "dev/shm")} <= {*left}, left)
        tried(len(await value(first, look, *left)) == len(left), "what was left is not there")
        held(not (seen := await value(beside, look, *left)), f"a session beside it sees {seen}")
        await alone(beside)
        await process.kill()
    held(not (seen := [path for path in left if os.path.lexists(path)]), f"the host has {seen}")
    for _ in range(3):
        async with subject.session(SPEC) as later:
            held(not (seen := await value(later, look, *left)), f"a later session sees {seen}")
    return f"left in {len(left)} folders; sessions beside and after find nothing"
