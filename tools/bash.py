"""The ``bash`` tool, a shell whose folder and variables live from one call to the next, inside the sandbox."""

from __future__ import annotations

from areal_agents.sandbox import Sandbox
from areal_agents.tool import ToolResult, ToolSpec, made_by, tool
from areal_agents.tool_resources import Resources
from areal_agents.tools.console_calls import START_S, call_console


def bash_tool(*, seconds: float = 30.0, background: bool = False, name: str = "bash") -> ToolSpec:
    """Make the tool.

    Args:
        seconds: how long a call's commands may run.
        background: what a call left running goes on, and the result lists it. Else it is ended, and listed.
        name: what the model calls it.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if seconds <= 0:
        raise ValueError(f"bash_tool: seconds = {seconds} must be positive")

    @tool(timeout=seconds + START_S, max_output_chars=4000, name=name)
    async def bash(command: str, *, sandbox: Sandbox, resources: Resources) -> ToolResult:
        """Run shell commands in a session that keeps its folder and variables."""
        return await call_console(
            "shell", command, sandbox=sandbox, resources=resources, seconds=seconds, background=background
        )

    return made_by(_make, seconds, background, name)(bash)


def _make(seconds: float, background: bool, name: str) -> ToolSpec:
    return bash_tool(seconds=seconds, background=background, name=name)


bash = bash_tool()
