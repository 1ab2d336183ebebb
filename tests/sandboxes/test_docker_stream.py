"""The connection to a container: what an engine (a server of the test) answers instead of a stream."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from areal_agents.errors import SandboxError
from areal_agents.sandboxes import docker_stream
from areal_agents.sandboxes.docker_stream import Address, Stream


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
        (b"HTTP/1.1 101 UPG", "IncompleteReadError"),  # it goes away
        (b"x" * (1 << 17), "LimitOverrunError"),
        (None, "TimeoutError"),
    ],
)
def test_an_engine_that_does_not_attach_leaves_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, message: str
) -> None:
    monkeypatch.setattr(docker_stream, "TIMEOUT", 0.2 if answer is None else 60.0)
    gone = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if answer is not None:
                writer.write(answer)
                writer.write_eof()
            while await reader.read(1 << 16):
                pass
        gone.append(True)
        writer.close()

    async def whole() -> None:
        server = await asyncio.start_unix_server(serve, tmp_path / "engine")
        with pytest.raises(SandboxError, match=f"cannot attach to a container: .*{message}"):
            await Stream.attach(Address(f"unix://{tmp_path}/engine"), "1.41", "x")
        while not gone:  # noqa: ASYNC110  the engine's side sees the end
            await asyncio.sleep(0.001)
        server.close()
        await server.wait_closed()

    asyncio.run(whole())
