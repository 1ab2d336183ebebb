"""Valid calls of tools, drawn at random from their schemas: what acting without any skill looks like.

Arguments that a schema leaves open are words and numbers that were shown, so that a tool has something to do with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from areal_agents.tool import ToolSpec, call_text

MOST_WORDS = 2000
_WORD = re.compile(r"[\w'./-]*\w")
_DEPTH = 6
"""Schemas inside schemas that are followed. Deeper ones get nothing."""
_MOST_ITEMS = 3
_WIDE = 10
"""How far above the least a number may be, where nothing bounds it."""


def words_of(texts: Iterable[str]) -> list[str]:
    """Return the different words and numbers of some texts, in order."""
    return list(dict.fromkeys(word for text in texts for word in _WORD.findall(text)))[:MOST_WORDS]


def random_call(tools: Sequence[ToolSpec], words: Sequence[str], rng: Random) -> str:
    """Write a call of one of ``tools``, with arguments that its schema allows, as far as that can be drawn.

    Args:
        tools: one or more, of which one is drawn.
        words: what open texts and numbers are drawn from.
        rng: is drawn from.
    """
    tool = rng.choice(tools)
    return call_text(tool.name, **random_arguments(tool, words, rng))


def random_arguments(tool: ToolSpec, words: Sequence[str], rng: Random) -> dict[str, Any]:
    """Draw arguments of ``tool``: those that it requires, and each other one in half of the calls."""
    numbers = [int(word) for word in words if re.fullmatch(r"-?\d{1,9}", word)]
    drawer = _Drawer(tool.parameters.get("$defs", {}), words, numbers, rng)
    return drawer.members(tool.parameters, 0)


@dataclass(frozen=True, slots=True)
class _Drawer:
    """Draws values that a JSON schema allows."""

    named: Mapping[str, Any]
    """The schemas that others refer to."""
    words: Sequence[str]
    numbers: Sequence[int]
    rng: Random

    def members(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        """Draw an object's members."""
        required = set(schema.get("required", ()))
        return {
            name: self.value(inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in required or self.rng.random() < 0.5
        }

    def value(self, schema: Mapping[str, Any], depth: int) -> Any:
        """Draw one value. A schema that allows anything, or is too deep, gets a word."""
        if depth > _DEPTH:
            return None
        if "$ref" in schema:
            return self.value(self.named.get(str(schema["$ref"]).rpartition("/")[2], {}), depth + 1)
        if "const" in schema:
            return schema["const"]
        if choices := schema.get("enum") or schema.get("anyOf") or schema.get("oneOf"):
            chosen = self.rng.choice(list(choices))
            return chosen if "enum" in schema else self.value(chosen, depth + 1)
        kind = schema.get("type", "string")
        kind = self.rng.choice(kind) if isinstance(kind, list) else kind
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        if kind == "boolean":
            return self.rng.random() < 0.5
        if kind == "array":
            return self._items(schema, depth)
        if kind == "object":
            return self.members(schema, depth)
        return None if kind == "null" else self._text(schema)

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> int | float:
        seen = sorted(self.numbers)
        low = schema.get("minimum", schema.get("exclusiveMinimum", seen[0] if seen else 0))
        low += "exclusiveMinimum" in schema and whole
        high = schema.get("maximum", schema.get("exclusiveMaximum", max(low, seen[-1] if seen else low + _WIDE)))
        high -= "exclusiveMaximum" in schema and whole
        fitting = [number for number in seen if low <= number <= high]
        if fitting and self.rng.random() < 0.5:
            return self.rng.choice(fitting)
        return self.rng.randint(int(low), max(int(low), int(high))) if whole else self.rng.uniform(low, max(low, high))

    def _items(self, schema: Mapping[str, Any], depth: int) -> list[Any]:
        fewest = int(schema.get("minItems", 0))
        count = self.rng.randint(fewest, max(fewest, min(int(schema.get("maxItems", _MOST_ITEMS)), _MOST_ITEMS)))
        return [self.value(schema.get("items", {}), depth + 1) for _ in range(count)]

    def _text(self, schema: Mapping[str, Any]) -> str:
        words: Sequence[str] = self.words
        if pattern := schema.get("pattern"):
            words = [word for word in words if re.search(pattern, word)] or words
        low, high = int(schema.get("minLength", 0)), int(schema.get("maxLength", 1 << 20))
        words = [word for word in words if low <= len(word) <= high] or words
        return self.rng.choice(words)[:high] if words else "a" * max(low, 1)
