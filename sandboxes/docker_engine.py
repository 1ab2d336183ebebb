"""The Docker engine as the backend uses it: the SDK on threads of its own, with errors that say what to do."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import posixpath
import ssl
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import ConfigError, SandboxError, SandboxUnavailable
from areal_agents.sandboxes.docker_stream import Address
from areal_agents.sandboxes.docker_tunnel import Tunnel

LABEL: Final = "areal-agents.sandbox"
OWNER: Final = "areal-agents.owner"
BACKEND: Final = "areal-agents.backend"
TIMEOUT: Final = 60
"""Seconds for an answer of the engine."""
WORKERS: Final = 8
MAX_FILE: Final = 1 << 20
"""Bytes of the largest file of an image that is read."""
_MAX_LINKS: Final = 8

_STREAMED: Final = {"pull": {"stream": True}}
"""What the SDK is told besides, to answer in rows."""

START: Final = (
    "Start it (systemctl start docker), say where it listens (DOCKER_HOST, with DOCKER_TLS_VERIFY and DOCKER_CERT_PATH "
    "for a remote one), or take another sandbox: bubblewrap needs no engine."
)


REACH: Final = "Try it: ssh HOST docker version. It must work with a key and without a question."


class Engine:
    """A client of one engine."""

    def __init__(self, host: str) -> None:
        """Take the engine at ``host``; "" means what the environment says (DOCKER_HOST), as for docker itself."""
        self._host = host
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="areal-docker")
        self._client: Any = None
        self._connecting = asyncio.Lock()
        self._tunnel: Tunnel | None = None
        self._way = ""
        self.address = Address("")
        self.info: dict[str, Any] = {}

    async def connect(self) -> None:
        """Connect once. Raises SandboxUnavailable where the SDK or the engine is missing."""
        async with self._connecting:
            if self._client is None:
                await self._connect()
            elif self._tunnel is not None and not self._tunnel.alive:
                await self._dig(self._tunnel)

    async def _connect(self) -> None:
        try:
            import docker
        except ImportError as error:
            raise SandboxUnavailable(
                "docker", "the Docker SDK is missing", "Install it: pip install 'areal-agents[docker]'."
            ) from error
        given = docker.utils.kwargs_from_env()
        url = self._host or given.get("base_url") or "unix:///var/run/docker.sock"
        tls = given.get("tls") if url == given.get("base_url") else None
        if url.startswith("ssh://"):
            self._tunnel, self._way, tls = self._tunnel or Tunnel(url), url, None
            await self._dig(self._tunnel)
            url = self._tunnel.url
        self.address = Address(url, _context(tls) if tls else None)
        try:
            # The SDK leaks a socket that does not connect.
            async with asyncio.timeout(TIMEOUT):
                _, writer = await self.address.connect()
            writer.close()
        except (OSError, ConfigError) as error:
            raise self._unanswered(url, error) from error
        try:
            self._client = await self._threaded(_client, url, tls or False)
            self.info = await self._threaded(self._client.info)
        except Exception as error:
            self._client = None
            if not isinstance(error, _kinds()):
                raise
            raise self._unanswered(url, error) from error

    async def _dig(self, tunnel: Tunnel) -> None:
        try:
            await tunnel.open()
        except OSError as error:
            raise SandboxUnavailable("docker", f"no engine is reached at {self._way}: {error}", REACH) from error

    def _unanswered(self, url: str, error: Exception) -> SandboxUnavailable:
        where, more = (self._way, self._tunnel.said) if self._tunnel is not None else (url, "")
        return SandboxUnavailable("docker", f"no engine answers at {where}: {more or _said(error)}", START)

    @property
    def version(self) -> str:
        return str(self._client.api_version)

    async def _threaded(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the SDK's ``APIClient``.

        Raises SandboxError, whose cause is the SDK's error.
        """
        await self.connect()
        try:
            return await self._threaded(getattr(self._client, name), *args, **kwargs)
        except _kinds() as error:
            raise SandboxError(f"the docker engine: {name}: {_said(error)}") from error

    def host_config(self, **settings: Any) -> dict[str, Any]:
        """Make what the SDK calls a host configuration."""
        made: dict[str, Any] = self._client.create_host_config(**settings)
        return made

    def endpoint_config(self, **settings: Any) -> dict[str, Any]:
        """Make what the SDK calls an endpoint configuration: a container's place on a network."""
        made: dict[str, Any] = self._client.create_endpoint_config(**settings)
        return made

    def ipam_config(self, subnet: str, gateway: str) -> dict[str, Any]:
        """Make what the SDK calls an IPAM configuration: the addresses of a network."""
        import docker

        pool = docker.types.IPAMPool(subnet=subnet, gateway=gateway)
        made: dict[str, Any] = docker.types.IPAMConfig(pool_configs=[pool])
        return made

    async def image(self, name: str) -> dict[str, Any] | None:
        """Describe an image, or return None where the engine has none of that name."""
        import docker

        try:
            found: dict[str, Any] = await self.call("inspect_image", name)
        except SandboxError as error:
            if isinstance(error.__cause__, docker.errors.NotFound):
                return None
            raise
        return found

    async def files(self, image: str, paths: Sequence[str]) -> list[str]:
        """Return what small text files of an image hold; "" for one that it has not."""
        import docker

        made = await self.call("create_container", image, ["/x"], labels={LABEL: "1", OWNER: owner()})

        def read(path: str) -> str:
            for _ in range(_MAX_LINKS):  # the engine follows all but the last name's
                try:
                    stream, told = self._client.get_archive(made["Id"], path)
                except docker.errors.NotFound:
                    return ""
                with contextlib.closing(stream):
                    if told.get("linkTarget"):
                        path = posixpath.join(posixpath.dirname(path), told["linkTarget"])
                        continue
                    return _text(_start(stream))
            return ""

        try:
            return [await self._threaded(read, path) for path in paths]
        except _kinds() as error:
            raise SandboxError(f"the docker engine: files of {image}: {_said(error)}") from error
        finally:
            await self.remove(made["Id"])

    def is_missing_image(self, error: SandboxError) -> bool:
        """Say whether a container was not made because the engine has its image no more."""
        import docker

        return isinstance(error.__cause__, docker.errors.ImageNotFound)

    async def follow(self, name: str, /, take: Callable[[dict[str, Any]], None], *args: Any, **kwargs: Any) -> None:
        """Call a method of the SDK that answers in rows, and hand each to ``take`` on a thread.

        Raises SandboxError, also for a row that is an error.
        """
        await self.connect()

        def whole() -> None:
            for row in getattr(self._client, name)(*args, **kwargs, decode=True, **_STREAMED.get(name, {})):
                if "error" in row:
                    raise SandboxError(str(row["error"])[:600])
                take(row)

        try:
            await self._threaded(whole)
        except _kinds() as error:
            raise SandboxError(_said(error)) from error

    async def require_in_registry(self, name: str) -> None:
        """Raise SandboxUnavailable where the registry of an image does not have it."""
        try:
            await self.call("inspect_distribution", name)
        except SandboxError as error:
            remedy = f"Pull, build or load it first: docker pull {name}."
            raise SandboxUnavailable("docker", f"image {name!r} cannot be had: {error}", remedy) from error

    async def remove(self, ident: str) -> None:
        """Remove a container in whatever state it is. It may be gone. Raises SandboxError."""
        import docker

        try:
            await self.call("remove_container", ident, force=True, v=True)
        except SandboxError as error:
            # 409: its removal is under way already.
            gone = isinstance(error.__cause__, docker.errors.APIError) and error.__cause__.status_code in (404, 409)
            if not gone:
                raise

    async def named(self, label: str, value: str) -> tuple[list[str], list[str]]:
        """Return the names of the containers with a label, and of the networks."""
        filters = {"label": f"{label}={value}"}
        rows = await self.call("containers", all=True, filters=filters)
        networks = await self.call("networks", filters=filters)
        containers = [name.lstrip("/") for row in rows for name in row["Names"] or [row["Id"]]]
        return containers, [row["Name"] for row in networks]

    async def remove_network(self, name: str) -> None:
        """Remove a network on which no container is left. It may be gone. Raises SandboxError."""
        import docker

        try:
            await self.call("remove_network", name)
        except SandboxError as error:
            if not isinstance(error.__cause__, docker.errors.NotFound):
                raise

    async def reap(self) -> int:
        """Remove containers and networks whose run on this machine is no more, and return how many containers."""
        rows = await self.call("containers", all=True, filters={"label": LABEL})
        doomed = [row["Id"] for row in rows if orphaned(row["Labels"].get(OWNER, ""))]
        for ident in doomed:
            await self.remove(ident)
        for row in await self.call("networks", filters={"label": LABEL}):
            if orphaned((row["Labels"] or {}).get(OWNER, "")):
                await self.remove_network(row["Id"])
        return len(doomed)

    async def aclose(self) -> None:
        """Close the connections. What is under way ends first. May be called twice."""
        await asyncio.to_thread(self._threads.shutdown, wait=True)
        if self._client is not None:
            self._client.close()
        if self._tunnel is not None:
            await self._tunnel.aclose()


def _start(stream: Iterator[bytes]) -> bytes:
    """Read what a small file's archive takes, and no more of one that an image may make as large as it likes."""
    data = b""
    while len(data) < MAX_FILE + (1 << 16) and (more := next(stream, b"")):
        data += more
    return data


def _text(data: bytes) -> str:
    """Return what the file of an archive holds; "" where it is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
            member = archive.next()
            file = archive.extractfile(member) if member is not None and member.isreg() else None
            return "" if file is None else file.read(MAX_FILE).decode("utf-8", "replace")
    except tarfile.TarError:
        return ""  # larger than what was read


def _client(url: str, tls: Any) -> Any:
    """Make the SDK's client, which talks in the engine's version of the API."""
    import docker

    client = docker.APIClient(
        base_url=url, tls=tls, timeout=TIMEOUT, version=docker.constants.DEFAULT_DOCKER_API_VERSION
    )
    client.trust_env = False  # REQUESTS_CA_BUNDLE would replace the engine's own authority, and a proxy hide it
    try:
        client._version = client.version(api_version=False)["ApiVersion"]
    except BaseException:
        client.close()
        raise
    return client


def owner() -> str:
    """Name this process so that another one on this machine can tell whether it still runs."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def orphaned(label: str) -> bool:
    """Say whether a container's owner ran on this machine and does no more."""
    machine, _, process = label.rpartition(" ")[0].rpartition(" ")
    started = label.rpartition(" ")[2]
    return machine == _machine() and process.isdigit() and _started(int(process)) != started


def _machine() -> str:
    """Name this boot of this machine, and the pid namespace: pids of another one say nothing here."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _kinds() -> tuple[type[Exception], ...]:
    import docker
    import requests

    return (docker.errors.DockerException, requests.exceptions.RequestException, OSError)


def _said(error: Exception) -> str:
    """Return what went wrong, without the addresses that the SDK puts around it."""
    explanation = getattr(error, "explanation", None)
    return str(explanation or error)[:600]


def _context(tls: Any) -> ssl.SSLContext:
    """Make the TLS settings of an attached stream from the SDK's."""
    context = ssl.create_default_context(cafile=tls.ca_cert or None)
    if not tls.verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if tls.cert:
        context.load_cert_chain(*tls.cert)
    return context
