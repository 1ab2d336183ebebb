"""Hermes, Qwen2.5 and Qwen3, and the notation of experts and scripts in any model's episodes.

<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from areal_agents.chat.tool_formats.base import Block, Source, ToolFormat
from areal_agents.chat.tool_formats.json_calls import call_of, decode

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """JSON between two tags."""

    name = "hermes"
    usage = OPEN + '{"name": ..., "arguments": {...}}' + CLOSE
    closing = CLOSE
    openers = (OPEN,)
    control = (OPEN, CLOSE)
    vllm_parser: ClassVar[str | None] = "hermes"

    def __init__(self, *, lines: bool = False) -> None:
        """Make the format.

        ``lines`` writes each tag on a line of its own, as Qwen's templates do.
        """
        self.lines = lines

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        body = start + len(OPEN)
        value, stop, failed = decode(source.text, body) if room > 0 else (None, body, True)
        if not failed:
            # The JSON says where it ends: a closing tag inside a string argument is data.
            close = source.blank(stop)
            if source.at(CLOSE, close):
                block = Block.of(start, close + len(CLOSE), call_of(value, source.tools))
                return [block], block.end
        block = self.malformed(source, start, body if failed else stop)
        return [block], block.end

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return self.write_text(name, json.dumps(dict(arguments), ensure_ascii=False))

    def write_text(self, name: str, arguments: str) -> str:
        """Write one call whose arguments are JSON text, which is taken as it is."""
        line = "\n" if self.lines else ""
        quoted = json.dumps(name, ensure_ascii=False)
        return f'{OPEN}{line}{{"name": {quoted}, "arguments": {arguments}}}{line}{CLOSE}'

    def styles(self) -> tuple[ToolFormat, ...]:
        return Hermes(), Hermes(lines=True)


class Api(Hermes):
    """Calls that a chat server read itself and sent as JSON.

    They are kept in the text as Hermes blocks. The model behind the server writes a format that only the server knows.
    """

    name = "api"
    wanted = "valid JSON"
    vllm_parser = None

    @property
    def hint(self) -> str:
        return "Call the tool again, with its arguments as a JSON object"
