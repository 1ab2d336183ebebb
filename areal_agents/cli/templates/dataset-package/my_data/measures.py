"""The tool: a table of old measures, which a model cannot know by heart."""

from __future__ import annotations

from areal_agents import ToolError, tool

TABLE = {
    "bushel": (4, "pecks"),
    "fathom": (6, "feet"),
    "firkin": (9, "gallons"),
    "furlong": (220, "yards"),
    "gross": (144, "pieces"),
    "hogshead": (63, "gallons"),
    "ream": (480, "sheets"),
    "stone": (14, "pounds"),
}


@tool(timeout=2, parallel=True)
async def look_up(unit: str) -> str:
    """Look an old measure up.

    Args:
        unit: its name, such as fathom
    """
    name = unit.strip().lower()
    known = TABLE.get(name) or TABLE.get(name.removesuffix("s"))
    if known is None:  # shown to the model: say what would have been right
        raise ToolError(f"there is no measure {unit[:40]!r}; there are {', '.join(TABLE)}")
    count, parts = known
    return f"one is {count} {parts}"
