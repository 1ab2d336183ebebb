"""Sandboxes made by bubblewrap, without a daemon or an image.

Namespaces, seccomp, rlimits and a memory bound hold what runs inside.

    host                                     sandbox (own user, pid, net, ipc, uts, cgroup, mount namespaces)
    BubblewrapBackend ─ pool of Holders
      HeldSession ─ Holder ── control socket ── supervisor, pid 1 ── forks the program of each call
                       └───── stdin, stdout, stderr pipes ────────────────┘

Not covered: side channels, bugs of the kernel itself, the kernel's own memory (inodes, socket buffers) where memory is
bounded by rlimits, and fairness of CPU time between sessions.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import ProbeReport, Sandbox, SandboxSpec
from areal_agents.sandboxes import interpreter, launch, memory, probes, seccomp
from areal_agents.sandboxes.packages import ensure, requirements
from areal_agents.sandboxes.sandbox_process import Holder
from areal_agents.sandboxes.session import HeldSession, OpenSessions
from areal_agents.sandboxes.warm_pool import WarmPool
from areal_agents.sandboxes.zygote import Zygote, obstacle

_reports: dict[tuple[int, str, tuple[str, ...]], tuple[ProbeReport, memory.MemoryBound, bool]] = {}
"""What this process has proved, by effective uid and settings, and whether sandboxes are forked from a zygote."""


class BubblewrapBackend:
    """A backend whose sessions run in bubblewrap.

    It belongs to one event loop.
    """

    name = "bubblewrap"

    def __init__(
        self,
        *,
        pool: int = 2,
        python: str = interpreter.SYSTEM,
        preload: str = "",
        packages: str | Sequence[str] = "",
    ) -> None:
        """Check the settings, and start nothing yet.

        Args:
            pool: sandboxes kept started for the next session, for each of the last two specs. They are taken, never
                reused.
            python: what ``python3`` is inside: the folder of an environment with packages (venv, uv, conda), which is
                mounted read-only, or an interpreter.
            packages: requirements for an environment of its own, built before the first session and kept for the next
                run: ``numpy,pandas>=2,<3``, or a list. In place of ``python``.
            preload: modules that Python programs find imported, with commas between them: ``numpy,sympy``.

        Raises:
            ValueError: for a negative ``pool``, a module's name or a requirement that is none, or packages for a
                ``python`` that has its own.
        """
        if pool < 0:
            raise ValueError(f"pool must be 0 or more, got {pool}.")
        modules = tuple(name.strip() for name in preload.split(",")) if preload else ()
        for module in modules:
            if not all(map(str.isidentifier, module.split("."))):
                raise ValueError(f"preload has {module!r}, which is no module's name.")
        self._packages = requirements(packages) if packages else ()
        if packages and python != interpreter.SYSTEM:
            raise ValueError("packages make an environment of their own: leave python out, or install into it.")
        self._python, self._preload = python, modules
        self._zygote: Zygote | None = None
        self._forks, self._refused = False, ""
        self._tools: launch.Tools | None = None
        self._pool = WarmPool(pool, self._start_proved)
        self._sessions = OpenSessions()
        self._probing = asyncio.Lock()

    async def probe(self) -> ProbeReport:
        """Run real code inside and check what holds it.

        This happens once for each process and setting. Raises SandboxUnavailable with the failed probe and its remedy.
        """
        return (await self._proved())[0]

    async def _proved(self) -> tuple[ProbeReport, memory.MemoryBound]:
        async with self._probing:
            if self._packages:
                self._python = str(await asyncio.to_thread(ensure, self._packages))
                self._packages = ()
            key = (os.geteuid(), self._python, self._preload)
            if key not in _reports:
                _reports[key] = *await self._prove(), self._forks
            report, bound, self._forks = _reports[key]
            return report, bound

    async def _prove(self) -> tuple[ProbeReport, memory.MemoryBound]:
        tools = self._find_tools()
        seccomp.program()
        bound = await asyncio.to_thread(memory.detect)
        if isinstance(bound, memory.CgroupBound):
            await asyncio.to_thread(bound.reap)
        alone = obstacle(tools, bound)
        try:
            holder = await self._start_first(bound, alone)
        except SandboxError as error:
            raise SandboxUnavailable(self.name, "a sandbox did not start", str(error)) from error
        session = HeldSession.of(holder, probes.SPEC)
        try:
            report = await probes.run(self.name, session, bound, holder.host_uid(), tools.python)
        except SandboxError as error:
            raise SandboxUnavailable(self.name, "a sandbox died during its probes", str(error)) from error
        finally:
            await holder.close()
        if tools.preload and not self._forks:
            note = f"Each sandbox imports {', '.join(tools.preload)} for itself: {alone or self._refused}"
            report = replace(report, notes=(*report.notes, note))
        if tools.preload and bound.kind == "rlimits":
            note = "What is imported counts in each process: there are fewer, or a program has a Python of its own."
            report = replace(report, notes=(*report.notes, note))
        return report, bound

    async def _start_first(self, bound: memory.MemoryBound, alone: str) -> Holder:
        """Start the sandbox that is probed, forked where the host allows it. Raises SandboxError."""
        self._forks = not alone
        try:
            return await self._start(probes.SPEC, bound)
        except SandboxError as error:
            if not self._forks:
                raise
            self._forks, self._refused = False, str(error)
            return await self._start(probes.SPEC, bound)

    async def _start(self, spec: SandboxSpec, bound: memory.MemoryBound) -> Holder:
        tools, drop = self._find_tools(), os.geteuid() == 0
        if not self._forks:
            return await Holder.start(tools, spec, bound, drop=drop)
        if self._zygote is None:
            self._zygote = Zygote(tools, drop=drop)
        return await self._zygote.fork(spec, bound)

    def _find_tools(self) -> launch.Tools:
        """Find the programs once: the folders of an environment are looked through, and the users' homes."""
        if self._tools is None:
            self._tools = launch.find_tools(root=os.geteuid() == 0, python=self._python, preload=self._preload)
        return self._tools

    async def _start_proved(self, spec: SandboxSpec) -> Holder:
        _, bound = await self._proved()
        return await self._start(spec, bound)

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """Open a session, whose sandbox is taken at its first call.

        The first session of a process runs the probes. A session's calls raise SandboxUnavailable when a probe fails,
        and ConfigError for a spec that cannot be bounded. So does this one for a spec that names an image.
        """
        spec.refuse_image(self.name)
        return self._sessions.opened(HeldSession(spec, self._pool.take))

    async def aclose(self) -> None:
        """End open sessions and the pool.

        May be called twice.
        """
        await asyncio.gather(self._pool.aclose(), self._sessions.aclose())
        if self._zygote is not None:
            await self._zygote.close()
