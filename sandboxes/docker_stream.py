"""One attached container: frames over the connection that the engine upgrades, by a unix socket, TCP or TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from areal_agents.errors import ConfigError, SandboxError
from areal_agents.sandboxes.container_init import FRAME

MAX_FRAME = 1 << 24
TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens."""

    url: str
    tls: ssl.SSLContext | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection. Raises OSError and ConfigError."""
        parts = urlsplit(self.url)
        if parts.scheme in ("unix", "http+unix"):
            return await asyncio.open_unix_connection(parts.path or f"/{parts.netloc}")
        if parts.scheme in ("tcp", "http", "https") and parts.hostname:
            default = 2376 if self.tls else 2375
            return await asyncio.open_connection(parts.hostname, parts.port or default, ssl=self.tls)
        raise ConfigError(
            f"the engine's address {self.url!r} is none of unix://PATH, tcp://HOST:PORT and ssh://USER@HOST"
        )


class Stream:
    """The frames of pid 1 of one container."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.errors = b""
        """The start of what pid 1 printed on its stderr."""

    @classmethod
    async def attach(cls, address: Address, version: str, container: str) -> Stream:
        """Attach to a created container's streams. Raises SandboxError."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(TIMEOUT):
                reader, writer = await address.connect()
                path = f"/v{quote(version)}/containers/{quote(container)}/attach?stream=1&stdin=1&stdout=1&stderr=1"
                request = f"POST {path} HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
                writer.write(f"{request}Content-Length: 0\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            if isinstance(error, OSError | asyncio.IncompleteReadError | asyncio.LimitOverrunError):
                raise SandboxError(f"cannot attach to a container: {error!r}") from error
            raise
        if head.split(b" ", 2)[1:2] not in ([b"101"], [b"200"]):
            writer.transport.abort()
            raise SandboxError(f"cannot attach to a container: {head[:200]!r}")
        return cls(reader, writer)

    def send(self, data: bytes) -> None:
        """Write bytes, without waiting. What has ended is noticed by ``frames``."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def frames(self, take: Callable[[int, int, bytes], None]) -> None:
        """Hand every frame to ``take`` until the connection ends. Raises SandboxError for what is no frame."""
        buffer = bytearray()
        while True:
            try:
                head = await self._reader.readexactly(8)
                size = int.from_bytes(head[4:], "big")
                if head[0] > 2 or size > MAX_FRAME:
                    raise SandboxError(f"the engine sent {head!r} where a stream's header belongs")
                data = await self._reader.readexactly(size)
            except (OSError, asyncio.IncompleteReadError):
                return
            if head[0] == 2:
                self.errors = (self.errors + data)[:4096]
                continue
            buffer += data
            while len(buffer) >= FRAME.size:
                kind, ident, size = FRAME.unpack_from(buffer)
                if size > MAX_FRAME:
                    raise SandboxError("pid 1 sent what is no frame")
                if len(buffer) < FRAME.size + size:
                    break
                payload = bytes(buffer[FRAME.size : FRAME.size + size])
                del buffer[: FRAME.size + size]
                take(kind, ident, payload)

    def close(self) -> None:
        """Close the connection. Pid 1 reads the end of it and leaves."""
        self._writer.transport.abort()
