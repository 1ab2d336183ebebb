"""GLM-4.5 and later: the name, then keys and values in tags. Values that are no strings are JSON.

    <tool_call>python
    <arg_key>code</arg_key>
    <arg_value>print(1)</arg_value>
    </tool_call>

GLM-4.7 writes the same without newlines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from areal_agents.chat.tool_formats.base import Block, Source, ToolFormat
from areal_agents.chat.tool_formats.tagged import TaggedCall, ending, value_end

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, UNKEY = "<arg_key>", "</arg_key>"
VALUE, UNVALUE = "<arg_value>", "</arg_value>"
_MAX_NAME = 256


class Glm(ToolFormat):
    """Keys and values in tags, behind a bare name."""

    name = "glm"
    usage = f"{OPEN}NAME\n{KEY}PARAMETER{UNKEY}\n{VALUE}VALUE{UNVALUE}\n{CLOSE} with both tags for each parameter"
    closing = CLOSE
    wanted = f"a name with its parameters in {KEY} and {VALUE} tags"
    openers = (OPEN,)
    control = (OPEN, CLOSE, KEY, UNKEY, VALUE, UNVALUE)
    vllm_parser = "glm45"

    def __init__(self, *, lines: bool = True) -> None:
        """Make the format. ``lines`` writes each tag on a line of its own."""
        self.lines = lines

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        pos = start + len(OPEN)
        limit = min(source.first((KEY, CLOSE), pos), source.first(("\n",), pos + 1), pos + _MAX_NAME)
        name = source.text[pos:limit]
        if room <= 0 or "<" in name or name.lstrip().startswith(("{", "[")):
            return self._broken(source, start, pos)
        call = TaggedCall(name.strip())
        pos = limit
        while True:
            pos = source.blank(pos)
            if source.at(CLOSE, pos):
                block = Block.of(start, pos + len(CLOSE), call.read(source.tools))
                return [block], block.end
            if not source.at(KEY, pos):
                return self._broken(source, start, pos)
            begin = pos + len(KEY)
            end = source.find(UNKEY, begin)
            value = source.blank(end + len(UNKEY))
            if end - begin > _MAX_NAME or not source.at(VALUE, value):
                return self._broken(source, start, begin)
            value += len(VALUE)
            closed = value_end(source, value, UNVALUE, (KEY, CLOSE), KEY)
            if closed is None:
                return self._broken(source, start, value)
            call.add(source.text[begin:end].strip(), source.text[value:closed])
            pos = closed + len(UNVALUE)

    def _broken(self, source: Source, start: int, pos: int) -> tuple[list[Block], int]:
        end, status = ending(source, pos, self.openers, CLOSE)
        return [Block.broken(start, end, status)], end

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        line = "\n" if self.lines else ""
        pairs = "".join(f"{KEY}{k}{UNKEY}{line}{VALUE}{_text(v)}{UNVALUE}{line}" for k, v in arguments.items())
        return f"{OPEN}{name}{line}{pairs}{CLOSE}"

    def styles(self) -> tuple[ToolFormat, ...]:
        return Glm(), Glm(lines=False)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
