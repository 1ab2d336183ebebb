"""DeepSeek: calls between control tokens.

``deepseek`` (V3 and R1):

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {"code": "print(1)"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

``deepseek_v31``:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Each of the two reads both, and writes its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.chat.thinking import THINK
from areal_agents.chat.tool_formats.base import Block, Call, Source, ToolFormat
from areal_agents.chat.tool_formats.json_calls import arguments_of, decode

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
OPEN, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"
FENCE = "```"
_MAX_NAME = 256
_FENCED = re.compile(r"[ \t]{0,8}([^\n`{<]{0,256})\s{0,8}```(?:json)?")


class DeepSeek(ToolFormat):
    """A name and fenced JSON, between control tokens."""

    name = "deepseek"
    usage = f"{BEGIN}{OPEN}function{SEP}NAME\n{FENCE}json\n{{...}}\n{FENCE}{CLOSE}{END}"
    closing = CLOSE
    openers = (BEGIN, OPEN)
    control = (BEGIN, END, OPEN, CLOSE, SEP)
    inline = False
    vllm_parser = "deepseek_v3"

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        pos = source.blank(start + len(BEGIN)) if source.at(BEGIN, start) else start
        if not source.at(OPEN, pos):
            pos = start + len(BEGIN)
            end = source.first((OPEN, BEGIN, END, THINK), pos)
            end, closed = (end + len(END), True) if source.at(END, end) else (end, False)
            return [Block.broken(start, end, "invalid_json" if closed else "unclosed")], end
        pos += len(OPEN)
        block = self._call(source, start, pos) if room > 0 else None
        if block is None:
            limit = source.first((*self.openers, END, THINK), pos)
            close = source.find(CLOSE, pos)
            whole = close < limit
            block = Block.broken(start, close + len(CLOSE) if whole else limit, "invalid_json" if whole else "unclosed")
        after = source.blank(block.end)
        if not source.at(END, after):
            return [block], block.end
        end = after + len(END)
        return [Block(start, end, block.name, block.arguments, block.status, block.problem)], end

    def _call(self, source: Source, start: int, pos: int) -> Block | None:
        sep = source.find(SEP, pos)
        head = source.text[pos:sep].strip() if sep - pos <= _MAX_NAME else "<"
        if sep == len(source.text) or "<" in head:
            return None
        body = sep + len(SEP)
        fenced = _FENCED.match(source.text, body)
        name = fenced[1].strip() if fenced else head
        if fenced:
            body = fenced.end()
            name = name or (head if head != "function" else "")
        value, end, failed = decode(source.text, body)
        if failed:
            return None
        end = source.blank(end)
        if fenced and source.at(FENCE, end):
            end = source.blank(end + len(FENCE))
        if not source.at(CLOSE, end):
            return None
        end += len(CLOSE)
        return Block.of(start, end, arguments_of(name, value)) if name else Block.broken(start, end, "missing_name")

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return self.write_calls([(name, arguments)])

    def write_calls(self, calls: Sequence[Call]) -> str:
        return BEGIN + self.between.join(self.one(*call) for call in calls) + END

    def write_message(self, text: str, calls: Sequence[Call]) -> str:
        return text + self.write_calls(calls)

    between = "\n"

    def one(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Write one call without the tokens round all of them."""
        given = json.dumps(dict(arguments), ensure_ascii=False)
        return f"{OPEN}function{SEP}{name}\n{FENCE}json\n{given}\n{FENCE}{CLOSE}"


class DeepSeekV31(DeepSeek):
    """A name and its JSON, between control tokens."""

    name = "deepseek_v31"
    usage = f"{BEGIN}{OPEN}NAME{SEP}{{...}}{CLOSE}{END}"
    vllm_parser = "deepseek_v31"
    between = ""

    def one(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"{OPEN}{name}{SEP}{json.dumps(dict(arguments), ensure_ascii=False)}{CLOSE}"
