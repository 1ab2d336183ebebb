"""The seccomp filter of ``seccomp.py`` in the form that an engine takes: docker's JSON profile."""

from __future__ import annotations

import errno
import json
from typing import Any

from areal_agents.errors import SandboxUnavailable
from areal_agents.sandboxes import seccomp

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
"""By what engines call them."""
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


SERVICES_USE = ("memfd_create", "shmget", "shmat", "shmctl", "msgget", "semget", "mq_open", "mbind", "set_mempolicy")
"""Calls that databases make. What they get counts as the container's memory."""


def machine(architecture: str) -> str:
    """Return the name of an engine's machine. Raises SandboxUnavailable for one that the filter is not written for."""
    if (name := _MACHINES.get(architecture)) is None:
        problem = f"the filter of system calls is written for {' and '.join(seccomp.MACHINES)}, and the engine's "
        raise SandboxUnavailable(
            "docker", f"{problem}machine is {architecture or 'not named'}", "Take an engine on such a machine."
        )
    return name


def profile(architecture: str, *, service: bool = False) -> str:
    """Return the profile for an engine's architecture, and for a service's container where it is for one.

    Calls of another architecture kill the thread. Raises SandboxUnavailable for a machine that it is not written for.
    """
    native = {"architectures": [_ARCHITECTURES[machine(architecture)]]}
    denied = [name for name in seccomp.DENIED if not (service and name in SERVICES_USE)]
    rules = [_rule(denied, errno.EPERM), _rule(["clone3"], errno.ENOSYS)]
    rules += [_rule(["clone"], errno.EPERM, _masked(0, flag, flag)) for flag in seccomp.CLONE_NAMESPACES]
    rules += [_rule(["ioctl"], errno.EPERM, _masked(1, 0xFFFFFFFF, r)) for r in (seccomp.TIOCSTI, seccomp.TIOCLINUX)]
    rules.append(_rule(["prlimit64"], errno.EPERM, _argument(0, "NE", 0), _argument(2, "NE", 0)))
    highest = max(seccomp.ALLOWED_SOCKETS)
    for name in ("socket", "socketpair"):
        rules.append(_rule([name], errno.EAFNOSUPPORT, _argument(0, "GT", highest)))
        for family in sorted(set(range(highest)) - set(seccomp.ALLOWED_SOCKETS)):
            rules.append(_rule([name], errno.EAFNOSUPPORT, _argument(0, "EQ", family)))
    return json.dumps({"defaultAction": "SCMP_ACT_ALLOW", **native, "syscalls": rules})


def _rule(names: list[str], error: int, *arguments: dict[str, Any]) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": error, "args": list(arguments)}


def _argument(index: int, comparison: str, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "op": f"SCMP_CMP_{comparison}"}


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}
