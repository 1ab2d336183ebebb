"""Messages of a file: what is read, and what is refused with which reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from areal_agents.finetune.messages import (
    RowRefused,
    Said,
    read_messages,
    read_tools,
    unused_fields,
    unused_tool_fields,
)
from areal_agents.types import Message, Text

USER = {"role": "user", "content": "a"}


def test_what_is_read() -> None:
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    bare = {"name": "g", "arguments": {"t": "é"}}
    found = read_messages(
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [call, bare], "refusal": None},
            {"role": "tool", "tool_call_id": "x", "content": "r"},
            {"role": "assistant", "content": "d", "reasoning": "why", "weight": 0},
            {"role": "assistant", "content": None, "refusal": "no"},
        ]
    )
    assert found == [
        Message("system", (Text("s"),)),
        Message("user", (Text("bc"),)),
        Said("", None, (("f", {"n": 1}), ("g", {"t": "é"}))),
        Message("tool", (Text("r"),), "x"),
        Said("d", "why", trains=False),
        Said("no"),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("hello", "no object with role and content"),
        ({"role": "bot", "content": "x"}, "its role is 'bot'"),
        ({"from": "human", "value": "x"}, "ShareGPT"),
        ({"role": "user", "content": None}, "its content is None"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of type 'image_url'"),
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "only the assistant calls tools"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "tool_call_id is no text"),
        ({"role": "user", "content": "\ud800"}, "half a character"),
        ({"role": "assistant", "content": ""}, "says nothing"),
        ({"role": "assistant", "content": " \n"}, "says nothing"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "its weight is 0.5"),
        ({"role": "assistant", "content": "x", "weight": True}, "its weight is True"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": "x", "tool_calls": {"name": "f"}}, "tool_calls are no list"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments are no JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "no JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "no function with a name"),
        ({"role": "assistant", "content": "x", "tool_calls": 0}, "tool_calls are no list"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": []}]}, "arguments are no JSON object"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": False}]}, "arguments are no JSON object"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"n": 1}}]}, "f, has 'parameters' beside"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "n": 1}]}, "f, has 'n' beside its name"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}, "input": {"n": 1}}]},
            "has 'input' beside its name: write what it is given as arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "arguments": {"n": 1}}]},
            "has 'arguments' beside its name",
        ),
        ({"role": "tool", "content": "x", "name": "\ud800"}, "half a character"),
        ({"role": "assistant", "content": "x", "reasoning": "a", "thinking": "b"}, "several thoughts"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["a"]}, "reasoning is no text"),
    ],
)
def test_what_is_refused(row: Any, said: str) -> None:
    with pytest.raises(RowRefused, match=rf"message 1: .*{said}"):
        read_messages([USER, row])


def test_no_messages() -> None:
    nothing: list[Any] = [[], None, {}]
    for empty in nothing:
        with pytest.raises(RowRefused, match="no list, or an empty one"):
            read_messages(empty)


def test_tools() -> None:
    bare = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    for given in ([bare], [{"type": "function", "function": bare}], json.dumps([bare])):
        (tool,) = read_tools(given)
        assert (tool.name, tool.description, tool.parameters) == ("f", "d", {"type": "object"})
    assert read_tools(None) == read_tools([]) == read_tools("") == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": 1}, "no list"),
        ([{}], "no function with a name"),
        ("{", "no JSON"),
        ([{"name": "f", "parameters": 3}], "no JSON schema"),
        ([{"name": "f", "parameters": {"properties": 3}}], "no JSON schema of an object"),
        ([{"name": "f", "parameters": {"properties": ["n"]}}], "no JSON schema of an object"),
        ([{"name": "f", "input_schema": {"type": "object"}}], "'f' has its schema in 'input_schema': write it as par"),
        ([{"function": {"name": "f", "inputSchema": {"type": "object"}}}], "has its schema in 'inputSchema'"),
        ([{"name": "f", "description": {"en": "d"}}], "description of tool 'f' is no text"),
        ([{"name": "f", "description": "\ud800"}], "half a character"),
    ],
)
def test_tools_that_are_none(given: Any, said: str) -> None:
    with pytest.raises(RowRefused, match=said):
        read_tools(given)


def test_fields_that_are_not_read_are_named() -> None:
    assert unused_fields([USER | {"audio": None, "id": 7}, "x"]) == {"messages.id"}
    calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}", "mood": "good"}, "note": ""}]
    assert unused_fields([{"role": "assistant", "tool_calls": calls}]) == {"messages.tool_calls.mood"}
    assert read_messages([{"role": "assistant", "tool_calls": calls}]) == [Said("", None, (("f", {}),))]
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}, "cache": {"a": 1}}]
    for given in (tools, json.dumps(tools)):
        assert unused_tool_fields(given) == {"tools.cache"}
    assert unused_tool_fields(None) == unused_tool_fields(" ") == set()
