"""Sandboxes made by a Docker engine, on this machine or another: a container a session, then it is discarded.

    host                                        engine                  container (no network, read-only root)
    DockerBackend ─ pool of Containers ── SDK ─▶ create, start, remove
      HeldSession ─ Container ── one attached connection, frames ───▶ container_init, pid 1 ── forks each program

A call costs a fork inside and no request of the engine. Images other than the backend's own need no Python: pid 1 has
its own, on a volume made of that image. Not covered: side channels, and bugs of the kernel and of the runtime.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final

from areal_agents.errors import ConfigError, SandboxError, SandboxUnavailable
from areal_agents.sandbox import ProbeReport, Sandbox, SandboxSpec
from areal_agents.sandboxes import interpreter, probes
from areal_agents.sandboxes.container import Container
from areal_agents.sandboxes.docker_containers import Containers
from areal_agents.sandboxes.docker_engine import Engine
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.sandboxes.docker_images import Image, Images
from areal_agents.sandboxes.docker_services import Services
from areal_agents.sandboxes.session import HeldSession, OpenSessions
from areal_agents.sandboxes.warm_pool import WarmPool

_RUNTIMES: Final = {
    "runsc": "gVisor's: install it (https://gvisor.dev/docs/user_guide/install), then `runsc install`, and restart the "
    "engine."
}
_UNITS: Final = {"M": 20, "G": 30, "T": 40}
_reports: dict[tuple[str, ...], ProbeReport] = {}
"""What this process has proved, by engine, address and runtime."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """How the engine bounds memory, for the probes."""

    kind: str


class DockerBackend:
    """A backend whose sessions are containers.

    It belongs to one event loop.
    """

    name = "docker"

    def __init__(
        self,
        *,
        image: str = "",
        runtime: str = "",
        cpus: str = "1",
        host: str = "",
        image_cache: str = "100G",
        pool: int = 2,
    ) -> None:
        """Check the settings, and start nothing yet.

        Args:
            image: what sessions run in whose spec names none; "" is the backend's own image.
            runtime: the engine's runtime, ``runc`` or ``runsc``; "" leaves it to the engine.
            cpus: how many CPUs a session may use, such as ``0.5``.
            host: where the engine listens; "" leaves it to DOCKER_HOST.
            image_cache: bytes that images may take that were pulled or built here, such as ``50G``: beyond it those
                are removed that were used longest ago.
            pool: containers kept started for the next session, for each of the last two specs, with their services.

        Raises:
            ValueError: for a negative ``pool``.
            ConfigError: for ``cpus`` that are no positive number, and an ``image_cache`` that is no size.
        """
        if pool < 0:
            raise ValueError(f"pool must be 0 or more, got {pool}.")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", cpus, re.ASCII) or not 0.01 <= float(cpus) <= 1024:
            raise ConfigError(f"docker?cpus={cpus}: write a number such as 0.5 or 2.")
        size = re.fullmatch(r"([0-9]{1,9})([MGT])", image_cache, re.ASCII)
        if size is None:
            raise ConfigError(f"docker?image_cache={image_cache}: write a size such as 500M, 50G or 1T.")
        self._image, self._runtime = image, runtime
        self._engine = Engine(host)
        self._own = uuid.uuid4().hex[:16]
        self._images = Images(self._engine, int(size[1]) << _UNITS[size[2]])
        self._containers = Containers(self._engine, self._own, runtime=runtime, cpus=float(cpus))
        self._services = Services(self._engine, self._containers, self._images)
        self._pool = WarmPool(pool, self._start)
        self._sessions = OpenSessions()
        self._proving: asyncio.Task[ProbeReport] | None = None

    async def probe(self) -> ProbeReport:
        """Remove what dead runs left, run real code inside, and check what holds it.

        This happens once for each process, engine and runtime. Raises SandboxUnavailable with the failed probe and its
        remedy.
        """
        await self._engine.connect()
        key = (str(self._engine.info["ID"]), self._engine.address.url, self._runtime)
        if key in _reports:
            return _reports[key]
        if self._proving is None or (self._proving.done() and self._proving.exception() is not None):
            self._proving = asyncio.ensure_future(self._prove())
        _reports[key] = await asyncio.shield(self._proving)
        return _reports[key]

    async def _prove(self) -> ProbeReport:
        reaped = await self._engine.reap()
        info = self._engine.info
        self._require_runtime()
        if not info.get("MemoryLimit") or not info.get("PidsLimit"):
            rootless = any("rootless" in option for option in info["SecurityOptions"])
            remedy = "A rootless engine needs cgroup v2 and a systemd that delegates: see Docker's rootless mode."
            raise SandboxUnavailable(
                self.name,
                "the engine cannot bound memory or processes",
                remedy if rootless else "Give it memory and pids cgroups.",
            )
        try:
            container = await self._start(replace(probes.SPEC, image=IMAGE))
        except SandboxError as error:
            raise SandboxUnavailable(self.name, "a container did not start", str(error)) from error
        kind = f"cgroup-v{info.get('CgroupVersion', '1')}"
        session = HeldSession.of(container, probes.SPEC)
        try:
            python = interpreter.Interpreter("python3")
            report = await probes.run(self.name, session, _Bound(kind), container.uid, python)  # type: ignore[arg-type]
        except SandboxUnavailable as error:
            remedy = "The engine does not isolate as docker does by default; see its log, and its runtime's."
            raise SandboxUnavailable(self.name, error.probe, remedy) from error
        except SandboxError as error:
            raise SandboxUnavailable(self.name, "a container died during its probes", str(error)) from error
        finally:
            await container.close()
        notes = [f"removed {reaped} containers that dead runs had left"] if reaped else []
        if not info.get("CpuCfsQuota"):
            notes.append("CPU is not bounded: the engine's kernel has no CFS quota")
        return replace(report, notes=(*report.notes, *notes))

    def _require_runtime(self) -> None:
        known = self._engine.info.get("Runtimes") or {}
        if self._runtime and self._runtime not in known and "." not in self._runtime:  # a shim's name has dots
            remedy = _RUNTIMES.get(self._runtime, "Install it, name it in the engine's daemon.json, and restart that.")
            problem = f"the engine has no runtime {self._runtime!r}, only {', '.join(sorted(known))}"
            raise SandboxUnavailable(self.name, problem, remedy)

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """Open a session, whose container is taken at its first call.

        The first session of a backend runs the probes. A session's calls raise SandboxUnavailable when a probe fails or
        the image cannot be had, and ConfigError for a spec that cannot be bounded.
        """
        return self._sessions.opened(HeldSession(spec, self._acquire))

    async def _acquire(self, spec: SandboxSpec) -> Container:
        await self.probe()
        return await self._pool.take(self._whole(spec))

    def _whole(self, spec: SandboxSpec) -> SandboxSpec:
        return replace(spec, image=spec.image or self._image or IMAGE)

    async def prepare(self, specs: Iterable[SandboxSpec]) -> None:
        """Have the images of sessions and of their services ready ahead: pulled, or built from their folders.

        Raises SandboxUnavailable with those that cannot be had.
        """
        await self._engine.connect()
        whole = [self._whole(spec) for spec in specs]
        await self._images.prepare(name for s in whole for name in (s.image, *(x.image for x in s.services)))
        for name in {spec.image for spec in whole}:
            self._images.require_session(name)

    async def _start(self, spec: SandboxSpec) -> Container:
        """Start what a session needs. Raises SandboxError, SandboxUnavailable and ConfigError."""
        image = await self._images.look(spec.image)
        try:
            return await self._begin(spec, image)
        except SandboxError as error:
            if not self._engine.is_missing_image(error):
                raise
        for name in (spec.image, *(service.image for service in spec.services)):
            self._images.forget(name)  # one was removed meanwhile, here or by the user
        return await self._begin(spec, await self._images.look(spec.image))

    async def _begin(self, spec: SandboxSpec, image: Image) -> Container:
        if spec.services:
            return await self._services.session(spec, image)
        return await self._containers.session(spec, image)

    async def aclose(self) -> None:
        """End open sessions and the pool.

        May be called twice.
        """
        if self._proving is not None:
            await asyncio.wait((self._proving,))
        await asyncio.gather(self._pool.aclose(), self._sessions.aclose())
        await self._containers.clean()
        await self._engine.aclose()
