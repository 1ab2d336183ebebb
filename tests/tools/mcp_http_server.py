"""An MCP server over HTTP, on the SDK: ``python mcp_http_server.py PORT``."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import MCPServer

server = MCPServer("drill")


@server.tool()  # type: ignore[untyped-decorator]
def add(a: int, b: int = 1) -> str:
    """Add two numbers."""
    return str(a + b)


@server.tool()  # type: ignore[untyped-decorator]
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()  # type: ignore[untyped-decorator]
async def wait(seconds: float) -> str:
    """Wait, and let others be served."""
    await asyncio.sleep(seconds)
    return "done"


@server.tool()  # type: ignore[untyped-decorator]
def echo(text: str) -> str:
    """Say it again."""
    return text


if __name__ == "__main__":
    server.run("streamable-http", port=int(sys.argv[1]))
