"""Tools called as an environment calls them, in one real sandbox session."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from areal_agents import sandboxes
from areal_agents.sandbox import SandboxSpec
from areal_agents.tool import ToolResult, ToolSpec
from areal_agents.tool_dispatch import Dispatcher
from areal_agents.types import ToolCall
from tests.conftest import require


def call(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(id="", name=name, arguments=arguments, raw="", status="ok", token_span=(0, 0))


def play(
    tools: Sequence[ToolSpec], *messages: Sequence[ToolCall] | ToolCall, env: object = None, backend: str | None = None
) -> list[ToolResult]:
    """Run the calls of messages, one after the other, in one episode. Return all results."""
    if backend == "bubblewrap":
        require("bwrap")

    async def main() -> list[ToolResult]:
        box = sandboxes.get(backend) if backend else None
        dispatcher = Dispatcher(tools, sandbox=box, sandbox_spec=SandboxSpec(), env=env)
        try:
            results: list[ToolResult] = []
            for message in messages:
                results += await dispatcher.run([message] if isinstance(message, ToolCall) else message)
            return results
        finally:
            await dispatcher.aclose()
            if box is not None:
                await box.aclose()

    return asyncio.run(main())
