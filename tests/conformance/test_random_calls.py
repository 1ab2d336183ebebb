"""Calls drawn from schemas: valid, different, within their bounds."""

from __future__ import annotations

from random import Random
from typing import Literal

from areal_agents.conformance.random_calls import random_arguments, words_of
from areal_agents.tool import ToolSpec, tool


@tool()
async def complicated(
    kind: Literal["a", "b"], count: int, share: float, sure: bool, names: list[str], size: int | None = None,
    table: dict[str, int] | None = None,
) -> str:  # fmt: skip
    """Take much."""
    return "ok"


def test_random_arguments_are_valid_and_differ() -> None:
    words = words_of(["Rooms 3 and 17, e-mail x@y.org: it's far-off.", "17 again"])
    assert words == ["Rooms", "3", "and", "17", "e-mail", "x", "y.org", "it's", "far-off", "again"]
    drawn = [random_arguments(complicated, words, Random(seed)) for seed in range(200)]
    assert all(isinstance(complicated.validate(arguments), dict) for arguments in drawn)
    assert {arguments["kind"] for arguments in drawn} == {"a", "b"}
    assert {type(arguments["sure"]) for arguments in drawn} == {bool}
    assert {name for arguments in drawn for name in arguments["names"]} == set(words)
    assert {arguments["count"] for arguments in drawn} == set(range(3, 18))  # between the numbers that were shown
    assert 60 < sum("size" in arguments for arguments in drawn) < 140
    assert random_arguments(complicated, words, Random(5)) == drawn[5]


def test_bounds_of_a_schema_are_kept() -> None:
    schema = {
        "properties": {
            "n": {"type": "integer", "minimum": 5, "exclusiveMaximum": 8},
            "word": {"type": "string", "pattern": "^[a-z]{3}$"},
            "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "minItems": 2, "maxItems": 2},
            "either": {"anyOf": [{"type": "null"}, {"const": 4}]},
        },
        "required": ["n", "word", "items", "either"],
        "$defs": {"Item": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    }
    spec = ToolSpec("t", "", schema)
    drawn = [random_arguments(spec, ["900", "cat", "house"], Random(seed)) for seed in range(100)]
    assert {arguments["n"] for arguments in drawn} == {5, 6, 7}
    assert {arguments["word"] for arguments in drawn} == {"cat"}
    assert {arguments["either"] for arguments in drawn} == {None, 4}
    assert all(len(arguments["items"]) == 2 and "x" in arguments["items"][0] for arguments in drawn)
