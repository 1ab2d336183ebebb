"""Sandboxes that are forked from one that has imported what takes long, in milliseconds instead of a second and more.

    host                            zygote: a bwrap sandbox, no seccomp, runs nobody's code
    Zygote ── control socket ────── pid 1, which has imported numpy …
      ForkedHolder ── control ────────└─ fork in namespaces of its own, seccomp, cgroup: pid 1 of one session

What a session cannot have from a fork: a uid of its own on a root host. All sessions of a zygote have the zygote's, as
those of a plain user have the user's; the namespaces keep them apart.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from typing import Any

from areal_agents.errors import SandboxError
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import launch, process_gate, seccomp, uids
from areal_agents.sandboxes.memory import MemoryBound
from areal_agents.sandboxes.pipes import Fds
from areal_agents.sandboxes.sandbox_process import Holder, names

_SPEC = SandboxSpec()
"""Its disk is the size of the zygote's own file systems, which each fork covers."""


def obstacle(tools: launch.Tools, bound: MemoryBound) -> str:
    """Say why sandboxes with imported modules start one by one on this host, or return ""."""
    if not tools.preload:
        return "no modules are imported"
    if bound.kind == "systemd-scope":
        return "a systemd scope bounds one sandbox, and all forks of a zygote would share it"
    seccomp.require_machine()  # what forks cannot be made on, no sandbox is
    return ""


class Zygote:
    """The zygote of a backend, which is started at its first fork, and again when it has died."""

    def __init__(self, tools: launch.Tools, *, drop: bool) -> None:
        self._tools, self._drop = tools, drop
        self._starting = asyncio.Lock()
        self._holder: Holder | None = None

    async def fork(self, spec: SandboxSpec, bound: MemoryBound) -> Holder:
        """Fork a sandbox. Raises SandboxError."""
        async with self._starting:
            if self._holder is not None and not self._holder.alive:
                await self._holder.close()
                self._holder = None
            if self._holder is None:
                self._holder = await Holder.start(self._tools, _SPEC, bound, drop=self._drop, zygote=True)
        return await ForkedHolder.fork(self._holder, self._tools, spec, bound)

    async def close(self) -> None:
        async with self._starting:
            holder, self._holder = self._holder, None
        if holder is not None:
            await holder.close()


class ForkedHolder(Holder):
    """A sandbox that a zygote forked."""

    @classmethod
    async def fork(cls, zygote: Holder, tools: launch.Tools, spec: SandboxSpec, bound: MemoryBound) -> Holder:
        """Let a zygote fork a sandbox.

        Args:
            zygote: it.
            tools: paths of the programs.
            spec: what the session may use.
            bound: how its memory is bounded.

        Raises:
            SandboxError: when it does not come up.
            ConfigError: for a spec that leaves no room.
        """
        limits, program = bound.limits(spec), seccomp.program(bound.kind == "rlimits")
        launch.require_limits(limits, process_gate.hard_limits(limits))
        meter = bound.meter(f"areal-agents-u{os.getpid()}-{next(names)}", spec)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        holder = cls(ours, None, spec)
        holder.meter, holder.limits, holder.given = meter, limits, launch.given(tools, bound, spec)
        if zygote.slot is not None:  # the uid of its pipes; the zygote gives the slot back
            holder.slot = uids.Slot(zygote.slot.index, zygote.slot.uid, -1)
        fds = Fds()
        try:
            request: dict[str, Any] = {"disk": spec.disk, **tools.python.covered}
            message, errors = fds.memfd("request", json.dumps(request).encode()), fds.memfd("stderr")
            zygote.send_fork([message, theirs.fileno(), fds.memfd("seccomp", program), errors])
            theirs.close()
            await holder.wait_ready(errors, tools)
            holder.pid = holder.sender
            holder._inner = os.pidfd_open(holder.pid)
            meter.attach(holder.pid)
        except BaseException as error:
            await holder.close()
            if isinstance(error, OSError):
                raise SandboxError(f"cannot fork a sandbox: {error}") from error
            raise
        finally:
            theirs.close()
            fds.close()
        return holder

    def _running(self) -> bool:
        return self._inner >= 0

    def kill(self) -> None:
        """Kill everything inside at once, and leave it to ``close`` to collect."""
        if self._inner >= 0:
            try:
                signal.pidfd_send_signal(self._inner, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                return
