"""Calls whose arguments stand between tags as bare text, one tag pair a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from areal_agents.chat.thinking import THINK
from areal_agents.chat.tool_formats.base import Source
from areal_agents.chat.tool_formats.coercion import typed
from areal_agents.chat.tool_formats.json_calls import MAX_JSON_CHARS, Read, sane
from areal_agents.types import CallStatus

_LONG = f"the arguments are longer than {MAX_JSON_CHARS} characters"


@dataclass
class TaggedCall:
    """What was read of one call so far."""

    name: str
    values: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def add(self, key: str, value: str) -> None:
        """Add a parameter. A second value of the same one makes the call invalid."""
        if key in self.values:
            self.problem = self.problem or f'"{key[:40]}" is given twice'
        elif not key:
            self.problem = self.problem or "a parameter has no name"
        self.values[key] = value

    def read(self, tools: Mapping[str, Mapping[str, object]]) -> Read:
        """Return the call, with values that have the types of its tool's schema."""
        if not self.name:
            return Read("", {}, "missing_name")
        if self.problem:
            return Read(self.name, {}, "invalid_arguments", self.problem)
        if sum(map(len, self.values.values())) > MAX_JSON_CHARS:
            return Read(self.name, {}, "invalid_arguments", _LONG)
        arguments = typed(self.values, tools.get(self.name))
        if not sane(arguments):
            return Read(self.name, {}, "invalid_arguments", "an argument is no text")
        return Read(self.name, arguments, "ok")


def value_end(source: Source, pos: int, close: str, followers: Sequence[str], next_one: str) -> int | None:
    """Return where the value that starts at ``pos`` ends, or None.

    It ends at the first ``close`` that something follows which may stand there. A closing tag that other text follows
    is part of the value, as in code about such tags. A value with the next parameter in it lost its own closing tag:
    it would run with what was meant for another parameter, or for another call.

    Args:
        source: the text.
        pos: where the value starts.
        close: the tag that ends it.
        followers: what may stand after that tag.
        next_one: the tag that opens the next parameter.
    """
    limit = source.find(next_one, pos)
    while (found := source.find(close, pos)) < limit:
        after = source.blank(found + len(close))
        if any(source.at(f, after) for f in followers):
            return found
        pos = found + len(close)
    return None


def ending(source: Source, pos: int, openers: Sequence[str], closing: str) -> tuple[int, CallStatus]:
    """Return where a broken call ends that could be read up to ``pos``, and its status."""
    limit = source.first((*openers, THINK), pos)
    close = source.find(closing, pos)
    return (close + len(closing), "invalid_json") if close < limit else (limit, "unclosed")
