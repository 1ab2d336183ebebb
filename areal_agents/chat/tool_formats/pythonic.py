"""Llama 3.2 and 4 and others: a message that is a list of Python calls and nothing else.

    [python(code="print(1)"), search(query="tea", limit=3)]

Behind ``<|python_start|>`` or ``<|python_tag|>`` the list may follow prose. Otherwise prose that contains such a list
is prose: the convention is the whole message. A list of other things is an answer. Arguments have names and are
literals (``literals.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.chat.thinking import THINK
from areal_agents.chat.tool_formats.base import Block, Call, Source, ToolFormat, refused, visible_start
from areal_agents.chat.tool_formats.json_calls import MAX_CALLS, Read, Schemas, item_end
from areal_agents.chat.tool_formats.literals import LiteralReader, Unreadable, write_call
from areal_agents.chat.tool_formats.llama_json import END, START, TAG, known, speaks, tag_position

FOLLOWED = "text follows the calls: write the calls alone"
_NAMED = re.compile(r"([\w.\-]{1,256})\s{0,64}\(\s{0,64}(?P<given>\)|[\w.\-]{1,256}\s{0,64}=(?!=)|\*\*\s{0,64}\{)?")
_FENCED = re.compile(r"```[a-z_]{0,16}\s{0,64}")


class Pythonic(ToolFormat):
    """A list of calls with named literal arguments as the whole message."""

    name = "pythonic"
    usage = "[NAME(PARAMETER=VALUE, ...)] and nothing else"
    wanted = "a list of calls with literal arguments"
    openers = (START, TAG)
    control = (START, END, TAG)
    inline = False
    vllm_parser = "pythonic"

    def find_blocks(self, text: str, *, thinking: bool = False, tools: Schemas | None = None) -> list[Block]:
        source = Source(text, tools or {})
        start = visible_start(source, thinking=thinking, tags=self.openers)
        if blocks := self._whole_message(source, start):
            return blocks
        tag = tag_position(source, start, self.openers)
        if tag == len(text):
            return []
        return read_list(source, tag, source.blank(tag + len(START if source.at(START, tag) else TAG)))[0]

    def _whole_message(self, source: Source, start: int) -> list[Block]:
        text = source.text
        fence = _FENCED.match(text, start)
        body = fence.end() if fence else start
        listed = source.at("[", body)
        if not is_meant(source, source.blank(body + 1) if listed else body):
            return []
        if fence or not listed:
            # A bare call is meant only where it is a known tool's: prose may begin with `f(x=1)`.
            named = _NAMED.match(text, body)
            meant = listed or (named is not None and named[1] in source.tools)
            return [Block.broken(start, len(text.rstrip()), "invalid_json")] if meant else []
        blocks, end = read_list(source, start, start)
        return blocks if not text[end:].strip() or known(blocks, source) else refused(blocks, FOLLOWED)

    def read_raw(self, raw: str, tools: Schemas | None = None) -> Block | None:
        bare = raw.removeprefix(START).removeprefix(TAG).removesuffix(END).strip().removeprefix("[")
        whole = START + "[" + bare + ("" if bare.endswith("]") else "]")
        return super().read_raw(whole, tools)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return self.write_calls([(name, arguments)])

    def write_calls(self, calls: Sequence[Call]) -> str:
        return "[" + ", ".join(write_call(*call) for call in calls) + "]"

    def write_message(self, text: str, calls: Sequence[Call]) -> str:
        written = self.write_calls(calls)
        return f"{text}{START}{written}{END}" if speaks(text) else text + written


def is_meant(source: Source, pos: int) -> bool:
    """Say whether what stands at ``pos`` is meant as a tool call: a known name, or arguments with names."""
    named = _NAMED.match(source.text, pos)
    return named is not None and (named[1] in source.tools or named["given"] is not None)


def read_list(source: Source, start: int, pos: int) -> tuple[list[Block], int]:
    """Read a list of calls at ``pos``, the first block from ``start`` on, and return where it ends."""
    text = source.text
    if not source.at("[", pos):
        limit = source.find(THINK, pos)
        return [Block.broken(start, limit, "invalid_json" if text[pos:limit].strip() else "unclosed")], limit
    blocks: list[Block] = []
    reader = LiteralReader(text)
    pos = source.blank(pos + 1)
    while True:
        if len(blocks) == MAX_CALLS:
            return [*blocks, Block.broken(pos, len(text), "invalid_json")], len(text)
        block = read_call(source, reader, start, pos)
        after = source.blank(block.end)
        if source.at("]", after):
            end = source.blank(after + 1)
            end = end + len(END) if source.at(END, end) else after + 1
            blocks.append(Block(start, end, block.name, block.arguments, block.status, block.problem))
            return blocks, end
        blocks.append(block)
        if not source.at(",", after):
            return blocks, after
        start = pos = source.blank(after + 1)
        if pos == len(text):
            return [*blocks, Block.broken(after, pos, "unclosed")], pos


def read_call(source: Source, reader: LiteralReader, start: int, pos: int) -> Block:
    """Read the call at ``pos``, as a block that begins at ``start``."""
    try:
        name, arguments, problem, end = reader.call(pos)
    except Unreadable as error:
        limit = source.find(THINK, pos)
        whole = item_end(source.text, pos, limit, "'\"")
        # A name stands before its brackets: the brackets' end is the item's.
        end = limit if whole is None else whole
        return Block.broken(start, max(end, start + 1), "unclosed" if whole is None or error.cut else "invalid_json")
    if problem:
        return Block.of(start, end, Read(name, {}, "invalid_arguments", f"{problem}: write NAME=VALUE for each"))
    return Block.of(start, end, Read(name, arguments, "ok"))
