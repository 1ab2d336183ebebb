"""The seccomp filter of every sandboxed process.

Dangerous system calls fail, and a call of a foreign architecture kills the process.
"""

from __future__ import annotations

import errno
import os
import struct
from functools import cache
from typing import Any, Final

from areal_agents.errors import SandboxUnavailable

CLONE_NAMESPACES: Final = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""

DENIED: Final = (
    # file systems and namespaces
    *("mount", "umount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "fsopen"),
    *("fsconfig", "fsmount", "fspick", "mount_setattr", "open_by_handle_at", "name_to_handle_at", "quotactl"),
    *("quotactl_fd", "swapon", "swapoff", "fanotify_init", "lookup_dcookie", "acct", "nfsservctl"),
    # other processes
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd", "migrate_pages"),
    *("move_pages", "mbind", "set_mempolicy", "personality"),
    # the kernel
    *("bpf", "perf_event_open", "keyctl", "add_key", "request_key", "userfaultfd", "io_uring_setup", "io_uring_enter"),
    *("io_uring_register", "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"),
    *("create_module", "reboot", "syslog", "vhangup", "iopl", "ioperm", "modify_ldt", "settimeofday", "adjtimex"),
    *("clock_settime", "clock_adjtime", "sethostname", "setdomainname", "vmsplice", "uselib", "ustat", "sysfs"),
    # memory that neither RLIMIT_AS nor a tmpfs size counts
    *("memfd_create", "memfd_secret", "shmget", "shmat", "shmctl", "msgget", "semget", "mq_open"),
)

ALLOWED_SOCKETS: Final = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6. Others, AF_VSOCK among them, are not held by a network namespace or widen the attack
surface."""

TIOCSTI, TIOCLINUX = 0x5412, 0x541C

MACHINES: Final = ("x86_64", "aarch64")
"""What the filter is written for. Elsewhere arguments have another order (clone's on s390x), or several calls are one
(socketcall on i686), so that it would let through what it means to stop."""


def require_machine() -> None:
    """Raise SandboxUnavailable on a machine that the filter is not written for."""
    machine, bits = os.uname().machine, 8 * struct.calcsize("P")
    if machine not in MACHINES or bits != 64:
        problem = f"the filter of system calls is written for {' and '.join(MACHINES)}, and this is "
        problem += f"{machine}" + ("" if machine not in MACHINES else f" with a Python of {bits} bits")
        remedy = "Use docker with an engine on such a machine, or unsafe_local for code that you wrote."
        raise SandboxUnavailable("bubblewrap", problem, remedy)


@cache
def program(gated: bool = False) -> bytes:
    """Compile the filter to BPF, for ``bwrap --seccomp``.

    With ``gated``, each program gets a ``gate`` too where this machine has one. Raises SandboxUnavailable when
    pyseccomp or libseccomp is missing, and on a machine that the filter is not written for.
    """
    require_machine()
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        remedy = "Install it: pip install pyseccomp, and apt-get install libseccomp2 (or dnf install libseccomp)."
        raise SandboxUnavailable("bubblewrap", f"seccomp: {error}", remedy) from error
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    deny, arg = pyseccomp.ERRNO(errno.EPERM), pyseccomp.Arg
    known = {name: pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) for name in DENIED}
    for name, number in known.items():
        # -1: libseccomp is older than the call. A negative number otherwise: this architecture lacks it.
        if number >= 0:
            rules.add_rule(deny, name)
    # The flags of clone3 lie behind a pointer: ENOSYS makes libc fall back to clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in CLONE_NAMESPACES:
        rules.add_rule(deny, "clone", arg(0, pyseccomp.MASKED_EQ, flag, flag))
    for request in (TIOCSTI, TIOCLINUX):
        rules.add_rule(deny, "ioctl", arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, request))
    if not (gated and gate()):
        _keep_limits(rules)
    unsupported = pyseccomp.ERRNO(errno.EAFNOSUPPORT)
    for call in ("socket", "socketpair"):
        rules.add_rule(unsupported, call, arg(0, pyseccomp.GT, max(ALLOWED_SOCKETS)))
        for family in sorted(set(range(max(ALLOWED_SOCKETS))) - set(ALLOWED_SOCKETS)):
            rules.add_rule(unsupported, call, arg(0, pyseccomp.EQ, family))
    return _compiled(rules)


@cache
def gate() -> dict[str, Any] | None:
    """Compile the filters of ``process_gate``, or return None on a kernel without them.

    Pid 1 sets limits of programs there, so that what forbids it is part of these and not of its own filter.
    """
    import pyseccomp

    require_machine()
    halting, plain = pyseccomp.SyscallFilter(pyseccomp.ALLOW), pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    numbers = {name: pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) for name in ("clone", "fork", "vfork")}
    try:
        for name, number in numbers.items():
            if number >= 0:
                halting.add_rule(pyseccomp.NOTIFY, name)
    except OSError:  # libseccomp or the kernel is older than such filters
        return None
    _keep_limits(halting)
    _keep_limits(plain)
    call = pyseccomp.resolve_syscall(pyseccomp.system_arch(), "seccomp")
    filters = {"halting": _compiled(halting).hex(), "plain": _compiled(plain).hex()}
    return {**filters, "seccomp": call, "clone": numbers["clone"]}


def _keep_limits(rules: Any) -> None:
    """Forbid to set another process's limits, which would reach pid 1: it has the same uid."""
    import pyseccomp

    arg = pyseccomp.Arg
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "prlimit64", arg(0, pyseccomp.NE, 0), arg(2, pyseccomp.NE, 0))


def _compiled(rules: Any) -> bytes:
    descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with open(descriptor, "rb+", buffering=0) as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
