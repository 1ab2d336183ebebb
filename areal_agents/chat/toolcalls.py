"""The tool calls in a model's text, read block by block.

    <tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>

This is the Hermes format, which Qwen2.5 and Qwen3 use too. Each block gets its own status, so one malformed call never
voids its neighbours (T7). Calls inside ``<think>…</think>`` are never calls.

The text is hostile. It is only ever read as JSON, within the limits below, in time linear in its length, and no input
raises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_agents.types import AssistantMessage, CallStatus, Finish, Text, ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, UNTHINK = "<think>", "</think>"
MAX_CALLS = 64
"""Blocks of one message whose JSON is read; later ones are ``invalid_json``."""
MAX_JSON_CHARS = 65_536
"""Longest JSON of one block."""
MAX_DEPTH = 32
"""Deepest nesting of arguments."""


@dataclass(frozen=True, slots=True)
class Block:
    """One ``<tool_call>`` block: its half-open character range in the text and what was read from it."""

    start: int
    end: int
    name: str
    arguments: Mapping[str, Any]
    status: CallStatus


def parse_text(text: str, finish: Finish = "stop") -> AssistantMessage:
    """Read the message that a text says, where there were never tokens.

    Its calls have no ``token_span``. Never raises.
    """
    blocks = find_blocks(text)
    return message_of(text, finish, blocks, [None] * len(blocks))


def message_of(
    text: str, finish: Finish, blocks: Sequence[Block], spans: Sequence[tuple[int, int] | None]
) -> AssistantMessage:
    """Build the message of ``text``, with one call for each block.

    Args:
        text: the whole text of the message.
        finish: how its sampling ended.
        blocks: the tool-call blocks in it.
        spans: the blocks' token ranges, in the same order; None where there were never tokens.
    """
    calls = tuple(
        ToolCall(f"call_{i}", b.name, b.arguments, text[b.start : b.end], b.status, span)
        for i, (b, span) in enumerate(zip(blocks, spans, strict=True))
    )
    return AssistantMessage((Text(text),), calls, finish)


def write_block(name: str, arguments: str) -> str:
    """Write one block as a model writes it.

    ``arguments`` is JSON text and is taken as it is.
    """
    return f'{OPEN}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}{CLOSE}'


def read_arguments(text: str) -> tuple[Mapping[str, Any], CallStatus]:
    """Read the arguments that a server sends as JSON text, under the limits of a block.

    Empty text means no arguments.
    """
    if not text.strip():
        return {}, "ok"
    value, end, failed = _decode(text, 0)
    if failed or text[end:].strip():
        return {}, "invalid_json"
    _, arguments, status = _call_of({"name": "any", "arguments": value})
    return arguments, status


def find_blocks(text: str, *, thinking: bool = False) -> list[Block]:
    """Find the tool-call blocks of ``text``, in order.

    ``thinking`` says that the prompt already opened ``<think>``. An unclosed ``<think>`` hides the rest of the text.

    A block ends at its closing tag, at the next opening tag, or at the end of the text. Without a closing tag (cut by
    the length limit, say) it is ``unclosed``.
    """
    blocks: list[Block] = []
    pos = 0
    if thinking:
        pos = _after(text, UNTHINK, 0)
    call = text.find(OPEN, pos)
    think = text.find(THINK, pos)
    while call >= 0:
        if 0 <= think < call:
            pos = _after(text, UNTHINK, think + len(THINK))
        else:
            block = _read_block(text, call, decode=len(blocks) < MAX_CALLS)
            blocks.append(block)
            pos = block.end
        # Only a position that was passed is looked up again: each tag is found once.
        if call < pos:
            call = text.find(OPEN, pos)
        if 0 <= think < pos:
            think = text.find(THINK, pos)
    return blocks


def _after(text: str, tag: str, pos: int) -> int:
    """Return the position after the next ``tag``, or the end of the text."""
    found = text.find(tag, pos)
    return len(text) if found < 0 else found + len(tag)


def _read_block(text: str, start: int, *, decode: bool) -> Block:
    body = start + len(OPEN)
    value, stop, problem = _decode(text, body) if decode else (None, body, True)
    if not problem:
        # The JSON says where it ends: a closing tag inside a string argument is data.
        close = stop
        while close < len(text) and text[close] in " \t\r\n":
            close += 1
        if text.startswith(CLOSE, close):
            name, arguments, status = _call_of(value)
            return Block(start, close + len(CLOSE), name, arguments, status)
    return _malformed(text, start, body if problem else stop)


def _malformed(text: str, start: int, pos: int) -> Block:
    following = text.find(OPEN, pos)
    limit = len(text) if following < 0 else following
    close = text.find(CLOSE, pos, limit)
    if close < 0:
        return Block(start, limit, "", {}, "unclosed")
    return Block(start, close + len(CLOSE), "", {}, "invalid_json")


def _decode(text: str, pos: int) -> tuple[Any, int, bool]:
    """Decode the JSON value that starts at ``pos``, after white space, to (value, end, failed)."""
    chunk = text[pos : pos + MAX_JSON_CHARS]
    lead = len(chunk) - len(chunk.lstrip(" \t\r\n"))
    try:
        value, end = _DECODER.raw_decode(chunk, lead)
    except (ValueError, RecursionError):  # ValueError includes JSONDecodeError and Python's integer-digits limit
        return None, pos, True
    if not _sane(value):
        return None, pos, True
    return value, pos + end, False


def _call_of(value: Any) -> tuple[str, Mapping[str, Any], CallStatus]:
    if not isinstance(value, dict):
        return "", {}, "invalid_json"
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        return "", {}, "missing_name"
    name = name.strip()
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models quote the object once more
        inner, end, failed = _decode(arguments, 0)
        if failed or arguments[end:].strip() or not isinstance(inner, dict):
            return name, {}, "invalid_arguments"
        arguments = inner
    if not isinstance(arguments, dict):
        return name, {}, "invalid_arguments"
    return name, arguments, "ok"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _sane(value: Any) -> bool:
    """Say whether the value nests at most MAX_DEPTH deep and all its strings can be encoded as UTF-8."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            return False
        if isinstance(item, dict):
            stack += [(v, depth + 1) for v in item.values()] + [(k, depth) for k in item]
        elif isinstance(item, list):
            stack += [(v, depth + 1) for v in item]
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:  # a lone surrogate, written as \ud800
                return False
    return True


# strict=False: small models write code with literal newlines inside JSON strings, and that is unambiguous.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
