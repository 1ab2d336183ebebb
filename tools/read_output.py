"""The ``read_output`` tool, which shows what was cut out of a long output of another tool."""

from __future__ import annotations

from areal_agents.tool import ToolError, tool
from areal_agents.tool_outputs import Outputs

PAGE_CHARS = 3500
"""Of one call: the tool's own output is never cut."""


@tool(parallel=True, max_output_chars=4000)
async def read_output(output: int, start: int = 0, *, outputs: Outputs) -> str:
    """Read on in an output that was cut.

    Args:
        output: its number, as the notice says
        start: the first character to show
    """
    text = outputs.get(output)
    if text is None:
        kept = ", ".join(map(str, outputs.numbers)) or "none"
        raise ToolError(f"error: there is no output {cut_number(output)}; outputs that can be read on: {kept}")
    if not 0 <= start < len(text):
        raise ToolError(f"error: start must be from 0 to {len(text) - 1}, the output's last character")
    end = min(start + PAGE_CHARS, len(text))
    more = f"; go on with start={end}" if end < len(text) else ""
    return f"[characters {start} to {end} of {len(text)}{more}]\n{text[start:end]}"


def cut_number(number: int) -> str:
    """Write a number that a model chose, however long it is."""
    return str(number) if abs(number) < 10**9 else "of that number"
