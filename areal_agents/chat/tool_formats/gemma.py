"""Gemma, which has no markup for calls: Python calls in a fenced block, as Google's guides for it ask.

    ```tool_code
    python(code="print(1)")
    ```

JSON with a name and arguments in such a block, or in one of ``json``, is read too. Other fenced blocks are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.chat.thinking import THINK
from areal_agents.chat.tool_formats.base import Block, Call, Source, ToolFormat
from areal_agents.chat.tool_formats.json_calls import MAX_CALLS, call_of, decode, item_end, looks_like_call
from areal_agents.chat.tool_formats.literals import LiteralReader, write_call
from areal_agents.chat.tool_formats.pythonic import read_call

FENCE = "```"
_INFO = re.compile(r"[^\n`]{0,64}")
_CALLS = ("tool_code", "tool_call", "tool_calls")
_JSON = ("json", "")
_MEANT = re.compile(r"""\[?\s{0,64}\{\s{0,64}["'](?:name|type|function|parameters|arguments)["']\s{0,64}:""")


class Gemma(ToolFormat):
    """Calls in fenced blocks."""

    name = "gemma"
    usage = f"{FENCE}tool_code\nNAME(PARAMETER=VALUE, ...)\n{FENCE}"
    closing = FENCE
    wanted = "a call with literal arguments"
    openers = (FENCE,)
    begins_calls_alone = tuple(FENCE + info for info in _CALLS[:2])  # the third begins with the second

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        info = _INFO.match(source.text, start + len(FENCE))
        body = info.end() if info else start + len(FENCE)
        kind = info[0].strip() if info else ""
        if kind in _JSON and self._is_json_call(source, body):
            return self._fence(source, start, body, room)
        if kind in _CALLS:
            return self._fence(source, start, body, room)
        return [], max(source.after(FENCE, body), start + len(FENCE))  # another block: over its end

    def _is_json_call(self, source: Source, pos: int) -> bool:
        if not _MEANT.match(source.text, source.blank(pos)):
            return False
        source.attempts += 1
        if source.attempts > MAX_CALLS:  # enough was decoded: it counts as a call, and its own limit applies
            return True
        value, _, failed = decode(source.text, pos)
        rows = value if isinstance(value, list) else [value]
        return failed or all(looks_like_call(row, source.tools) for row in rows)

    def _fence(self, source: Source, start: int, pos: int, room: int) -> tuple[list[Block], int]:
        """Read the calls of one fenced block, up to its closing fence."""
        reader = LiteralReader(source.text)
        blocks: list[Block] = []
        begin, pos = start, self._over(source, pos)
        while not source.at(FENCE, pos):
            if len(blocks) >= room or pos == len(source.text):
                end = min(source.after(FENCE, pos), source.find(THINK, pos))
                whole = pos < len(source.text)
                blocks.append(Block.broken(begin, end, "invalid_json" if whole else "unclosed"))
                return blocks, max(end, start + len(FENCE))
            block = self._one(source, reader, begin, pos)
            blocks.append(block)
            after = self._over(source, block.end)
            if block.status in ("unclosed", "invalid_json") and not source.at(FENCE, after):
                close, limit = source.find(FENCE, pos), source.find(THINK, pos)
                whole = close < limit
                end = close + len(FENCE) if whole else limit
                blocks[-1] = Block.broken(block.start, end, "invalid_json" if whole else "unclosed")
                return blocks, end
            begin = pos = after
        end = pos + len(FENCE)
        if not blocks:
            return [Block.broken(start, end, "invalid_json")], end
        last = blocks[-1]
        blocks[-1] = Block(last.start, end, last.name, last.arguments, last.status, last.problem)
        return blocks, end

    def _one(self, source: Source, reader: LiteralReader, begin: int, pos: int) -> Block:
        if not source.at("{", pos):
            if source.at("print(", pos):  # the guides' own examples do
                inner = read_call(source, reader, begin, pos + len("print("))
                after = source.blank(inner.end)
                if inner.status != "invalid_json" and source.at(")", after):
                    return Block(begin, after + 1, inner.name, inner.arguments, inner.status, inner.problem)
            return read_call(source, reader, begin, pos)
        value, end, failed = decode(source.text, pos)
        if not failed:
            return Block.of(begin, end, call_of(value, source.tools, "parameters"))
        limit = source.first((FENCE, THINK), pos)
        whole = item_end(source.text, pos, limit)
        return Block.broken(begin, limit if whole is None else whole, "unclosed" if whole is None else "invalid_json")

    def _over(self, source: Source, pos: int) -> int:
        """Return the position after white space, and the brackets and separators of a list."""
        while (pos := source.blank(pos)) < len(source.text) and source.text[pos] in "[],;":
            pos += 1
        return pos

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return self.write_calls([(name, arguments)])

    def write_calls(self, calls: Sequence[Call]) -> str:
        lines = "\n".join(write_call(*call) for call in calls)
        return f"{FENCE}tool_code\n{lines}\n{FENCE}"

    def read_raw(self, raw: str, tools: Mapping[str, Mapping[str, Any]] | None = None) -> Block | None:
        head = "" if raw.startswith(FENCE) else f"{FENCE}tool_code\n"
        tail = "" if raw[len(FENCE) :].rstrip().endswith(FENCE) else f"\n{FENCE}"
        return super().read_raw(head + raw + tail, tools)
