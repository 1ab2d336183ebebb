"""The ``python`` tool as a session: names live from one call to the next, and the last expression is echoed.

The model calls it ``python``, as it does the one-shot tool of ``python.py``: an environment lists one of the two.
"""

from __future__ import annotations

from areal_agents.sandbox import Sandbox
from areal_agents.tool import ToolResult, ToolSpec, made_by, tool
from areal_agents.tool_resources import Resources
from areal_agents.tools.console_calls import START_S, call_console


def python_repl_tool(*, seconds: float = 10.0, name: str = "python") -> ToolSpec:
    """Make the tool.

    ``seconds`` is how long a call's code may run. ``name`` is what the model calls it.
    """
    if seconds <= 0:
        raise ValueError(f"python_repl_tool: seconds = {seconds} must be positive")

    @tool(timeout=seconds + START_S, max_output_chars=4000, name=name)
    async def python(code: str, *, sandbox: Sandbox, resources: Resources) -> ToolResult:
        """Run Python code in a session that keeps its variables. The last expression's value is shown."""
        return await call_console("python", code, sandbox=sandbox, resources=resources, seconds=seconds)

    return made_by(_make, seconds, name)(python)


def _make(seconds: float, name: str) -> ToolSpec:
    return python_repl_tool(seconds=seconds, name=name)


python_repl = python_repl_tool()
