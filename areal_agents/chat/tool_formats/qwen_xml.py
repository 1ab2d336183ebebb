"""Qwen3-Coder and Qwen3.5: one tag a parameter, every value as text.

    <tool_call>
    <function=python>
    <parameter=code>
    print(1)
    </parameter>
    </function>
    </tool_call>

These models sometimes leave out ``<tool_call>``: a ``<function=…>`` alone is a call too. One newline after the opening
and one before the closing tag of a parameter belong to the markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from areal_agents.chat.tool_formats.base import Block, Source, ToolFormat
from areal_agents.chat.tool_formats.tagged import TaggedCall, ending, value_end

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, UNFUNCTION = "<function=", "</function>"
PARAMETER, UNPARAMETER = "<parameter=", "</parameter>"
_MAX_NAME = 256


class QwenXml(ToolFormat):
    """Tags that name the function and its parameters."""

    name = "qwen_xml"
    usage = (
        f"{OPEN}\n{FUNCTION}NAME>\n{PARAMETER}PARAMETER>\nVALUE\n{UNPARAMETER}\n{UNFUNCTION}\n{CLOSE} "
        f"with one {PARAMETER}...> for each parameter"
    )
    closing = UNFUNCTION
    wanted = "a <function=...> with its parameters in tags"
    openers = (OPEN, FUNCTION)
    control = (OPEN, CLOSE)
    vllm_parser = "qwen3_coder"

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        wrapped = source.at(OPEN, start)
        pos = source.blank(start + len(OPEN)) if wrapped else start
        call = TaggedCall("")
        if room <= 0 or not source.at(FUNCTION, pos):
            tags, close = ((OPEN,), CLOSE) if wrapped else (self.openers, UNFUNCTION)
            end, status = ending(source, start + 1, tags, close)
            return [Block.broken(start, end, status)], end
        pos, whole = self._function(source, pos, call)
        if not whole:
            return self._broken(source, start, pos)
        end = source.blank(pos)
        if source.at(CLOSE, end):
            pos = end + len(CLOSE)
        elif wrapped and not source.at(FUNCTION, end):
            return self._broken(source, start, end)
        block = Block.of(start, pos, call.read(source.tools))
        return [block], block.end

    def _function(self, source: Source, pos: int, call: TaggedCall) -> tuple[int, bool]:
        """Read a function's tags into ``call``, and return where reading ended and whether it was complete."""
        name, pos = _name(source, pos + len(FUNCTION))
        if name is None:
            return pos, False
        call.name = name
        while True:
            at = source.blank(pos)
            if source.at(UNFUNCTION, at):
                return at + len(UNFUNCTION), True
            if not source.at(PARAMETER, at):
                return pos, False
            key, begin = _name(source, at + len(PARAMETER))
            end = None if key is None else value_end(source, begin, UNPARAMETER, (PARAMETER, UNFUNCTION), PARAMETER)
            if key is None or end is None:
                return begin, False
            call.add(key, _between_lines(source.text[begin:end]))
            pos = end + len(UNPARAMETER)

    def _broken(self, source: Source, start: int, pos: int) -> tuple[list[Block], int]:
        end, status = ending(source, pos, self.openers, UNFUNCTION)
        after = source.blank(end)
        if source.at(CLOSE, after):
            end, status = after + len(CLOSE), "invalid_json"
        return [Block.broken(start, end, status)], end

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        parameters = "".join(f"{PARAMETER}{k}>\n{_text(v)}\n{UNPARAMETER}\n" for k, v in arguments.items())
        return f"{OPEN}\n{FUNCTION}{name}>\n{parameters}{UNFUNCTION}\n{CLOSE}"


def _name(source: Source, pos: int) -> tuple[str | None, int]:
    """Read a tag's name, up to its ``>``."""
    end = source.text.find(">", pos, pos + _MAX_NAME)
    name = source.text[pos:end] if end >= 0 else ""
    if end < 0 or "<" in name or "\n" in name:
        return None, pos
    return name.strip().strip("\"'"), end + 1


def _between_lines(value: str) -> str:
    value = value[1:] if value.startswith("\n") else value
    return value[:-1] if value.endswith("\n") else value


def _text(value: Any) -> str:
    """Write a value as the families' templates do: containers as JSON, True, False and None as Python's words."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list | tuple) else str(value)
