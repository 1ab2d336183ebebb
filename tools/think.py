"""The ``think`` tool, which does nothing: room for a thought between two calls, which the rubric may read."""

from __future__ import annotations

from areal_agents.tool import tool


@tool(parallel=True)
async def think(thought: str) -> str:
    """Think about what to do next. Nobody sees it, and nothing changes."""
    return "(noted)"
