"""Fresh namespaces for a fork of the zygote: what bwrap does for a sandbox that starts cold.

The zygote is a sandbox itself, and never runs anybody's code. Each fork of it gets user, pid, mount, net, ipc, uts and
cgroup namespaces of its own, new file systems in all that can be written, no capability, and the seccomp filter. Sent
into the sandbox with the supervisor, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Mapping
from typing import Any

CLONE = {"x86_64": 56, "aarch64": 220}
"""The number of the system call by machine, for programs of 64 bits."""
NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, RECURSIVE, PRIVATE, BIND = 1, 2, 4, 8, 32, 1 << 14, 1 << 18, 1 << 12
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER, DROP_BOUNDING, SET_DUMPABLE, AMBIENT, CLEAR_ALL = 38, 22, 2, 24, 4, 47, 4
CAPABILITIES_V3 = 0x20080522
INTERFACE_FLAGS, SET_INTERFACE_FLAGS, UP = 0x8913, 0x8914, 1


def _libc() -> Any:
    # PyDLL keeps the interpreter's lock: a raw clone in between would copy it in the wrong hands.
    return ctypes.PyDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def fork() -> int:
    """Fork into fresh namespaces, and return as ``os.fork`` does. Raises OSError."""
    call = _libc().syscall
    call.restype = ctypes.c_long
    flags = NAMESPACES | signal.SIGCHLD
    return _checked(call(ctypes.c_long(CLONE[os.uname().machine]), ctypes.c_ulong(flags), 0, 0, 0, 0), "clone")


def settle(request: Mapping[str, Any], program: bytes) -> None:
    """Make the process, pid 1 of its namespaces, what pid 1 of a cold sandbox is. Raises OSError.

    Args:
        request: ``disk``, the size of each file system in bytes, and what is to be kept below those: ``mounts``,
            ``links`` with their targets, and ``fixed``, folders on the way that are not to be written.
        program: the seccomp filter, as BPF.
    """
    libc = _libc()
    _checked(libc.prctl(SET_DUMPABLE, 1, 0, 0, 0), "dumpable")  # else the map's file is root's
    uid, gid = 1000, 1000
    for name, text in (("uid_map", f"{uid} {uid} 1"), ("setgroups", "deny"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _checked(libc.prctl(SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    os.setsid()
    _mount_all(libc, request)
    socket.sethostname("sandbox")
    _raise_loopback()
    os.chdir("/work")
    _drop(libc, program)


def _mount_all(libc: Any, request: Mapping[str, Any]) -> None:
    def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
        texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
        done = libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
        _checked(done, f"mount {target}")

    mount("none", "/", None, RECURSIVE | PRIVATE)
    handles = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in request["mounts"]}
    plain, disk, fixed = NO_SUID | NO_DEV, request["disk"], request["fixed"]
    for path in ("/dev/shm", "/tmp", "/work"):
        # Files without content take memory of the kernel: their number is bounded too.
        mount("tmpfs", path, "tmpfs", plain, f"size={disk},nr_inodes={max(20_000, disk // 1024)},mode=0755")
    mount("devpts", "/dev/pts", "devpts", NO_SUID | NO_EXEC, "newinstance,ptmxmode=0666,mode=620")
    for path in fixed:
        os.mkdir(path)
        mount("tmpfs", path, "tmpfs", plain, "size=4096,mode=0755")
    for path, handle in handles.items():
        os.makedirs(path, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", path, None, BIND | RECURSIVE)
        os.close(handle)
    for path, target in request["links"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(target, path)
    for path in fixed:
        mount("none", path, None, REMOUNT | BIND | READ_ONLY | plain)
    mount("proc", "/proc", "proc", plain | NO_EXEC)


def _raise_loopback() -> None:
    with socket.socket() as any_socket:
        name = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, INTERFACE_FLAGS, name))[1]
        fcntl.ioctl(any_socket, SET_INTERFACE_FLAGS, struct.pack("16sh14x", b"lo", flags | UP))


def _drop(libc: Any, program: bytes) -> None:
    """Give every capability up for good, and load the filter."""
    for number in range(64):
        if libc.prctl(DROP_BOUNDING, number, 0, 0, 0) < 0:
            break  # the kernel knows no more
    libc.prctl(AMBIENT, CLEAR_ALL, 0, 0, 0)
    header, none = struct.pack("=Ii", CAPABILITIES_V3, 0), bytes(24)
    _checked(libc.capset(header, none), "capset")
    _checked(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    loaded = Program(len(program) // 8, program)
    _checked(libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(loaded), 0, 0), "seccomp")
