"""Tool calls as models write them, run by an environment: never without what they said."""

from __future__ import annotations

import json

from areal_agents.chat.format import ChatFormat, parse_text
from tests.reports.envs import Several
from tests.reports.place import Place, call_text, case, play


def shown(said: str) -> str:
    """What the model is told after it said ``said``."""
    _, after = play(Several(sandbox=None), Several.tasks("test")[0], [said])
    return "\n".join(m.text for m in after)


@case("H1-15")
def a_closing_tag_inside_an_argument(place: Place) -> None:
    text = 'print("</tool_call>") and </tool_call> again'
    said = call_text("echo", json.dumps({"text": text}))
    (call,) = parse_text(said).tool_calls
    assert (call.name, call.status, call.arguments["text"]) == ("echo", "ok", text)
    assert shown(said) == text
    fmt = ChatFormat.load(place.smollm2)
    ids = fmt.encode_turn("Well: " + said)
    (call,) = fmt.parse(ids, "stop").tool_calls
    assert call.arguments["text"] == text
    assert call.token_span is not None
    assert fmt.tokenizer.decode(list(ids[slice(*call.token_span)])).strip() == said


@case("H1-17")
def arguments_under_another_key(place: Place) -> None:
    """They are used, or the call is refused by naming the key; it never runs without them."""
    said = '<tool_call>{"name": "list_orders", "parameters": {"status": "open", "limit": 2}}</tool_call>'
    assert shown(said) == "listing 2 orders with status open"
    assert shown('<tool_call>{"name": "search", "parameters": {"query": "cats"}}</tool_call>') == "found cats"
    flat = shown('<tool_call>{"name": "list_orders", "status": "open", "limit": 2}</tool_call>')
    assert flat == "listing 2 orders with status open" or ("error" in flat and "status" in flat)
    both = shown(
        '<tool_call>{"name": "list_orders", "arguments": {"limit": 3}, "parameters": {"status": "open"}}</tool_call>'
    )
    assert "error" in both
    assert "parameters" in both


@case("H1-19")
def no_arguments(place: Place) -> None:
    for nothing in ('""', "null", "{}", '" "', '"{}"'):
        assert shown(call_text("clock", nothing)) == "noon", nothing
    assert shown('<tool_call>{"name": "clock"}</tool_call>') == "noon"
    assert "'query' is missing" in shown(call_text("search", "null"))


@case("H1-21")
def a_call_that_is_cut_off(place: Place) -> None:
    said = '<tool_call>{"name": "list_orders", "arguments": {"status": "op'
    (call,) = parse_text(said, "length").tool_calls
    assert (call.status, dict(call.arguments)) == ("unclosed", {})
    told = shown(said)
    assert "listing" not in told
    assert "error: the call has no closing </tool_call>" in told


@case("H1-24")
def characters_beyond_ascii(place: Place) -> None:
    for written, text in (
        ("Grüße, Öl", "Grüße, Öl"),
        ("你好", "你好"),
        ("😀", "😀"),
        (r"\ud83d\ude00", "😀"),
        (r"\u00fc", "ü"),
    ):
        assert shown(call_text("echo", f'{{"text": "{written}"}}')) == text
    alone = call_text("echo", r'{"text": "\ud83d"}')
    (call,) = parse_text(alone).tool_calls
    assert (call.status, dict(call.arguments)) == ("invalid_json", {})
    assert "error" in shown(alone)
