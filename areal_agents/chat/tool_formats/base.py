"""The contract of a tool-call format: how a model writes its calls, how they are read, and what it is told.

    text ──find_blocks──▶ blocks, one a call, each with its own status and exact characters (T7)
    calls ──write_calls──▶ text that reads back to the same calls

The text is hostile. It is only ever read, within the limits of ``json_calls.py`` and in time linear in its length. No
text makes a reader raise. Calls inside ``<think>…</think>`` are never calls, in any format.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from areal_agents.chat.thinking import THINK, UNTHINK
from areal_agents.chat.tool_formats.json_calls import MAX_CALLS, Read, Schemas
from areal_agents.types import CallStatus

_MARKUP = ("", "{", "[", "`", "<")
"""What a call or markup begins with."""
Call = tuple[str, Mapping[str, Any]]
"""A tool's name and its arguments."""


@dataclass(frozen=True, slots=True)
class Block:
    """One call in a text: its half-open character range, and what was read from it.

    Where calls stand in a list, the first block begins with the markup that opens the list, and the last one ends with
    the markup that closes it.
    """

    start: int
    end: int
    name: str
    arguments: Mapping[str, Any]
    status: CallStatus
    problem: str = ""
    """What was wrong, in words for the model. Empty where the status says enough."""

    @classmethod
    def of(cls, start: int, end: int, read: Read) -> Block:
        """Make the block of a call that was read."""
        return cls(start, end, read.name, read.arguments, read.status, read.problem)

    @classmethod
    def broken(cls, start: int, end: int, status: CallStatus, problem: str = "") -> Block:
        """Make the block of a call that could not be read."""
        return cls(start, end, "", {}, status, problem)


class Source:
    """A text that is read from left to right, with the tools that it may call.

    Each tag is looked up once: a search begins where the last one for the same tag ended.
    """

    def __init__(self, text: str, tools: Schemas) -> None:
        self.text, self.tools = text, tools
        self.attempts = 0
        """How often JSON was decoded that may be no call."""
        self._known: dict[str, tuple[int, int]] = {}

    def find(self, tag: str, pos: int) -> int:
        """Return where ``tag`` next stands from ``pos`` on, or the text's length."""
        asked, found = self._known.get(tag, (0, -1))
        if not asked <= pos <= found:
            found = self.text.find(tag, pos)
            found = len(self.text) if found < 0 else found
            self._known[tag] = (pos, found)
        return found

    def first(self, tags: Sequence[str], pos: int) -> int:
        """Return where the first of ``tags`` stands from ``pos`` on, or the text's length."""
        return min((self.find(tag, pos) for tag in tags), default=len(self.text))

    def after(self, tag: str, pos: int) -> int:
        """Return the position after the next ``tag``, or the text's length."""
        return min(self.find(tag, pos) + len(tag), len(self.text))

    def blank(self, pos: int) -> int:
        """Return the position after the white space at ``pos``."""
        text, end = self.text, len(self.text)
        while pos < end and text[pos] in " \t\r\n":
            pos += 1
        return pos

    def at(self, tag: str, pos: int) -> bool:
        """Say whether ``tag`` stands at ``pos``."""
        return self.text.startswith(tag, pos)


class ToolFormat(ABC):
    """How one family of models writes its tool calls."""

    name: ClassVar[str]
    usage: ClassVar[str]
    """One call as the model is told to write it."""
    closing: ClassVar[str] = ""
    """What ends a call. Empty where a call ends with its own brackets."""
    wanted: ClassVar[str] = "valid JSON"
    """What the inside of a call must be."""
    openers: ClassVar[tuple[str, ...]] = ()
    """The markup that begins a call."""
    begins_calls_alone: ClassVar[tuple[str, ...] | None] = None
    """Those texts that begin a call and nothing else. None where they are the ``openers``."""
    control: ClassVar[tuple[str, ...]] = ()
    """Markup that is a control token where the tokenizer has it."""
    inline: ClassVar[bool] = True
    """Text may stand between two calls."""
    vllm_parser: ClassVar[str | None] = None
    """The name of vLLM's parser for the same format. None where it has none."""

    def find_blocks(self, text: str, *, thinking: bool = False, tools: Schemas | None = None) -> list[Block]:
        """Find the calls of ``text``, in order.

        Args:
            text: what the model wrote.
            thinking: the prompt already opened ``<think>``. An unclosed ``<think>`` hides the rest of the text, and an
                unopened ``</think>`` what stands before it: behind a server only the prompt shows where it began.
            tools: the JSON schema of each tool's arguments, by the tool's name. Formats that write every value as text
                need it, and so do calls whose arguments stand in an unusual place.
        """
        source = Source(text, tools or {})
        blocks: list[Block] = []
        seen = 0
        pos = source.after(UNTHINK, 0) if thinking else 0
        while True:
            start = source.first(self.openers, pos)
            think, unthink = source.find(THINK, pos), source.find(UNTHINK, pos)
            if unthink < min(start, think):
                blocks.clear()  # what came before was thought: the text does not show where it began
                pos = unthink + len(UNTHINK)
            elif think < start:
                pos = source.after(UNTHINK, think + len(THINK))
            elif start == len(text):
                return blocks
            else:
                found, pos = self.read(source, start, MAX_CALLS - seen)
                seen += len(found)
                blocks += found

    def read(self, source: Source, start: int, room: int) -> tuple[list[Block], int]:
        """Read what the opener at ``start`` begins.

        At most ``room`` calls are read. Others are ``invalid_json``.

        Returns:
            The blocks, and where to go on, which is behind ``start``.
        """
        raise NotImplementedError

    def malformed(self, source: Source, start: int, pos: int, problem: str = "") -> Block:
        """Return the block of a call at ``start`` that could not be read from ``pos`` on.

        It ends with its closing tag, before the next call, before ``<think>``, or at the end of the text.
        """
        limit = source.first((*self.openers, THINK), pos)
        close = source.find(self.closing, pos)
        if close >= limit:
            return Block.broken(start, limit, "unclosed", problem)
        return Block.broken(start, close + len(self.closing), "invalid_json", problem)

    def read_raw(self, raw: str, tools: Schemas | None = None) -> Block | None:
        """Read the text of one block alone. None where no call stands in it."""
        blocks = self.find_blocks(raw, tools=tools)
        return blocks[0] if blocks else None

    @abstractmethod
    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Write one call as a model writes it."""

    def write_calls(self, calls: Sequence[Call]) -> str:
        """Write the calls of one message."""
        return "\n".join(self.write(name, arguments) for name, arguments in calls)

    def write_message(self, text: str, calls: Sequence[Call]) -> str:
        """Write a message that says ``text`` and then makes ``calls``."""
        return f"{text}\n{self.write_calls(calls)}" if text.strip() else text + self.write_calls(calls)

    @property
    def hint(self) -> str:
        """The sentence that tells a model how to write a call."""
        return f"Write {self.usage}"

    def explain(self, status: CallStatus, problem: str = "") -> str:
        """Say what is wrong with a call that could not be read, and how to write it."""
        if problem:
            return f"{problem}. {self.hint}"
        if status == "missing_name":
            return f'the call has no "name". {self.hint}'
        if status == "unclosed":
            what = f"has no closing {self.closing}" if self.closing else "is cut off"
            return f"the call {what}. {self.hint}"
        return f"the call is not {self.wanted}. {self.hint}"

    def section(self, functions: Sequence[Mapping[str, Any]]) -> str:
        """Write what describes tools in a prompt, for templates that do not.

        It is short, because small models read it on CPUs.

        Args:
            functions: name, description and parameters of each tool.
        """
        lines = [json.dumps(f, ensure_ascii=False, separators=(", ", ": ")) for f in functions]
        return "\n".join(["<tools>", *lines, "</tools>", f"To call a tool, write {self.usage}"])

    def styles(self) -> tuple[ToolFormat, ...]:
        """Return the ways of writing that read alike, the usual one first."""
        return (self,)


def visible_start(source: Source, *, thinking: bool, tags: Sequence[str] = ()) -> int:
    """Return where a message begins to speak: after its white space and its leading thoughts.

    What stands behind one of ``tags`` is a call's.
    """
    others = (THINK, *tags)
    pos = source.after(UNTHINK, 0) if thinking else 0
    while True:
        pos = source.blank(pos)
        if source.at(THINK, pos):
            pos = source.after(UNTHINK, pos + len(THINK))
        elif source.at(UNTHINK, pos):
            pos += len(UNTHINK)
        elif source.text[pos : pos + 1] not in _MARKUP and source.find(UNTHINK, pos) < source.first(others, pos):
            pos = source.after(UNTHINK, pos)  # a thought that begins where the text does not show it
        else:
            return pos


def refused(blocks: Sequence[Block], problem: str) -> list[Block]:
    """Return ``blocks`` without those that could run: their calls were meant, but do not stand as they must."""
    return [
        b
        if b.status in ("invalid_json", "unclosed")
        else replace(b, arguments={}, status="invalid_json", problem=problem)
        for b in blocks
    ]
