"""Sandboxes made by a Docker engine, on this machine or another: a container a session, then it is discarded.

    host                                        engine                  container (no network, read-only root)
    DockerBackend ─ pool of Containers ── SDK ─▶ create, start, remove
      HeldSession ─ Container ── one attached connection, frames ───▶ container_init, pid 1 ── forks each program

A call costs a fork inside and no request of the engine. Images other than the backend's own need no Python: pid 1 has
its own, on a volume made of that image. Not covered: side channels, and bugs of the kernel and of the runtime.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import uuid
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import ConfigError, SandboxError, SandboxUnavailable
from areal_agents.sandbox import ProbeReport, Sandbox, SandboxSpec
from areal_agents.sandboxes import interpreter, launch, memory, probes
from areal_agents.sandboxes.container import Container
from areal_agents.sandboxes.docker_engine import BACKEND, LABEL, OWNER, Engine, owner
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.sandboxes.docker_seccomp import profile
from areal_agents.sandboxes.docker_stream import Stream
from areal_agents.sandboxes.session import HeldSession, OpenSessions
from areal_agents.sandboxes.warm_pool import WarmPool

BUILD: Final = "Make it: areal-agents sandbox build docker."
SPARE_PLACES: Final = 8
_PYTHON_AT: Final = "/.areal-agents"
_TRIPLETS: Final = {
    "x86_64": ("x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
    "aarch64": ("aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
}
_SENT: Final = ("process_gate", "work_files", "supervisor", "container_init")
_BOOT: Final = """
import os
def take(size):
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            os._exit(0)
        data += more
    return data
exec(take(int.from_bytes(take(4), "big")), {"__name__": "boot"})
"""
_reports: dict[tuple[str, ...], ProbeReport] = {}
"""What this process has proved, by engine, address and runtime."""
_uids = itertools.count(os.getpid() * 64)


def source() -> bytes:
    """Return the program of pid 1 with the modules that it imports."""
    parts = ["import sys, types"]
    for name in _SENT:
        text = Path(__file__).with_name(f"{name}.py").read_text()
        text = re.sub(r"^from areal_agents\.sandboxes import .*$", "", text, flags=re.MULTILINE)
        parts.append(f"{name} = types.ModuleType({name!r})")
        parts.append(f"{name}.__dict__.update({{n: globals()[n] for n in {_SENT!r} if n in globals()}})")
        parts.append(f"exec({text!r}, {name}.__dict__)")
    parts.append("container_init.main()")
    return "\n".join(parts).encode()


@dataclass(frozen=True, slots=True)
class _Bound:
    """How the engine bounds memory, for the probes."""

    kind: str


@dataclass(frozen=True, slots=True)
class _Image:
    """What a container needs to know of its image."""

    name: str
    start: tuple[str, ...]
    """The Python of pid 1."""
    binds: tuple[str, ...]
    path: str
    volumes: tuple[str, ...]


class DockerBackend:
    """A backend whose sessions are containers.

    It belongs to one event loop.
    """

    name = "docker"

    def __init__(self, *, image: str = "", runtime: str = "", cpus: str = "1", host: str = "", pool: int = 2) -> None:
        """Check the settings, and start nothing yet.

        Args:
            image: what sessions run in whose spec names none; "" is the backend's own image.
            runtime: the engine's runtime, ``runc`` or ``runsc``; "" leaves it to the engine.
            cpus: how many CPUs a session may use, such as ``0.5``.
            host: where the engine listens; "" leaves it to DOCKER_HOST.
            pool: containers kept started for the next session, for each of the last two specs.

        Raises:
            ValueError: for a negative ``pool``.
            ConfigError: for ``cpus`` that are no positive number.
        """
        if pool < 0:
            raise ValueError(f"pool must be 0 or more, got {pool}.")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", cpus, re.ASCII) or not 0.01 <= float(cpus) <= 1024:
            raise ConfigError(f"docker?cpus={cpus}: write a number such as 0.5 or 2.")
        self._image, self._runtime, self._cpus = image, runtime, float(cpus)
        self._engine = Engine(host)
        self._pool = WarmPool(pool, self._start)
        self._images: dict[str, asyncio.Task[_Image]] = {}
        self._sessions = OpenSessions()
        self._proving: asyncio.Task[ProbeReport] | None = None
        self._own = uuid.uuid4().hex[:16]
        self._known: set[str] = set()
        """Names of containers that are in use."""
        self._left = False
        """Whether there may be others of this backend."""

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
        if not info.get("MemoryLimit") or not info.get("PidsLimit"):
            raise SandboxUnavailable(
                self.name, "the engine cannot bound memory or processes", "Give it memory and pids cgroups."
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

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """Open a session, whose container is taken at its first call.

        The first session of a backend runs the probes. A session's calls raise SandboxUnavailable when a probe fails or
        the image cannot be had, and ConfigError for a spec that cannot be bounded.
        """
        return self._sessions.opened(HeldSession(spec, self._acquire))

    async def _acquire(self, spec: SandboxSpec) -> Container:
        await self.probe()
        return await self._pool.take(replace(spec, image=spec.image or self._image or IMAGE))

    async def prepare(self, image: str) -> None:
        """Have an image ready ahead of its first session: it is pulled where the engine has none of that name."""
        await self._engine.connect()
        await self._look(image)

    async def aclose(self) -> None:
        """End open sessions and the pool.

        May be called twice.
        """
        if self._proving is not None:
            await asyncio.wait((self._proving,))
        await asyncio.gather(self._pool.aclose(), self._sessions.aclose())
        await self._clean()
        await asyncio.to_thread(self._engine.close)

    async def _look(self, name: str) -> _Image:
        task = self._images.get(name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._images[name] = asyncio.ensure_future(self._describe(name))
        return await asyncio.shield(task)

    async def _describe(self, name: str) -> _Image:
        own = await self._engine.image(IMAGE)
        if own is None:
            raise SandboxUnavailable(self.name, f"the engine has no image {IMAGE!r}", BUILD)
        found = own if name == IMAGE else await self._engine.image(name) or await self._engine.pull(name)
        config = found.get("Config") or {}
        variables = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
        path = variables.get("PATH") or "/usr/local/bin:/usr/bin:/bin"
        volumes = tuple(config.get("Volumes") or ())
        if name == IMAGE:
            return _Image(name, ("/usr/bin/python3",), (), launch.ENVIRONMENT["PATH"], volumes)
        if (found["Os"], found["Architecture"]) != (own["Os"], own["Architecture"]):
            raise SandboxUnavailable(
                self.name, f"image {name!r} is for {found['Os']} on {found['Architecture']}", "Take another image."
            )
        triplet, loader = _TRIPLETS[self._engine.info["Architecture"]]
        volume = f"areal-agents-python-{own['Id'].removeprefix('sha256:')[:16]}"
        await self._fill(volume)
        libraries = f"{_PYTHON_AT}/lib/{triplet}"
        start = (f"{libraries}/{loader}", "--library-path", libraries, f"{_PYTHON_AT}/bin/python3")
        return _Image(name, start, (f"{volume}:{_PYTHON_AT}:ro",), path, volumes)

    async def _fill(self, volume: str) -> None:
        """Make the volume with pid 1's Python: an empty one gets what the image has where it is mounted."""
        config = self._engine.host_config(binds=[f"{volume}:/usr"])
        made = await self._engine.call(
            "create_container", IMAGE, ["/bin/true"], host_config=config, labels={LABEL: "1", OWNER: owner()}
        )
        await self._engine.call("remove_container", made["Id"], force=True)

    async def _start(self, spec: SandboxSpec) -> Container:
        """Start a container. Raises SandboxError, SandboxUnavailable and ConfigError."""
        # Programs stop at NPROC, which counts what their uid has, and leave places of the pids cgroup to pid 1: code
        # that fills all places must not keep it from the next call, as if the sandbox had failed.
        limits = dict(memory.CgroupBound(Path("/"), 1).limits(spec))
        image = await self._look(spec.image)
        number = next(_uids)
        mapped = any("userns" in option or "rootless" in option for option in self._engine.info["SecurityOptions"])
        uid = 10_000 + number % 50_000 if mapped else 1_000_000 + number % 1_000_000_000
        ident = f"areal-agents-{self._own}-{number}"

        async def remove() -> None:
            self._known.discard(ident)
            await self._remove(ident)

        async def oom() -> bool:
            try:
                return bool((await self._engine.call("inspect_container", ident))["State"]["OOMKilled"])
            except SandboxError:
                return False  # the engine is gone too: the container is lost, for whatever reason

        self._known.add(ident)
        try:
            await self._engine.call("create_container", image.name, name=ident, **self._settings(spec, image, uid))
            stream = await Stream.attach(self._engine.address, self._engine.version, ident)
            program = source()
            stream.send(len(program).to_bytes(4, "big") + program)
            await self._engine.call("start", ident)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(remove()))
            raise
        container = Container(stream, limits, remove, oom, {"PATH": image.path}, uid)
        try:
            await container.ready()
        except BaseException:
            await container.close()
            raise
        await self._clean()
        return container

    async def _remove(self, ident: str) -> None:
        """Remove a container, or remember that one is left where the engine does not do it now."""
        try:
            await self._engine.remove(ident)
        except SandboxError:
            self._left = True

    async def _clean(self) -> None:
        """Remove what is left of an engine that went away meanwhile, and of answers that never came."""
        if self._left:
            self._left = False
            try:
                mine = await self._engine.named(BACKEND, self._own)
            except SandboxError:
                self._left = True
            else:
                await asyncio.gather(*map(self._remove, set(mine) - self._known))

    def _settings(self, spec: SandboxSpec, image: _Image, uid: int) -> dict[str, Any]:
        """Return what the SDK's ``create_container`` is told."""
        inodes = max(20_000, spec.disk // 1024)
        scratch = f"rw,nosuid,nodev,exec,mode=755,size={spec.disk},nr_inodes={inodes},uid={uid},gid={uid}"
        mounts = dict.fromkeys(("/work", "/tmp", "/dev/shm"), scratch)
        # Folders that the image declares as volumes would lie on the engine's disk, writable and unbounded.
        mounts |= {path: "ro,nosuid,nodev,size=4096" for path in image.volumes if path not in mounts}
        info = self._engine.info
        given: dict[str, Any] = {"nano_cpus": int(self._cpus * 1e9)} if info.get("CpuCfsQuota") else {}
        if self._runtime:
            given["runtime"] = self._runtime
        config = self._engine.host_config(
            network_mode="none",
            ipc_mode="none",
            read_only=True,
            tmpfs=mounts,
            binds=list(image.binds),
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true", f"seccomp={profile(info['Architecture'])}"],
            pids_limit=spec.processes + 1 + SPARE_PLACES,
            mem_limit=spec.memory,
            memswap_limit=spec.memory,
            log_config={"Type": "none", "Config": {}},
            ulimits=[
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "nofile", "Soft": max(spec.open_files, 256), "Hard": max(spec.open_files, 256)},
            ],
            **given,
        )
        return {
            "command": [*image.start[1:], "-I", "-S", "-c", _BOOT],
            "entrypoint": [image.start[0]],
            "user": f"{uid}:{uid}",
            "working_dir": "/",
            "stdin_open": True,
            "network_disabled": True,
            "host_config": config,
            "hostname": "sandbox",
            "healthcheck": {"test": ["NONE"]},
            "labels": {LABEL: "1", OWNER: owner(), BACKEND: self._own},
        }
