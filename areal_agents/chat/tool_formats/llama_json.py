"""Llama 3.1 to 3.3: a message that is JSON and nothing else, or JSON behind ``<|python_tag|>``.

    {"name": "python", "parameters": {"code": "print(1)"}}

Prose that contains such JSON is prose: the family's convention is the whole message. Several calls are separated by
``;``. JSON without a name and arguments is an answer. Words may follow whole calls of known tools, as these models
often explain them. Another message that starts as a call does, and goes on otherwise, is a call that could not be read:
it does not become the final answer unnoticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.chat.thinking import THINK, UNTHINK
from areal_agents.chat.tool_formats.base import Block, Call, Source, ToolFormat, refused, visible_start
from areal_agents.chat.tool_formats.json_calls import (
    MAX_CALLS,
    Schemas,
    call_of,
    decode,
    item_end,
    looks_like_call,
)

TAG = "<|python_tag|>"
START, END = "<|python_start|>", "<|python_end|>"  # Llama 4's
EOM = "<|eom_id|>"  # ends a message with a call, where it is no end of the turn
FOLLOWED = "text follows the call: write the call alone"
_MEANT = re.compile(r"""\[?\s{0,64}\{\s{0,64}["'](?:name|type|function|parameters|arguments)["']\s{0,64}:""")
_FENCED = re.compile(r"```[a-z_]{0,16}\s{0,64}")


class LlamaJson(ToolFormat):
    """A JSON object with ``name`` and ``parameters`` as the whole message."""

    name = "llama_json"
    usage = '{"name": ..., "parameters": {...}} and nothing else'
    openers = (TAG,)
    control = (TAG, START, END)
    inline = False
    vllm_parser = "llama3_json"

    def find_blocks(self, text: str, *, thinking: bool = False, tools: Schemas | None = None) -> list[Block]:
        source = Source(text, tools or {})
        begin = visible_start(source, thinking=thinking, tags=(TAG, START))
        start = _skip(source, begin)
        if TAG in text[begin:start]:
            return self._calls(source, begin, start)[0]
        if text.startswith(("{", "[", "```"), start) and (blocks := self._whole_message(source, start)):
            return blocks
        tag = tag_position(source, start, (TAG,))
        if tag == len(text):
            return []
        blocks, _ = self._calls(source, tag, tag)
        return blocks

    def _whole_message(self, source: Source, start: int) -> list[Block]:
        text = source.text
        fence = _FENCED.match(text, start)
        body = fence.end() if fence else start
        value, end, failed = decode(text, body)
        meant = bool(_MEANT.match(text, body)) if failed else _meant(value, source)
        if not meant:
            return []
        if fence or isinstance(value, list):
            return [Block.broken(start, len(text.rstrip()), "invalid_json")]
        blocks, end = self._calls(source, start, start)
        return blocks if not text[end:].strip() or known(blocks, source) else refused(blocks, FOLLOWED)

    def _calls(self, source: Source, start: int, pos: int) -> tuple[list[Block], int]:
        """Read calls that stand one behind the other, the first block from ``start`` on."""
        text = source.text
        blocks: list[Block] = []
        while True:
            pos = _skip(source, pos)
            if len(blocks) == MAX_CALLS:
                return [*blocks, Block.broken(pos, len(text), "invalid_json")], len(text)
            value, end, failed = decode(text, pos)
            if failed or not isinstance(value, dict):
                limit = source.find(THINK, pos)
                whole = item_end(text, pos, limit) if source.at("{", pos) else limit
                end = limit if whole is None else whole
                cut = whole is None or not text[pos:end].strip()
                blocks.append(Block.broken(start, end, "unclosed" if cut else "invalid_json"))
            else:
                blocks.append(Block.of(start, end, call_of(value, source.tools, "parameters")))
            after = _skip(source, end)
            again = _skip(source, after + 1) if source.at(";", after) or source.at(",", after) else after
            if not source.at("{", again) or (again == end and failed):
                return blocks, after
            start = pos = again

    def read_raw(self, raw: str, tools: Schemas | None = None) -> Block | None:
        return super().read_raw(raw if raw.startswith(TAG) else TAG + raw, tools)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        parameters = json.dumps(dict(arguments), ensure_ascii=False)
        return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {parameters}}}'

    def write_calls(self, calls: Sequence[Call]) -> str:
        return "; ".join(self.write(*call) for call in calls)

    def write_message(self, text: str, calls: Sequence[Call]) -> str:
        return text + (TAG if speaks(text) else "") + self.write_calls(calls)


def known(blocks: Sequence[Block], source: Source) -> bool:
    """Say whether all blocks are whole calls of the environment's tools."""
    return all(block.status == "ok" and block.name in source.tools for block in blocks)


def tag_position(source: Source, pos: int, tags: Sequence[str]) -> int:
    """Return where the first of ``tags`` outside thoughts stands, or the text's length."""
    while True:
        tag, think = source.first(tags, pos), source.find(THINK, pos)
        if think >= tag:
            return tag
        pos = source.after(UNTHINK, think + len(THINK))


def speaks(text: str) -> bool:
    """Say whether ``text`` says anything besides leading thoughts."""
    return visible_start(Source(text, {}), thinking=False) < len(text)


def _meant(value: Any, source: Source) -> bool:
    if isinstance(value, list):
        return bool(value) and all(looks_like_call(v, source.tools) for v in value)
    return looks_like_call(value, source.tools)


def _skip(source: Source, pos: int) -> int:
    """Return the position after white space and tags."""
    while True:
        pos = source.blank(pos)
        tag = next((t for t in (TAG, START, END, EOM) if source.at(t, pos)), None)
        if tag is None:
            return pos
        pos += len(tag)
