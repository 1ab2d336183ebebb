"""Our messages to OpenAI's JSON and back: ids, statuses, hostile replies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.chat.tool_formats import named_format
from areal_agents.engines.openai.messages import read_reply, reasoning_form, request_messages
from areal_agents.errors import ConfigError, EngineError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Image, Message, Text, tool_result, user
from tests.chat_server import Json, call


def reply_of(**message: Any) -> AssistantMessage:
    return read_reply({"choices": [{"message": message}]}).message


@pytest.mark.parametrize(
    ("arguments", "status", "read"),
    [
        ('{"a": 1}', "ok", {"a": 1}),
        ("", "ok", {}),
        (None, "ok", {}),
        ({"a": 1}, "ok", {"a": 1}),
        ('{"a": ', "invalid_json", {}),
        ('{"a": NaN}', "invalid_json", {}),
        ('{"a": 1}}</tool_call><tool_call>{', "invalid_json", {}),
        ("[" * 2000, "invalid_json", {}),
        ('"{\\"a\\": 1}"', "ok", {"a": 1}),  # quoted once more, as in a block
        ("[1]", "invalid_arguments", {}),
        ("3", "invalid_arguments", {}),
    ],
)
def test_arguments_get_a_status_never_an_exception(arguments: Any, status: str, read: Any) -> None:
    message = reply_of(content=None, tool_calls=[{"id": "i", "function": {"name": "add", "arguments": arguments}}])
    (one,) = message.tool_calls
    assert (one.id, one.name, one.status, one.arguments) == ("i", "add", status, read)
    assert message.text == one.raw
    sent = request_messages([message])[0]
    if isinstance(arguments, str) and arguments:
        assert sent["tool_calls"][0]["function"]["arguments"] == arguments  # back as the model wrote it


def test_calls_without_names_ids_or_room() -> None:
    entries: list[Any] = [{"id": "same", "function": {"name": "f", "arguments": "{}"}}] * 2
    entries += [{"id": None, "function": {"name": " ", "arguments": "{}"}}, {"id": "call_3", "function": {"name": "g"}}]
    calls = reply_of(content="", tool_calls=entries).tool_calls
    assert [c.id for c in calls] == ["same", "served-1", "served-2", "served-3"]
    assert [c.status for c in calls] == ["ok", "ok", "missing_name", "ok"]
    many = reply_of(content="", tool_calls=[{"id": str(i), "function": {"name": "f"}} for i in range(70)]).tool_calls
    assert [c.status for c in many] == ["ok"] * 64 + ["invalid_json"] * 6


def test_calls_in_other_places() -> None:
    broken: Any = {"id": "", "type": "function"}
    flat: Any = {"id": "a", "type": "function", "name": "f", "arguments": '{"x": 1}'}
    first, second = reply_of(content="so ", tool_calls=[broken, flat]).tool_calls
    assert (first.status, first.name, first.id) == ("missing_name", "", "served-0")
    assert (second.status, second.name, second.arguments, second.id) == ("ok", "f", {"x": 1}, "a")
    message = reply_of(content=None, function_call={"name": "f", "arguments": '{"x": 1}'})
    (one,) = message.tool_calls
    assert (one.status, one.name, one.arguments, message.finish) == ("ok", "f", {"x": 1}, "stop")
    assert request_messages([message])[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    (unreadable,) = reply_of(content=None, function_call="f").tool_calls
    assert unreadable.status == "missing_name"


def test_content_in_its_other_forms() -> None:
    assert reply_of(content=None, refusal="no").text == "no"
    assert reply_of(content=[{"type": "thinking", "text": "?"}, {"type": "text", "text": "a"}, 3]).text == "a"
    assert reply_of(content="\ud800x").text == "?x"
    assert reply_of().text == ""
    cut = read_reply({"choices": [{"message": {"content": "a"}, "finish_reason": "length"}], "usage": {"x": True}})
    assert (cut.message.finish, cut.completion_tokens) == ("length", None)


@pytest.mark.parametrize(
    ("fields", "form", "text"),
    [
        ({"reasoning_content": "hm </think>"}, "reasoning_content", "hm </think>"),
        ({"reasoning": "hm"}, "reasoning", "hm"),
        ({"reasoning": "hm", "reasoning_content": "hm"}, "reasoning_content", "hm"),
        ({"reasoning_content": None, "reasoning": ""}, None, ""),
        ({"reasoning_content": {"a": 1}}, None, ""),
        ({"reasoning": [{"type": "text", "text": "h"}, {"text": "m"}, 3]}, "reasoning", "hm"),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}, "thinking", "hm"),
    ],
)
def test_thinking_is_kept_apart_and_sent_back_as_it_came(fields: Json, form: str | None, text: str) -> None:
    message = {"content": "7", "tool_calls": [call("add", "{}")]} | fields
    body = {"choices": [{"message": message}]}
    said = read_reply(body).message
    assert (said.reasoning, "hm" in said.text) == (text, False)
    assert reasoning_form(body) == form
    (silent,) = request_messages([said])
    assert "hm" not in json.dumps(silent)
    (sent,) = request_messages([said], reasoning=reasoning_form(body))
    assert sent["tool_calls"][0]["function"]["name"] == "add"
    if form == "thinking":
        assert sent["content"] == [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    elif form is not None:
        assert (sent[form], sent["content"]) == (text, "7")
    else:
        assert sent == silent


def ended(word: Any, **message: Any) -> str:
    return read_reply({"choices": [{"message": message or {"content": "a"}, "finish_reason": word}]}).message.finish


@pytest.mark.parametrize(
    ("words", "finish"),
    [
        ((None, "", "stop", "tool_calls", "eos_token", "end_turn", "Stop", 3), "stop"),
        (("length", "max_tokens", "model_length", "LENGTH", {"type": "length"}), "length"),
        (("model_context_window_exceeded", "max_length"), "length"),
        (("content_filter", "safety", "SAFETY", "refusal", "content-filter", "sensitive"), "content_filter"),
        (("RECITATION", "prohibited_content", "guardrail_intervened"), "content_filter"),
    ],
)
def test_how_a_reply_ended_in_the_words_of_servers(words: tuple[Any, ...], finish: str) -> None:
    assert {ended(word) for word in words} == {finish}


def test_a_reply_without_text_and_calls_is_empty() -> None:
    messages: list[Json] = [{"content": None}, {"content": ""}, {"content": " \n"}, {"content": [], "tool_calls": []}]
    for message in messages:
        assert ended("stop", **message) == "empty"
        assert ended("length", **message) == "length"  # spent on reasoning that is not shown
        assert ended("content_filter", **message) == "content_filter"
    assert ended("stop", content=None, refusal="I will not") == "stop"
    assert ended("tool_calls", content=None, tool_calls=[{"id": "i", "function": {"name": "f"}}]) == "stop"


@pytest.mark.parametrize("word", ["error", "abort", "insufficient_system_resource"])
def test_a_reply_that_the_server_broke_off_is_none(word: str) -> None:
    with pytest.raises(EngineError, match=f"the server broke the reply off \\(finish_reason '{word}'\\)"):
        ended(word)


def test_calls_that_the_server_left_in_the_text_are_found_and_sent_back_as_text() -> None:
    text = 'so <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> <tool_call>{bad</tool_call>'
    message = reply_of(content=text)
    assert [c.status for c in message.tool_calls] == ["ok", "invalid_json"]
    results = [tool_result("2", call=message.tool_calls[0]), tool_result("error", call=message.tool_calls[1])]
    assert request_messages([message, *results]) == [
        {"role": "assistant", "content": text},
        {"role": "tool", "content": "2", "tool_call_id": "call_0", "name": "add"},
        {"role": "tool", "content": "error", "tool_call_id": "call_1"},
    ]
    # a server that insists on entries in tool_calls
    assert request_messages([message, *results], text_calls=False) == [
        {"role": "assistant", "content": text},
        {"role": "user", "content": "<tool_response>\n2\n</tool_response>"},
        {"role": "user", "content": "<tool_response>\nerror\n</tool_response>"},
    ]
    named = reply_of(content='so <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call> then')
    row = request_messages([named], text_calls=False)[0]
    assert (row["content"], row["tool_calls"][0]["function"]["arguments"]) == ("so  then", '{"a": 1}')
    assert read_reply({"choices": [{"message": {"content": text}}]}, text_calls=False).message.tool_calls == ()


def test_images() -> None:
    seen = Message("user", (Text("what?"), Image("data:image/png;base64,AA")))
    assert request_messages([seen])[0]["content"] == [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]
    with pytest.raises(ConfigError, match=r"'/tmp/x\.png' cannot be sent"):
        request_messages([Message("user", (Image("/tmp/x.png"),))])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text("abcXYZ_-0189", min_size=1, max_size=12)
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=50)
@given(
    content=PLAIN.filter(lambda t: "<tool_call>" not in t),
    calls=st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3)), max_size=3),
    results=st.lists(PLAIN, min_size=3, max_size=3),
)
def test_a_reply_comes_back_as_it_came(content: str, calls: list[tuple[str, Any]], results: list[str]) -> None:
    entries = [call(name, json.dumps(arguments), f"id{i}") for i, (name, arguments) in enumerate(calls)]
    message = reply_of(content=content, tool_calls=entries)
    assert [(c.id, c.name, dict(c.arguments), c.status) for c in message.tool_calls] == [
        (f"id{i}", name, arguments, "ok") for i, (name, arguments) in enumerate(calls)
    ]
    answers = [tool_result(text, call=c) for text, c in zip(results, message.tool_calls, strict=False)]
    rows = request_messages([user("q"), message, *answers])
    want: dict[str, Any] = {"role": "assistant", "content": content}
    if entries:
        want["tool_calls"] = entries
    assert rows[1] == want
    assert rows[2:] == [
        {"role": "tool", "content": text, "tool_call_id": e["id"], "name": e["function"]["name"]}
        for text, e in zip(results, entries, strict=False)
    ]


def test_calls_left_in_the_text_are_read_in_the_named_format() -> None:
    tool = ToolSpec("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}})
    text = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    body = {"choices": [{"message": {"content": text}}]}
    (call,) = read_reply(body, form=named_format("qwen_xml"), tools=[tool]).message.tool_calls
    assert (call.name, call.arguments, call.status, call.format) == ("add", {"a": 3}, "ok", "qwen_xml")
    (call,) = read_reply(body).message.tool_calls
    assert (call.status, call.format) == ("invalid_json", "hermes")
