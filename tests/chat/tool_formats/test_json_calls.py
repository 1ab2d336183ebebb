"""A call is never read without what it said: other keys, flattened arguments, quoted objects, nothing at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from areal_agents.chat.tool_formats.json_calls import MAX_DEPTH, MAX_JSON_CHARS, arguments_of, call_of
from areal_agents.chat.toolcalls import parse_text, read_arguments
from areal_agents.engines.openai.messages import read_reply
from areal_agents.sandbox import SandboxSpec
from areal_agents.tool import ToolSpec, tool
from areal_agents.tool_dispatch import Dispatcher

TOOLS: dict[str, Any] = {
    "orders": {"properties": {"status": {"type": "string"}, "limit": {"type": "integer"}}},
    "ask": {"properties": {"input": {"type": "string"}}},
    "run": {"properties": {"input": {"type": "object"}, "args": {"type": "array"}, "type": {"type": "string"}}},
    "ping": {"properties": {}},
}


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ({"name": "orders", "arguments": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "parameters": {"status": "open", "limit": 2}}, {"status": "open", "limit": 2}),
        ({"name": "orders", "args": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "params": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "kwargs": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "input": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "input": '{"limit": 2}'}, {"limit": 2}),
        ({"name": "orders", "arguments": {}, "parameters": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "arguments": {"limit": 2}, "parameters": {"limit": 2}}, {"limit": 2}),
        ({"name": "orders", "limit": 2}, {"limit": 2}),
        ({"name": "orders", "arguments": {}, "limit": 2}, {"limit": 2}),
        ({"name": "orders", "limit": 2, "nonsense": 3}, {"limit": 2, "nonsense": 3}),  # the tool's check names it
        ({"type": "function", "function": {"name": "orders", "arguments": {"limit": 2}}}, {"limit": 2}),
        ({"id": "c1", "type": "function", "function": {"name": "orders", "arguments": '{"limit": 2}'}}, {"limit": 2}),
        ({"function": {"name": "orders", "parameters": {"limit": 2}}}, {"limit": 2}),
        ({"type": "function", "name": "orders", "arguments": {"limit": 2}, "id": "c1"}, {"limit": 2}),
        ({"name": "ask", "input": "tea"}, {"input": "tea"}),
        ({"name": "ask", "arguments": {"input": "tea"}}, {"input": "tea"}),
        ({"name": "run", "type": "fast"}, {"type": "fast"}),
        ({"name": "run", "args": [1]}, {"args": [1]}),
        ({"name": "ping"}, {}),
        ({"name": "ping", "arguments": None}, {}),
        ({"name": "ping", "arguments": ""}, {}),
        ({"name": "ping", "arguments": "  "}, {}),
        ({"name": "ping", "arguments": "null"}, {}),
        ({"name": "ping", "arguments": '""'}, {}),
        ({"name": "ping", "arguments": "{}"}, {}),
        ({"name": "ping", "parameters": None}, {}),
        ({"name": "ping", "arguments": {}, "parameters": None, "input": ""}, {}),
    ],
)
def test_what_a_call_says_is_read(call: dict[str, Any], arguments: dict[str, Any]) -> None:
    read = call_of(call, TOOLS)
    assert (read.status, read.name, read.arguments) == ("ok", read.name, arguments)
    (found,) = parse_text(f"<tool_call>{json.dumps(call)}</tool_call>").tool_calls
    assert found.status in ("ok", "invalid_arguments")  # without the tools some have two meanings


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"name": "orders", "arguments": {"limit": 2}, "parameters": {"limit": 3}}, ('"arguments"', '"parameters"')),
        ({"name": "orders", "args": {"limit": 2}, "input": {"limit": 3}}, ('"args"', '"input"')),
        ({"name": "orders", "arguments": {"limit": 2}, "status": "open"}, ('"status"', "beside")),
        ({"name": "orders", "arguments": {}, "who": 1}, ('"who"', "beside")),
        ({"name": "orders", "parameters": ["open"]}, ('"parameters"', "JSON object")),
        ({"name": "orders", "input": "open orders"}, ('"input"', "JSON object")),
        ({"name": "orders", "arguments": [1]}, ('"arguments"', "JSON object")),
        ({"name": "orders", "arguments": "limit=2"}, ('"arguments"', "JSON object")),
        ({"name": "orders", "arguments": 0}, ('"arguments"', "JSON object")),
        ({"name": "orders", "arguments": False}, ('"arguments"', "JSON object")),
        ({"name": "run", "input": {"args": [1]}}, ('"input"', "may be")),
        ({"function": {"name": "orders", "arguments": {}}, "limit": 2}, ('"limit"', '"function"')),
    ],
)
def test_what_has_two_meanings_is_refused_and_named(call: dict[str, Any], named: tuple[str, ...]) -> None:
    read = call_of(call, TOOLS)
    assert (read.status, read.arguments) == ("invalid_arguments", {})
    assert read.name in TOOLS
    for part in named:
        assert part in read.problem


@pytest.mark.parametrize(
    ("text", "status", "arguments"),
    [
        ("", "ok", {}),
        (" \n", "ok", {}),
        ("null", "ok", {}),
        ('""', "ok", {}),
        ('"null"', "ok", {}),
        ('"{}"', "ok", {}),
        ('"{\\"a\\": 1}"', "ok", {"a": 1}),
        ('{"a": 1}', "ok", {"a": 1}),
        ("[]", "invalid_arguments", {}),
        ("0", "invalid_arguments", {}),
        ('"a"', "invalid_arguments", {}),
        ('{"a": 1', "invalid_json", {}),
        ('{"a": 1} {}', "invalid_json", {}),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "invalid_json", {}),
        ('"' + "a" * MAX_JSON_CHARS + '"', "invalid_json", {}),
    ],
)
def test_a_servers_arguments(text: str, status: str, arguments: dict[str, Any]) -> None:
    read = read_arguments("f", text)
    assert (read.status, read.arguments) == (status, arguments)


@pytest.mark.parametrize("key", ["parameters", "args", "input"])
def test_a_servers_call_with_another_key(key: str) -> None:
    entry = {"id": "a", "type": "function", "function": {"name": "f", key: {"x": 1}}}
    (call,) = read_reply({"choices": [{"message": {"tool_calls": [entry]}}]}).message.tool_calls
    assert (call.status, call.arguments, call.format) == ("ok", {"x": 1}, "api")


def test_a_schema_without_properties_is_none_of_the_models_business() -> None:
    for schema in ({}, {"properties": None}, {"type": "object"}):
        assert call_of({"name": "f", "arguments": {"x": 1}}, {"f": schema}) == ("f", {"x": 1}, "ok", "")


def test_arguments_of_names_the_key() -> None:
    assert arguments_of("f", 3, "input").problem == '"input" must be a JSON object'


@tool()
async def list_orders(status: str = "all", limit: int = 100) -> str:
    """List orders."""
    return f"listing {limit} orders with status {status}"


async def answer(text: str) -> tuple[str, str]:
    dispatcher = Dispatcher([list_orders], sandbox=None, sandbox_spec=SandboxSpec(), models={})
    (result,) = await dispatcher.run(parse_text(text, tools=[list_orders]).tool_calls)
    return result.status, result.text


def test_a_call_runs_with_what_it_said_or_not_at_all() -> None:
    import asyncio

    def told(call: dict[str, Any]) -> tuple[str, str]:
        return asyncio.run(answer(f"<tool_call>{json.dumps(call)}</tool_call>"))

    listed = ("ok", "listing 2 orders with status open")
    for given in ({"parameters": {"status": "open", "limit": 2}}, {"status": "open", "limit": 2}):
        assert told({"name": "list_orders", **given}) == listed
    assert told({"name": "list_orders", "arguments": ""}) == ("ok", "listing 100 orders with status all")
    status, text = told({"name": "list_orders", "arguments": {"limit": 2}, "status": "open"})
    assert status == "invalid_arguments"
    assert text == (
        'error: "status" stands beside "arguments": write everything inside it. '
        "Expected: list_orders(status?: string, limit?: integer)"
    )
    status, text = told({"name": "list_orders", "limit": 2, "page": 1})
    assert (status, "'page' is not a parameter" in text) == ("invalid_arguments", True)


def test_a_schema_that_is_none_names_no_parameter() -> None:
    """Tools come from servers and files, too."""
    for properties in (3, "at", ["at"], None):
        (call,) = parse_text(
            '<tool_call>{"name": "orders", "arguments": {"limit": 2}}</tool_call>',
            tools=[ToolSpec("orders", "", {"type": "object", "properties": properties})],
        ).tool_calls
        assert (call.status, call.arguments) == ("ok", {"limit": 2})
