"""Messages with tool calls, made of a model's text in any of the formats of ``tool_formats``.

Where no format is named it is Hermes: experts, scripts and ``env.step("text")`` write it, whatever the model writes.

    <tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>

Each call gets its own status, so one malformed call never voids its neighbours (T7). Calls inside ``<think>…</think>``
are never calls. The text is hostile: no input raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from areal_agents.chat.tool_formats import DEFAULT, Block, Schemas, ToolFormat, tool_format
from areal_agents.chat.tool_formats.base import Source, visible_start
from areal_agents.chat.tool_formats.hermes import Hermes
from areal_agents.chat.tool_formats.json_calls import MAX_CALLS, Read, arguments_of, decode
from areal_agents.chat.tool_formats.pythonic import FOLLOWED
from areal_agents.chat.tool_formats.quoted import without_quoted
from areal_agents.errors import TemplateError
from areal_agents.types import AssistantMessage, Finish, Text, ToolCall

__all__ = [
    "MAX_CALLS",
    "ToolLike",
    "blocks_of",
    "find_blocks",
    "message_of",
    "parse_text",
    "read_arguments",
    "rewrite",
    "rewritten",
    "schemas_of",
    "write_block",
]


_SAMPLE: tuple[str, Mapping[str, Any]] = ("f", {})
_NOTATION = ("hermes", "api")
"""The formats whose calls stand in a text as Hermes blocks."""
_MARKED = ("hermes", "qwen_xml", "mistral", "deepseek")
"""Formats whose markup stands in no prose."""
_LEAD = re.compile(r"(?:```[a-z_]{0,16}|<(?P<tag>[^<>\n]{1,128})>)?\s{0,64}(?P<list>\[?\s{0,64})")
"""What may stand before a call in the markup of no known family: a fence or a tag, and a list's bracket."""
_WORD = re.compile(r"[\w.\-]+")
_FOREIGN = "the call is written in another format"
M = TypeVar("M")


class ToolLike(Protocol):
    """Anything that describes a tool to the model, as ``areal_agents.tool.ToolSpec`` does."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, Any]: ...


def schemas_of(tools: Sequence[ToolLike]) -> Schemas:
    """Return the JSON schema of each tool's arguments, by the tool's name."""
    return {tool.name: tool.parameters for tool in tools}


def parse_text(
    text: str, finish: Finish = "stop", *, form: ToolFormat = DEFAULT, tools: Sequence[ToolLike] = ()
) -> AssistantMessage:
    """Read the message that a text says, where there were never tokens.

    Its calls have no ``token_span``. Never raises.

    Args:
        text: the whole text.
        finish: how it ended.
        form: how its calls are written.
        tools: what it may call, where that is known.
    """
    blocks = blocks_of(text, form, schemas_of(tools))
    return message_of(text, finish, blocks, [None] * len(blocks), form)


def blocks_of(text: str, form: ToolFormat, tools: Schemas, *, thinking: bool = False) -> list[Block]:
    """Find the calls of ``text``.

    A known tool's call in the markup of another family is meant as one. So is a message that begins as a known tool's
    call does, without markup or in that of no known family. They are not run, and no final answer either.
    Nor is a call run that stands inside an argument of another one.

    Args:
        text: what the model wrote.
        form: how it was told to write calls.
        tools: what it may call.
        thinking: the prompt already opened ``<think>``.
    """
    if blocks := form.find_blocks(text, thinking=thinking, tools=tools):
        return without_quoted(blocks, text, form, tools, thinking=thinking)
    if not tools:
        return []
    for other in map(tool_format, _MARKED):
        found = [
            b for b in other.find_blocks(text, thinking=thinking, tools=tools) if b.status == "ok" and b.name in tools
        ]
        if found:
            return [Block.broken(b.start, b.end, "invalid_json", _FOREIGN) for b in found]
    start = visible_start(Source(text, tools), thinking=thinking)
    meant = _begins_as_call(text, start, tools)
    return [Block.broken(start, len(text.rstrip()), "invalid_json", _FOREIGN)] if meant else []


def _begins_as_call(text: str, start: int, tools: Schemas) -> bool:
    """Say whether a known tool's call with its arguments stands at ``start``: as JSON, in a tag, or as Python's."""
    lead = _LEAD.match(text, start)
    assert lead is not None  # everything in it may be missing
    name, *others = _WORD.findall(lead["tag"] or "") or [""]
    if name in ("function", "invoke") and any(word in tools for word in others):
        return True
    value, _, failed = decode(text, lead.end())
    if not failed and isinstance(value, dict):  # {"name": "python"} alone may be an answer
        named = value.get("name")
        return isinstance(named, str) and named in tools and ("arguments" in value or "parameters" in value)
    python = tool_format("pythonic").find_blocks(text[lead.start("list") :], tools=tools)
    return any(b.name in tools and b.problem in ("", FOLLOWED) for b in python)


def message_of(
    text: str,
    finish: Finish,
    blocks: Sequence[Block],
    spans: Sequence[tuple[int, int] | None],
    form: ToolFormat = DEFAULT,
) -> AssistantMessage:
    """Build the message of ``text``, with one call for each block.

    Args:
        text: the whole text of the message.
        finish: how its sampling ended.
        blocks: the tool-call blocks in it.
        spans: the blocks' token ranges, in the same order; None where there were never tokens.
        form: the format of the blocks.
    """
    calls = tuple(
        ToolCall(f"call_{i}", b.name, b.arguments, text[b.start : b.end], b.status, span, form.name, b.problem)
        for i, (b, span) in enumerate(zip(blocks, spans, strict=True))
    )
    return AssistantMessage((Text(text),), calls, finish)


def find_blocks(text: str, *, thinking: bool = False) -> list[Block]:
    """Find the Hermes blocks of ``text``, in order.

    ``thinking`` says that the prompt already opened ``<think>``.
    """
    return DEFAULT.find_blocks(text, thinking=thinking)


def write_block(name: str, arguments: str) -> str:
    """Write one Hermes block.

    ``arguments`` is JSON text and is taken as it is.
    """
    return Hermes().write_text(name, arguments)


def read_arguments(name: str, text: str) -> Read:
    """Read the arguments that a server sends as JSON text, under the limits of a block.

    Empty text and null mean no arguments.
    """
    if not text.strip():
        return Read(name, {}, "ok")
    value, end, failed = decode(text, 0)
    if failed or text[end:].strip():
        return Read(name, {}, "invalid_json")
    return arguments_of(name, value)


def rewrite(text: str, form: ToolFormat, tools: Sequence[ToolLike] = (), *, exact: bool = True) -> str:
    """Write a message whose calls are Hermes blocks in another format.

    A call that a script breaks on purpose stays as it is.

    Args:
        text: the whole text.
        form: how the calls are to be written.
        tools: what may be called.
        exact: the calls will be run: refuse to write what would be read as others.

    Raises:
        TemplateError: the format cannot say the calls exactly.
    """
    if form.write(*_SAMPLE) == DEFAULT.write(*_SAMPLE):
        return text
    schemas = schemas_of(tools)
    blocks = [b for b in DEFAULT.find_blocks(text, tools=schemas) if b.status == "ok"]
    if not blocks:
        return text
    calls = [(b.name, b.arguments) for b in blocks]
    if form.inline:
        edges = [0, *(b.end for b in blocks)]
        pieces = [text[edge : b.start] + form.write(*call) for edge, b, call in zip(edges, blocks, calls, strict=False)]
        written = "".join(pieces) + text[edges[-1] :]
    else:
        edges = [0, *(b.end for b in blocks)]
        said = [text[edge : b.start] for edge, b in zip(edges, blocks, strict=False)] + [text[edges[-1] :]]
        written = form.write_message("\n".join(s.rstrip() for s in said if s.strip()), calls)
    read = [(b.name, b.arguments) for b in form.find_blocks(written, tools=schemas) if b.status == "ok"]
    if exact and read != calls:
        raise TemplateError(
            f"T7: the tool format {form.name} would read other calls from {written[:200]!r} than were written: "
            "change the expert's arguments, or set another model.tool_format"
        )
    return written


def rewritten(messages: Sequence[M], form: ToolFormat, tools: Sequence[ToolLike] = ()) -> list[M]:
    """Return ``messages`` with those in ``form`` that were said elsewhere: by a server's model, or by a script."""
    return [_rewritten(m, form, tools) if isinstance(m, AssistantMessage) else m for m in messages]


def _rewritten(message: Any, form: ToolFormat, tools: Sequence[ToolLike]) -> Any:
    foreign = any(c.format != form.name and c.format in _NOTATION for c in message.tool_calls)
    return replace(message, parts=(Text(rewrite(message.text, form, tools, exact=False)),)) if foreign else message
