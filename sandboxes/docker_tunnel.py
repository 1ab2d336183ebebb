"""A way to an engine by ssh: one ssh process, which makes the engine's socket there a socket here.

    SDK, attached streams ──▶ a unix socket in a private folder ── ssh ──▶ the engine's unix socket

It reads the end of its input where this process is killed, and leaves. It asks for no password: keys, or an agent.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from areal_agents.errors import ConfigError

SOCKET: Final = "/var/run/docker.sock"
TIMEOUT: Final = 60.0
_OPTIONS: Final = (
    "BatchMode=yes",
    "ExitOnForwardFailure=yes",
    "StreamLocalBindUnlink=yes",
    "ServerAliveInterval=15",
    "ControlMaster=no",
    "ControlPath=none",
)
_TAIL: Final = 1024


class Tunnel:
    """The socket here of an engine there. It belongs to one event loop."""

    def __init__(self, url: str) -> None:
        """Take ``ssh://USER@HOST:PORT``, with the path of the engine's socket where that is another one.

        Raises ConfigError for what is none.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"the engine's address {url!r}: {error}") from error
        if not host or host.startswith("-") or (parts.username or "").startswith("-") or parts.password is not None:
            raise ConfigError(f"the engine's address {url!r} is no ssh://USER@HOST:PORT, with a key and no password")
        self._target = f"{parts.username}@{host}" if parts.username else host
        self._port = () if port is None else ("-p", str(port))
        self._there = parts.path if parts.path not in ("", "/") else SOCKET
        self._folder = Path(tempfile.mkdtemp(prefix="areal-ssh-", dir="/tmp"))
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._said = b""

    @property
    def url(self) -> str:
        return f"unix://{self._folder}/sock"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def said(self) -> str:
        """What ssh complained of last."""
        return self._said.decode("utf-8", "replace").strip()

    async def open(self) -> None:
        """Start it, or start it again. Raises OSError."""
        await self._end()
        options = [part for option in _OPTIONS for part in ("-o", option)]
        forward = ("-L", f"{self._folder}/sock:{self._there}")
        self._process = await asyncio.create_subprocess_exec(
            *("ssh", "-T", *options, *self._port, *forward, "--", self._target, "exec cat"),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # an interrupt of this process leaves it, for what is to be removed at the end
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._said = b""
        self._listening = asyncio.ensure_future(self._listen(self._process.stderr))
        try:
            async with asyncio.timeout(TIMEOUT):
                self._process.stdin.write(b"\n")
                if not await self._process.stdout.readline():  # it comes back when the session, and the socket, stand
                    await self._listening
                    raise OSError(self.said or "ssh ended")
        except BaseException:
            await self._end()
            raise

    async def _listen(self, errors: asyncio.StreamReader | None) -> None:
        assert errors is not None
        while data := await errors.read(4096):
            self._said = (self._said + data)[-_TAIL:]

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
            assert process.stdin is not None
            process.stdin.close()
        if self._listening is not None:
            await asyncio.wait((self._listening,))

    async def aclose(self) -> None:
        """End it. May be called twice."""
        await self._end()
        shutil.rmtree(self._folder, ignore_errors=True)
