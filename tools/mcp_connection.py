"""Connections to MCP servers, over stdio or HTTP, by the official SDK (``pip install 'areal-agents[mcp]'``).

    McpServer ─▶ Connection ─▶ a task of its own holds the SDK's client open ─▶ calls from any task of the loop

A server's death, a broken answer and a server that stops to answer are an EnvError from outside: no policy's doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from areal_agents.errors import ConfigError, EnvError
from areal_agents.utils.short_text import cut, described
from areal_agents.utils.sync import on_exit

OPEN_S: Final = 60.0
"""Seconds for a server to start and say what it offers."""
ALIVE_S: Final = 20.0
"""Seconds for a server to answer whether it still does."""
CLOSE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class McpServer:
    """How to reach a server: a program to start, or an address."""

    command: tuple[str, ...] = ()
    url: str = ""
    env: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    cwd: str | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.url or self.command[0].rpartition("/")[2]


class Connection:
    """An open connection. A task of its own enters and leaves the SDK's client, as its task groups want it."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self._stop = asyncio.Event()
        self._client: Any = None
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in `close`
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start or reach the server. Raises EnvError."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(ready))
        try:
            done, _ = await asyncio.wait((self._task, ready), timeout=OPEN_S, return_when=asyncio.FIRST_COMPLETED)
            if ready not in done:
                error = self._task.exception() if self._task in done else None
                raise self.lost(f"did not start: {described(_first(error)) if error else 'no answer'}")
        except BaseException:
            await self.close()
            raise

    async def _hold(self, ready: asyncio.Future[None]) -> None:
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared._httpx_utils import create_mcp_http_client

        server = self.server
        async with contextlib.AsyncExitStack() as stack:
            if server.url:
                http = await stack.enter_async_context(create_mcp_http_client(headers=dict(server.headers)))
                transport: Any = streamable_http_client(server.url, http_client=http)
            else:
                command, *args = server.command
                parameters = StdioServerParameters(command=command, args=args, env=dict(server.env), cwd=server.cwd)
                transport = stdio_client(parameters, errlog=self._said)
            self._client = await stack.enter_async_context(Client(transport, cache=None))
            if not ready.done():
                ready.set_result(None)
            await self._stop.wait()

    async def tools(self) -> list[Any]:
        """Return what the server offers, of all pages."""
        found: list[Any] = []
        cursor: str | None = None
        while True:
            page = await self._client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None or len(found) > 1000:
                return found

    async def call(self, name: str, arguments: dict[str, Any], seconds: float) -> Any:
        """Call a tool.

        Returns:
            The SDK's result, a text where the server refused the call, or None where it took longer than ``seconds``.

        Raises:
            EnvError: the server is gone, hangs or answers nonsense.
        """
        from mcp import MCPError

        try:
            async with asyncio.timeout(seconds):
                return await self._client.call_tool(name, arguments)
        except TimeoutError:
            await self._prove("hangs")
            return None
        except MCPError as error:
            await self._prove(f"failed: {cut(str(error), 300)}")
            return cut(str(error), 1000)
        except Exception as error:  # the SDK's, of a transport that broke or an answer that breaks the protocol
            raise self.lost(f"failed: {described(_first(error))}") from error

    async def _prove(self, what: str) -> None:
        """Ask the server whether it still answers. Raises EnvError where it does not."""
        try:
            async with asyncio.timeout(ALIVE_S):
                await self._client.list_tools()
        except Exception as error:  # whatever it is, there was no answer
            raise self.lost(what) from error

    def lost(self, what: str) -> EnvError:
        """Return the error for a server that is no more use, with the end of what it printed."""
        said = ""
        with contextlib.suppress(OSError, ValueError):
            self._said.seek(max(0, self._said.seek(0, 2) - 2000))
            said = self._said.read().strip()[-500:]
        error = EnvError(f"MCP server {self.server.name!r} {what}" + (f"; it said: {said}" if said else ""))
        error.blame = "outside"
        return error

    async def close(self) -> None:
        """Leave the server, or end it where it is ours. May be called twice."""
        self._stop.set()
        task, self._task = self._task, None
        if task is not None:
            done, _ = await asyncio.wait((task,), timeout=CLOSE_S if self._client is not None else 0)
            if not done:
                task.cancel()
                await asyncio.wait((task,), timeout=CLOSE_S)
            if task.done() and not task.cancelled():
                task.exception()  # a dead server's last words were told when a call failed
        self._said.close()


def _first(error: BaseException) -> BaseException:
    """Return the error inside of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.asynccontextmanager
async def connected(server: McpServer) -> AsyncIterator[Connection]:
    """Give a connection of one's own."""
    connection = Connection(server)
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[McpServer, Connection]] = WeakKeyDictionary()
_opening: WeakKeyDictionary[asyncio.AbstractEventLoop, defaultdict[McpServer, asyncio.Lock]] = WeakKeyDictionary()


async def shared(server: McpServer) -> Connection:
    """Return the event loop's one connection to a server, which all its episodes use."""
    loop = asyncio.get_running_loop()
    connections = _shared.setdefault(loop, {})
    async with _opening.setdefault(loop, defaultdict(asyncio.Lock))[server]:
        if server not in connections:
            connection = Connection(server)
            await connection.open()
            connections[server] = connection
            on_exit(close_shared)
        return connections[server]


async def forget(connection: Connection) -> None:
    """Close a shared connection that is lost, so that the next call opens a new one."""
    connections = _shared.get(asyncio.get_running_loop(), {})
    if connections.get(connection.server) is connection:
        del connections[connection.server]
        await connection.close()


async def close_shared() -> None:
    """Close the shared connections of the running event loop."""
    for connection in _shared.pop(asyncio.get_running_loop(), {}).values():
        await connection.close()


def require_sdk() -> None:
    """Raise ConfigError where the SDK is not installed."""
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"MCP tools need the SDK: pip install 'areal-agents[mcp]' ({error})") from error


def pairs(values: Sequence[tuple[str, str]] | Any) -> tuple[tuple[str, str], ...]:
    """Return a mapping's items, in an order of their own."""
    return tuple(sorted(dict(values).items()))
