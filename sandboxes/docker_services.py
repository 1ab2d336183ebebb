"""A session with services beside it: a network of its own, a container for each, and one that ends with all others.

    network (no route out, no address of the host on it)          the engine's names and gateway: none
      session's container ── reaches each by name (/etc/hosts) ──▶ service's container ── pid 1 (ours) ── the program

Pid 1 of a service is what it is of a session: it reads the end of its stream where the host process is killed, and
leaves, and with it all that runs in the container.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec, Service
from areal_agents.sandboxes import network_look
from areal_agents.sandboxes.container import GRACE, Container, ContainerProcess
from areal_agents.sandboxes.docker_containers import Containers, Place, request
from areal_agents.sandboxes.docker_engine import Engine
from areal_agents.sandboxes.docker_images import Image, Images

NETWORKS: Final = ipaddress.ip_network("240.0.0.0/5")
"""Addresses that are reserved, which no host or network has: a network inside can hide none that code may want."""
PREFIX: Final = 28
TRIES: Final = 20
PAUSE: Final = 0.1
_TAIL: Final = 2048
_FOR_EVER: Final = 3600.0
_OPTIONS: Final = {
    "com.docker.network.bridge.inhibit_ipv4": "true",  # the host has no address on it
    "com.docker.network.bridge.enable_ip_masquerade": "false",
}
_HEARS: Final = (
    "docker: programs on the engine's host that listen on all its addresses may get datagrams of sessions with "
    "services, which get no answer. To prevent it, there: sysctl -w net.ipv4.conf.default.rp_filter=1"
)

_CONNECT: Final = """
import socket, sys, time
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
        break
    except OSError:
        time.sleep(0.05)
"""
_INTERFACES: Final = Path(network_look.__file__).read_bytes()
_LOOK: Final = """
import concurrent.futures, json, socket, sys
def attempt(address):
    try:
        socket.create_connection(address, 1).close()
    except TimeoutError:
        return ""
    except OSError as error:
        return "" if error.errno in (101, 113) else error.strerror
    return "connected"
wanted = [(host, port) for host in sys.argv[1:] for port in (22, 80, 53)]
with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
    seen = {f"{host}:{port}": said for (host, port), said in zip(wanted, pool.map(attempt, wanted)) if said}
looking = {}
exec(sys.stdin.read(), looking)
print(json.dumps({"answers": seen, "interfaces": looking["interfaces"]()}))
"""


class Side:
    """One service: its container and its program."""

    def __init__(self, service: Service, container: Container, program: ContainerProcess, base: dict[str, Any]) -> None:
        """Read what the program prints from now on. ``base`` is what others in its container are started with."""
        self.service, self.container = service, container
        self._program, self._base = program, base
        self._said = bytearray()
        self._seen, self._ended = "", ""
        """How its ``ready`` program ended last, and when the program itself did."""
        self.over = asyncio.ensure_future(self._read())
        """Done when the program has ended."""

    async def _read(self) -> None:
        try:
            while not self._program.ended:
                self._said += await self._program.recv(1 << 16, timeout=_FOR_EVER)
                del self._said[:-_TAIL]
        finally:
            self._ended = f"{datetime.now(UTC):%H:%M:%S} UTC"

    @property
    def fate(self) -> str:
        """Say how and when it ended, with the last of what it printed."""
        code = self._program.exit_code
        how = f"was lost at {self._ended}" if code is None else f"ended at {self._ended} with exit code {code}"
        if not self.over.done():
            how = "does not answer"
        if self._program.out_of_memory:
            how += f", because its memory of {self.service.memory >> 20} MiB was full"
        return f"service {self.service.name!r} {how}{self.last_words}"

    @property
    def last_words(self) -> str:
        said = _shown(self._said)
        return f" (it printed: {said})" if said else ""

    async def runs(self) -> bool:
        """Say whether it runs still, as its pid 1 knows. Where it does not, its ``fate`` is known afterwards."""
        if await self._program.runs():
            return True
        await asyncio.wait((self.over,), timeout=GRACE)
        return False

    async def started(self, session: Container, python: tuple[str, ...], address: str) -> None:
        """Wait until it serves. Raises SandboxError."""
        waiting = asyncio.ensure_future(self._serves(session, python, address))
        try:
            async with asyncio.timeout(self.service.start_seconds):
                await asyncio.wait((waiting, self.over), return_when=asyncio.FIRST_COMPLETED)
                if self.over.done():
                    raise SandboxError(f"{self.fate}, before it had started")
                await waiting
        except TimeoutError as error:
            what = f"{self.service.name!r} did not start within {self.service.start_seconds:g} s"
            raise SandboxError(f"service {what}{self._seen}{self.last_words}") from error
        finally:
            waiting.cancel()
            await asyncio.wait((waiting,))

    async def _serves(self, session: Container, python: tuple[str, ...], address: str) -> None:
        if self.service.port:
            argv = [*python, "-I", "-S", "-c", _CONNECT, address, str(self.service.port)]
            if (await _ended(session, request(session, argv)))[0] != 0:
                raise SandboxError(f"the port of service {self.service.name!r} was not tried: the session ended")
        look = {**self._base, "argv": list(self.service.ready)}
        while self.service.ready:
            code, said = await _ended(self.container, look)
            if code == 0:
                break
            self._seen = f", and {self.service.ready[0]!r} ended with {code}" + (f": {_shown(said)}" if said else "")
            await asyncio.sleep(PAUSE)

    async def close(self) -> None:
        await self.container.close()
        await asyncio.wait((self.over,))


class Services:
    """The sessions of one backend that have services."""

    def __init__(self, engine: Engine, containers: Containers, images: Images) -> None:
        """Use the backend's containers and images."""
        self._engine, self._containers, self._images = engine, containers, images
        self._proved = False
        self._deaf = True
        """Whether the engine's host is known to drop what comes from the networks."""

    async def session(self, spec: SandboxSpec, image: Image) -> Container:
        """Start the services of a session, and then its own container, with which all of them end.

        Raises SandboxError, and SandboxUnavailable where the network is not private.
        """
        images = [await self._images.look(service.image) for service in spec.services]
        network, gateway = await self._network()
        addresses = [str(gateway + 1 + i) for i in range(len(spec.services) + 1)]
        hosts = {service.name: address for service, address in zip(spec.services, addresses, strict=False)}
        sides: list[Side] = []

        async def end() -> None:
            await asyncio.gather(*(side.close() for side in sides))
            await self._containers.remove_network(network)

        try:
            makings = zip(spec.services, images, addresses, strict=False)
            await _all(self._side(s, i, Place(network, a, hosts), sides) for s, i, a in makings)
            session = await self._containers.session(spec, image, Place(network, addresses[-1], hosts), end)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(end()))
            raise
        try:
            await self._prove(session, image, str(gateway))
            await _all(side.started(session, image.start, hosts[side.service.name]) for side in sides)
        except BaseException:
            await session.close()
            raise
        for side in sides:
            side.over.add_done_callback(lambda _, side=side: session.fail(f"its {side.fate}"))  # type: ignore[misc]

        async def witness() -> None:
            # A call may end before the host hears that a service had ended, and must not be blamed for that.
            running = await asyncio.gather(*(side.runs() for side in sides))
            for side, runs in zip(sides, running, strict=True):
                if not runs:
                    session.fail(f"its {side.fate}")

        session.witness = witness
        return session

    async def _side(self, service: Service, image: Image, place: Place, sides: list[Side]) -> None:
        account = await self._images.account(image, service.user or image.user or "0")
        container = await self._containers.service(service, image, place, account)
        try:
            base = request(
                container,
                service.command or image.command,
                env={**image.variables, **service.environment},
                inherit=["HOME", "HOSTNAME"],
                folder=image.folder,
            )
            if not base["argv"]:
                raise SandboxUnavailable(
                    "docker", f"image {service.image!r} has no command", f"Give service {service.name!r} one."
                )
            program = await container.spawn(base, stdin=False)
        except BaseException:
            await container.close()
            raise
        sides.append(Side(service, container, program, base))

    async def _network(self) -> tuple[str, ipaddress.IPv4Address]:
        """Make a network, and return its name and the address on it that would be the gateway's."""
        for attempt in range(TRIES):
            name, _ = self._containers.name()
            space = random.SystemRandom().randrange(1 << (PREFIX - NETWORKS.prefixlen))
            network = ipaddress.IPv4Network((int(NETWORKS.network_address) + (space << (32 - PREFIX)), PREFIX))
            gateway = network.network_address + 1
            self._containers.known.add(name)
            try:
                made = await self._engine.call(
                    "create_network",
                    name,
                    driver="bridge",
                    internal=True,
                    options=_OPTIONS,
                    ipam=self._engine.ipam_config(str(network), str(gateway)),
                    labels=self._containers.labels,
                )
            except SandboxError as error:
                await self._containers.remove_network(name)
                if "overlap" not in str(error).lower() or attempt == TRIES - 1:
                    raise
            except BaseException:
                await asyncio.shield(asyncio.ensure_future(self._containers.remove_network(name)))
                raise
            else:
                if self._deaf and not _deafen(made["Id"]):
                    self._deaf = False
                    print(_HEARS, file=sys.stderr, flush=True)
                return name, gateway
        raise AssertionError("the last attempt returns or raises")

    async def _prove(self, session: Container, image: Image, gateway: str) -> None:
        """See once from inside that nobody answers where a gateway would be, nor beyond it."""
        if self._proved:
            return
        argv = [*image.start, "-I", "-S", "-c", _LOOK, gateway, "1.1.1.1"]
        done = await session.run(request(session, argv), stdin=_INTERFACES, timeout=60, max_output=1 << 16)
        if done.cause != "exit" or done.code != 0:
            raise SandboxError(f"a network was not tried: {done.cause}, {done.stderr[-300:]!r}")
        seen = json.loads(done.stdout)
        if seen["answers"] or not set(seen["interfaces"]) <= {"lo", "eth0"}:
            raise SandboxUnavailable(
                "docker",
                f"the network of a session with services is not private: {seen}",
                "The engine ignores com.docker.network.bridge.inhibit_ipv4, or is no Docker engine: take another one.",
            )
        self._proved = True


def _deafen(network: str) -> bool:
    """Have this machine drop all that comes from a network. Returns False where it may not, or has it not.

    It has no address on it, and yet takes what is sent to a multicast or broadcast address, or past all routes to an
    address of its own: unless it checks where that comes from.
    """
    here = Path("/proc/sys/net/ipv4/conf")
    one = here / f"br-{network[:12]}" / "rp_filter"
    try:
        if one.read_text().strip() == "0" == (here / "all" / "rp_filter").read_text().strip():
            one.write_text("1")
    except OSError:
        return False
    return True


async def _ended(container: Container, asked: dict[str, Any]) -> tuple[int | None, bytes]:
    """Run a program beside others, and return its exit code, None where the container was lost, and its last words."""
    process = await container.spawn(asked, stdin=False)
    said = b""
    try:
        while not process.ended:
            said = (said + await process.recv(1 << 16, timeout=_FOR_EVER))[-_TAIL:]
        return process.exit_code, said
    finally:
        await process.kill()


def _shown(said: bytes | bytearray) -> str:
    """Return the last of what code inside printed, on which no terminal acts."""
    text = said.decode("utf-8", "replace").strip()[-600:]
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


async def _all(awaitables: Any) -> None:
    """Wait for all, and raise the first error when the others have been cancelled and are over."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)
        raise
