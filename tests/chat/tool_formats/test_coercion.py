"""Values that a model wrote as text, by the tool's JSON schema."""

from __future__ import annotations

from typing import Any, Literal, Optional

import pytest

from areal_agents.chat.tool_formats.coercion import typed
from areal_agents.chat.tool_formats.qwen_xml import QwenXml
from areal_agents.tool import tool


def one(text: str, schema: Any, **root: Any) -> Any:
    return typed({"v": text}, {"properties": {"v": schema}, **root})["v"]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("007", {"type": "string"}, "007"),
        ("true", {"type": "string"}, "true"),
        ("null", {"type": "string"}, "null"),
        ("[1]", {"type": "string"}, "[1]"),
        (" x ", {"type": "string"}, " x "),
        ("3", {"type": "integer"}, 3),
        (" -3\n", {"type": "integer"}, -3),
        ("3.0", {"type": "integer"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("007", {"type": "integer"}, "007"),
        ("three", {"type": "integer"}, "three"),
        ("true", {"type": "integer"}, "true"),
        ("1e400", {"type": "number"}, "1e400"),
        ("NaN", {"type": "number"}, "NaN"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("2.5", {"type": "number"}, 2.5),
        ("2", {"type": "number"}, 2),
        ("-1e3", {"type": "number"}, -1000.0),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": "null"}, None),
        ('[1, "a"]', {"type": "array"}, [1, "a"]),
        ("['a', True, None]", {"type": "array"}, ["a", True, None]),
        ("a, b", {"type": "array"}, "a, b"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("[1]", {"type": "object"}, "[1]"),
        ('{"a": 1', {"type": "object"}, '{"a": 1'),
        ("[" * 50 + "]" * 50, {"type": "array"}, "[" * 50 + "]" * 50),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("4", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 4),
        ("x", {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "x"),
        ("4", {"type": ["integer", "null"]}, 4),
        ("null", {"type": ["integer", "null"]}, None),
        ("[1]", {"anyOf": [{"type": "array"}, {"type": "string"}]}, [1]),
        ("1", {"enum": [1, 2]}, 1),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("true", {"enum": ["true", 1]}, "true"),
        ("3", {"enum": [1, 2]}, "3"),
        ("red", {"type": "string", "enum": ["red"]}, "red"),
        ("2", {"const": 2}, 2),
        ("5", {}, "5"),
        ("5", {"allOf": [{"$ref": "#/$defs/N"}]}, 5),
        ("5", {"$ref": "#/$defs/N"}, 5),
        ("5", {"$ref": "#/$defs/Loop"}, "5"),
        ("5", {"$ref": "#/nowhere"}, "5"),
        ("5", {"type": "no such"}, "5"),
        ("5", {"type": {"a": 1}}, "5"),
        ("5", {"type": [["integer"]]}, "5"),
        ("5", {"anyOf": 3}, "5"),
        ("5", True, "5"),
        ("5", None, "5"),
    ],
)
def test_a_value_by_its_schema(text: str, schema: Any, value: Any) -> None:
    found = one(text, schema, **{"$defs": {"N": {"type": "integer"}, "Loop": {"$ref": "#/$defs/Loop"}}})
    assert (found, type(found)) == (value, type(value))


def test_without_a_schema_everything_is_text() -> None:
    assert typed({"a": "1", "b": "[]"}, None) == {"a": "1", "b": "[]"}
    assert typed({"a": "1"}, {"properties": {}}) == {"a": "1"}
    assert typed({"a": "1"}, {"additionalProperties": {"type": "integer"}}) == {"a": 1}


@tool()
async def book(
    name: str, seats: int, smoking: bool = False, tags: list[str] | None = None, kind: Literal["a", "b"] = "a",
    price: Optional[float] = None,  # noqa: UP045
) -> str:  # fmt: skip
    """Book a table."""
    return ""


def test_by_the_schema_of_a_real_tool() -> None:
    given = {"name": "007", "seats": 4, "smoking": True, "tags": ["x", "3"], "kind": "b", "price": 2.5}
    text = QwenXml().write("book", given)
    (block,) = QwenXml().find_blocks(text, tools={"book": book.parameters})
    assert block.arguments == given
    assert isinstance(book.validate(block.arguments), dict)
    (block,) = QwenXml().find_blocks(
        QwenXml().write("book", {"name": "x", "seats": "a few"}), tools={"book": book.parameters}
    )
    assert block.arguments["seats"] == "a few"
    assert "'seats'" in str(book.validate(block.arguments))
