"""Mistral: a control token, then the calls.

    [TOOL_CALLS][{"name": "python", "arguments": {"code": "print(1)"}}]        ``mistral``: up to v7 of its tokenizers
    [TOOL_CALLS]python[ARGS]{"code": "print(1)"}                               ``mistral_args``: from v11 on

Each of the two reads both, and writes its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.chat.thinking import THINK
from areal_agents.chat.tool_formats.base import Block, Call, Source, ToolFormat
from areal_agents.chat.tool_formats.json_calls import arguments_of, call_of, decode, item_end, looks_like_call
from areal_agents.types import CallStatus

OPEN, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAMED = re.compile(r'\s{0,8}([^\s\[\]{}"]{1,128})\s{0,8}(?:\[CALL_ID\][^\[\]{}"]{0,64})?(?:\[ARGS\])?')


class Mistral(ToolFormat):
    """JSON objects in a list, behind ``[TOOL_CALLS]``."""

    name = "mistral"
    usage = OPEN + '[{"name": ..., "arguments": {...}}]'
    openers = (OPEN,)
    control = (OPEN, ARGS, ID)
    inline = False
    vllm_parser = "mistral"

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        pos = source.blank(start + len(OPEN))
        if room > 0 and source.at("[", pos) and not source.at(ARGS, pos):
            return self._list(source, start, pos, room)
        if room > 0 and source.at("{", pos):
            value, end, failed = decode(source.text, pos)
            if not failed:
                return self._others(source, Block.of(start, end, call_of(value, source.tools)), room)
        named = _NAMED.match(source.text, pos)
        if room > 0 and named and source.at("{", body := source.blank(named.end())):
            value, end, failed = decode(source.text, body)
            if not failed:
                return self._others(source, Block.of(start, end, arguments_of(named[1], value)), room)
            pos = body
        end = source.first((OPEN, THINK), pos)
        return [Block.broken(start, end, self._status(source, pos, end, room))], end

    def _others(self, source: Source, first: Block, room: int) -> tuple[list[Block], int]:
        """Read the calls that follow ``first`` without a token of their own, which some models leave out."""
        blocks = [first]
        while True:
            pos = source.blank(blocks[-1].end)
            pos = source.blank(pos + 1) if source.at(",", pos) or source.at(";", pos) else pos
            named = _NAMED.match(source.text, pos)
            body = source.blank(named.end()) if named else pos
            meant = not named or ARGS in named[0] or named[1] in source.tools
            if not (meant and source.at("{", body)):
                return blocks, blocks[-1].end
            value, end, failed = decode(source.text, body) if len(blocks) < room else (None, body, True)
            if failed or not (named or looks_like_call(value, source.tools)):
                end = source.first((OPEN, THINK), body)
                return [*blocks, Block.broken(pos, end, self._status(source, body, end, room - len(blocks)))], end
            read = arguments_of(named[1], value) if named else call_of(value, source.tools)
            blocks.append(Block.of(pos, end, read))

    def _list(self, source: Source, start: int, pos: int, room: int) -> tuple[list[Block], int]:
        blocks: list[Block] = []
        begin, pos = start, source.blank(pos + 1)
        limit = source.first((OPEN, THINK), pos)
        while len(blocks) < room:
            value, end, failed = decode(source.text, pos)
            whole: int | None = end
            if failed:
                limit = source.first((OPEN, THINK), pos)
                whole = item_end(source.text, pos, limit)
            if whole is None or whole == pos:  # cut off, or an empty list
                return [*blocks, Block.broken(begin, limit, self._status(source, pos, limit, 1))], limit
            read = call_of(value, source.tools)
            after = source.blank(whole)
            closed = source.at("]", after)
            blocks.append(Block.of(begin, after + 1 if closed else whole, read))
            if closed or not source.at(",", after):
                return blocks, blocks[-1].end
            begin = pos = source.blank(after + 1)
        return [*blocks, Block.broken(begin, limit, "invalid_json")], max(limit, begin + 1)

    def _status(self, source: Source, pos: int, end: int, room: int) -> CallStatus:
        rest = source.text[pos:end].strip()
        begun = not rest or "{" in rest or "[" in rest
        cut = room > 0 and begun and end == len(source.text) and item_end(source.text, pos, end) is None
        return "unclosed" if cut else "invalid_json"

    def read_raw(self, raw: str, tools: Mapping[str, Mapping[str, Any]] | None = None) -> Block | None:
        listed = OPEN + "[" + raw + ("" if raw.endswith("]") else "]")
        whole = raw if raw.startswith(OPEN) else listed if raw.startswith("{") else OPEN + raw
        return super().read_raw(whole, tools)

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        return self.write_calls([(name, arguments)])

    def write_calls(self, calls: Sequence[Call]) -> str:
        rows = [{"name": name, "arguments": dict(arguments)} for name, arguments in calls]
        return OPEN + json.dumps(rows, ensure_ascii=False)

    def write_message(self, text: str, calls: Sequence[Call]) -> str:
        return text + self.write_calls(calls)


class MistralArgs(Mistral):
    """A name and its arguments, behind a ``[TOOL_CALLS]`` of its own."""

    name = "mistral_args"
    usage = OPEN + "NAME" + ARGS + '{"PARAMETER": ...}'

    def write_calls(self, calls: Sequence[Call]) -> str:
        return "".join(
            f"{OPEN}{name}{ARGS}{json.dumps(dict(arguments), ensure_ascii=False)}" for name, arguments in calls
        )
