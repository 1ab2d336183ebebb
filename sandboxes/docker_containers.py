"""The containers and networks of one backend: made, attached to, removed, and looked for where a removal failed."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import ConfigError, SandboxError
from areal_agents.sandbox import SandboxSpec, Service
from areal_agents.sandboxes import docker_mounts, launch, memory
from areal_agents.sandboxes.container import Container
from areal_agents.sandboxes.docker_engine import BACKEND, LABEL, OWNER, Engine, owner
from areal_agents.sandboxes.docker_images import Image
from areal_agents.sandboxes.docker_seccomp import profile
from areal_agents.sandboxes.docker_stream import Stream

SPARE_PLACES: Final = 8
KILLED: Final = 128 + 9
"""Exit code of a container whose pid 1 was killed, for memory or by anybody else."""
ENDS: Final = 10.0
"""Seconds after the end of its stream in which an engine sees the end of a container."""
MARKED: Final = 2.0
"""Seconds after that in which it says that something was killed for memory."""
PAUSE: Final = 0.05
NO_DNS: Final = "0.0.0.0"
"""A name server that is none. The engine's own, inside a network, would ask the host's for what it does not know."""
SERVICE_CAPABILITIES: Final = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID")
"""With which the usual images, started as root, prepare their folders and become a plain user."""
_READ_ONLY: Final = tuple(f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger"))
_NO_CORE: Final = {"Name": "core", "Soft": 0, "Hard": 0}
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
Ending = Callable[[], Awaitable[None]]
_numbers = itertools.count(os.getpid() * 64)


def source(main: str) -> bytes:
    """Return the program of pid 1 with the modules that it imports. ``main`` is the function that it runs."""
    parts = ["import sys, types"]
    for name in _SENT:
        text = Path(__file__).with_name(f"{name}.py").read_text()
        text = re.sub(r"^from areal_agents\.sandboxes import .*$", "", text, flags=re.MULTILINE)
        parts.append(f"{name} = types.ModuleType({name!r})")
        parts.append(f"{name}.__dict__.update({{n: globals()[n] for n in {_SENT!r} if n in globals()}})")
        parts.append(f"exec({text!r}, {name}.__dict__)")
    parts.append(f"container_init.{main}()")
    return "\n".join(parts).encode()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a container is on a network of its session."""

    network: str
    address: str
    hosts: Mapping[str, str]
    """The addresses of the services by name."""


class Containers:
    """The containers of one backend."""

    def __init__(self, engine: Engine, own: str, *, runtime: str, cpus: float) -> None:
        """Make containers of the backend that calls itself ``own``."""
        self._engine, self._own = engine, own
        self._runtime, self._cpus = runtime, cpus
        self.known: set[str] = set()
        """Names of containers and networks that are in use."""
        self.left = False
        """Whether there may be others of this backend."""

    @property
    def labels(self) -> dict[str, str]:
        return {LABEL: "1", OWNER: owner(), BACKEND: self._own}

    def name(self) -> tuple[str, int]:
        """Return a name for a container or a network, and its number."""
        number = next(_numbers)
        return f"areal-agents-{self._own}-{number}", number

    async def session(
        self,
        spec: SandboxSpec,
        image: Image,
        place: Place | None = None,
        also: Ending | None = None,
    ) -> Container:
        """Start a session's container.

        Args:
            spec: its limits.
            image: what it is made of.
            place: where it is on a network; None is no network.
            also: removes what must go with it.

        Raises:
            SandboxError: where the engine does not start it.
            SandboxUnavailable: where the image's volumes hide what it needs.
            ConfigError: where the spec cannot be bounded.
        """
        docker_mounts.require_session(image.name, image.volumes)
        # Programs stop at NPROC, which counts what their uid has, and leave places of the pids cgroup to pid 1: code
        # that fills all places must not keep it from the next call, as if the sandbox had failed.
        limits = dict(memory.CgroupBound(Path("/"), 1).limits(spec))
        files = max(spec.open_files, 256)
        ident, number = self.name()
        mapped = any("userns" in option or "rootless" in option for option in self._engine.info["SecurityOptions"])
        uid = 10_000 + number % 50_000 if mapped else 1_000_000 + number % 1_000_000_000
        scratch = dict.fromkeys(docker_mounts.SCRATCH, _scratch(spec.disk, f"mode=755,uid={uid},gid={uid}"))
        # Folders that the image declares as volumes would lie on the engine's disk, writable and unbounded.
        scratch |= {path: "ro,nosuid,nodev,size=4096" for path in image.volumes if path not in scratch}
        config = self._host_config(
            image,
            place,
            tmpfs=scratch,
            security_opt=self._security(profile(self._engine.info["Architecture"])),
            pids_limit=spec.processes + 1 + SPARE_PLACES,
            mem_limit=spec.memory,
            ulimits=[_NO_CORE, {"Name": "nofile", "Soft": files, "Hard": files}],
            **self._processors(self._cpus),
        )
        settings = self._settings(image, place, config) | {"user": f"{uid}:{uid}", "hostname": "sandbox"}
        variables = {name: value for name, value in image.variables.items() if name != "HOME"}
        return await self._start(ident, image, settings, (limits, variables, uid), "main", also)

    async def service(self, service: Service, image: Image, place: Place, account: tuple[int, int]) -> Container:
        """Start the container of a service, in which nothing runs yet, and whose folders ``account`` owns.

        Raises SandboxError.
        """
        ident, _ = self.name()
        folders = ("/tmp", "/run", "/var/tmp", "/dev/shm", *image.volumes, *service.writable)
        config = self._host_config(
            image,
            place,
            tmpfs=dict.fromkeys(folders, _scratch(service.disk, "mode=1777,uid={},gid={}".format(*account))),
            cap_add=list(SERVICE_CAPABILITIES),
            security_opt=self._security(profile(self._engine.info["Architecture"], service=True)),
            pids_limit=service.processes + 1 + SPARE_PLACES,
            mem_limit=service.memory,
            ulimits=[_NO_CORE],
            **self._processors(service.cpus),
        )
        # Root would write to these, beyond what the folders may have: docker's own list, and its file systems.
        config["ReadonlyPaths"] = [*_READ_ONLY, "/dev", "/sys/fs/cgroup"]
        settings = self._settings(image, place, config)
        settings |= {"user": service.user or image.user or "0", "hostname": service.name}
        return await self._start(ident, image, settings, ({}, {}, 0), "serve_service", None)

    def _host_config(self, image: Image, place: Place | None, **given: Any) -> dict[str, Any]:
        if self._runtime:
            given["runtime"] = self._runtime
        if place is not None:
            given |= {"network_mode": place.network, "extra_hosts": dict(place.hosts), "dns": [NO_DNS]}
        config = self._engine.host_config(
            **{"network_mode": "none", **given},
            ipc_mode="none",
            read_only=True,
            binds=list(image.binds),
            cap_drop=["ALL"],
            memswap_limit=given["mem_limit"],
            log_config={"Type": "none", "Config": {}},
        )
        if image.masked:
            config["MaskedPaths"] = list(image.masked)
        return config

    def _settings(self, image: Image, place: Place | None, config: dict[str, Any]) -> dict[str, Any]:
        """Return what the SDK's ``create_container`` is told."""
        network: dict[str, Any] = {"network_disabled": True}
        if place is not None:
            end = self._engine.endpoint_config(ipv4_address=place.address)
            network = {"networking_config": {"EndpointsConfig": {place.network: end}}}
        return {
            "image": image.ident,
            "command": [*image.start[1:], "-I", "-S", "-c", _BOOT],
            "entrypoint": [image.start[0]],
            "working_dir": "/",
            "stdin_open": True,
            # Without a value they are removed: what an image sets (LD_PRELOAD, say) must not steer pid 1.
            "environment": list(image.removed),
            "healthcheck": {"test": ["NONE"]},
            "labels": self.labels,
            "host_config": config,
            **network,
        }

    def _processors(self, cpus: float) -> dict[str, int]:
        return {"nano_cpus": int(cpus * 1e9)} if self._engine.info.get("CpuCfsQuota") else {}

    @staticmethod
    def _security(filter: str) -> list[str]:
        return ["no-new-privileges:true", f"seccomp={filter}"]

    async def _start(
        self,
        ident: str,
        image: Image,
        settings: dict[str, Any],
        given: tuple[dict[str, int], Mapping[str, str], int],
        main: str,
        also: Ending | None,
    ) -> Container:
        limits, variables, uid = given

        async def remove() -> None:
            self.known.discard(ident)
            await self.remove(ident)
            if also is not None:
                await also()

        self.known.add(ident)
        stream: Stream | None = None
        try:
            await self._engine.call("create_container", name=ident, **settings)
            stream = await Stream.attach(self._engine.address, self._engine.version, ident)
            program = source(main)
            stream.send(len(program).to_bytes(4, "big") + program)
            await self._engine.call("start", ident)
        except BaseException as error:
            if stream is not None:
                stream.close()
            await asyncio.shield(asyncio.ensure_future(remove()))
            if isinstance(error, SandboxError) and "setting rlimit" in str(error):  # of files: others it does not set
                raise ConfigError(
                    f"open_files={limits['NOFILE']}: the engine does not allow as many. {error}"
                ) from error
            raise
        container = Container(stream, limits, remove, lambda: self._killed_for_memory(ident), variables, uid)
        try:
            await container.ready()
            launch.require_limits(limits, container.hard)
            folders = container.folders if main == "main" else {}  # services may have volumes in them
            docker_mounts.require_apart(image.name, folders)
            docker_mounts.require_seen(image.name, image.volumes, folders, container.mounts)
        except BaseException:
            await container.close()
            raise
        await self.clean()
        return container

    async def _killed_for_memory(self, ident: str) -> bool:
        """Say whether a container's pid 1, whose stream has ended, was killed, and the kernel had killed for memory.

        An engine may know that late, first the end and then the reason: it is asked again.
        """
        clock = asyncio.get_running_loop().time
        late = clock() + ENDS
        marked = clock() + ENDS
        try:
            while clock() < min(late, marked):
                state = (await self._engine.call("inspect_container", ident))["State"]
                if not state["Running"]:
                    if state["OOMKilled"] or state["ExitCode"] != KILLED:
                        return bool(state["OOMKilled"] and state["ExitCode"] == KILLED)
                    marked = min(marked, clock() + MARKED)
                await asyncio.sleep(PAUSE)
        except SandboxError:
            pass  # the engine is gone too: the container is lost, for whatever reason
        return False

    async def remove(self, ident: str) -> None:
        """Remove a container, or remember that one is left where the engine does not do it now."""
        try:
            await self._engine.remove(ident)
        except SandboxError:
            self.left = True

    async def remove_network(self, name: str) -> None:
        """Remove a network, or remember that one is left."""
        self.known.discard(name)
        try:
            await self._engine.remove_network(name)
        except SandboxError:
            self.left = True

    async def clean(self) -> None:
        """Remove what is left of an engine that went away meanwhile, and of answers that never came."""
        if self.left:
            self.left = False
            try:
                containers, networks = await self._engine.named(BACKEND, self._own)
            except SandboxError:
                self.left = True
            else:
                await asyncio.gather(*map(self.remove, set(containers) - self.known))
                await asyncio.gather(*map(self.remove_network, set(networks) - self.known))


def _scratch(size: int, more: str) -> str:
    """Return the options of a folder in memory."""
    return f"rw,nosuid,nodev,exec,{more},size={size},nr_inodes={max(20_000, size // 1024)}"


def request(container: Container, argv: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return what pid 1 is asked to run a program of ours with, to which no image gives variables."""
    return {"op": "exec", "argv": list(argv), "env": {}, "limits": dict(container.limits), "own": True, **more}
