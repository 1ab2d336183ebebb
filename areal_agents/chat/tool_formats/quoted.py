"""Calls that are quoted: they stand inside an argument of another call, in this format or another one.

    <tool_call>{"name": "python", "arguments": {"code": "[TOOL_CALLS]rm[ARGS]{}"}}</tool_call>

What the model was told to write as a call is text there, and must not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from areal_agents.chat.tool_formats import FORMATS
from areal_agents.chat.tool_formats.base import Block, Source, ToolFormat
from areal_agents.chat.tool_formats.json_calls import Schemas

_VALUE = re.compile(r"<(?P<end>/)?(?:(?P<parameter>parameter)(?(end)|[= ][^<>\n]{1,256})|arg_value)>")
"""The tags round an argument that is written as it is, without escapes."""
_QUOTED = "the call stands inside an argument of another call, where it is text"


def without_quoted(
    blocks: Sequence[Block], text: str, form: ToolFormat, tools: Schemas, *, thinking: bool = False
) -> list[Block]:
    """Return the blocks of ``text`` in the format ``form``, with those refused that are quoted.

    Args:
        blocks: what ``form`` found.
        text: what the model wrote.
        form: how it was told to write calls.
        tools: what it may call.
        thinking: the prompt already opened ``<think>``.
    """
    last = max((block.start for block in blocks if block.status == "ok"), default=0)
    if not text[:last].strip():  # nothing stands before the calls that could hold them
        return list(blocks)
    zones = list(_values(text))
    for other in FORMATS.values():
        if other is not form and other.name != form.name:
            zones += _calls(text, other, form, tools, thinking=thinking)
    return [_refused(block) if _inside(block, zones) else block for block in blocks]


def _refused(block: Block) -> Block:
    return replace(block, name="", arguments={}, status="invalid_json", problem=_QUOTED)


def _inside(block: Block, zones: Sequence[tuple[int, int]]) -> bool:
    return block.status == "ok" and any(start < block.start and block.end <= end for start, end in zones)


def _values(text: str) -> Iterator[tuple[int, int]]:
    """Yield where arguments stand that are written as they are.

    An argument whose tag is never closed is none: behind it the next call may have begun.
    """
    open: dict[str, list[int]] = {"parameter": [], "arg_value": []}
    for found in _VALUE.finditer(text):
        stack = open["parameter" if found["parameter"] else "arg_value"]
        if not found["end"]:
            stack.append(found.start())
        elif stack:
            yield stack.pop(), found.end()


def _calls(
    text: str, other: ToolFormat, form: ToolFormat, tools: Schemas, *, thinking: bool
) -> Iterator[tuple[int, int]]:
    """Yield where another format's calls stand, also those that are broken, as far as they are clearly meant."""
    distinct = not set(other.openers) & set(form.openers)
    source = Source(text, tools)
    for block in other.find_blocks(text, thinking=thinking, tools=tools):
        if block.status == "ok" or (distinct and _opens_json(source, block.start, other)):
            yield block.start, block.end


def _opens_json(source: Source, start: int, form: ToolFormat) -> bool:
    """Say whether a format's opening markup stands at ``start``, with JSON behind it."""
    opener = next((o for o in form.openers if source.at(o, start)), None)
    if opener is None:
        return False
    inside = source.blank(start + len(opener))
    return source.text[inside : inside + 1] in ("{", "[")
