"""The bug reports about tool calls and tool formats, as ``../shared/data/reports.jsonl`` has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.tool_formats import tool_format
from areal_agents.chat.toolcalls import find_blocks, parse_text, read_arguments
from areal_agents.tool import ToolSpec
from areal_agents.types import user
from tests.chat_families import family_tokenizer

TOOL = ToolSpec("python", "Run Python.", {"type": "object", "properties": {"code": {"type": "string"}}})
Templates = Callable[[str], ChatFormat]


def block(body: str) -> tuple[str, str, dict[str, Any]]:
    (found,) = find_blocks(f"<tool_call>{body}</tool_call>")
    return found.status, found.name, dict(found.arguments)


def llama_writes_bare_json(template: Templates) -> None:
    form = template("llama3_1")
    shown = str(form.tokenizer.decode(list(form.first_prompt([user("go")], [TOOL]))))
    assert 'Respond in the format {"name": function name, "parameters": dictionary' in shown
    assert "<tool_call>" not in shown
    ids = form.encode_turn('{"name": "python", "parameters": {"code": "print(1)"}}')
    (call,) = form.parse(ids, "stop", (), [TOOL]).tool_calls
    assert (call.name, call.arguments, call.status) == ("python", {"code": "print(1)"}, "ok")
    assert "<tool_call>" not in tool_format(call.format).explain("invalid_json")


def closing_tag_in_a_string(template: Templates) -> None:
    body = '{"name": "python", "arguments": {"code": "print(\'</tool_call>\')"}}'
    assert block(body) == ("ok", "python", {"code": "print('</tool_call>')"})


def parameters_for_arguments(template: Templates) -> None:
    body = '{"name": "list_orders", "parameters": {"status": "open", "limit": 2}}'
    assert block(body) == ("ok", "list_orders", {"status": "open", "limit": 2})


def nothing_is_no_arguments(template: Templates) -> None:
    for nothing in ('""', "null", '"null"', '"{}"', "{}"):
        assert block(f'{{"name": "now", "arguments": {nothing}}}') == ("ok", "now", {})
        assert read_arguments("now", nothing) == ("now", {}, "ok", "")
    assert read_arguments("now", "") == ("now", {}, "ok", "")


def a_cut_call_is_told(template: Templates) -> None:
    (call,) = parse_text('<tool_call>{"name": "python", "arguments": {"code": "pri', "length").tool_calls
    assert call.status == "unclosed"
    assert tool_format(call.format).explain(call.status).startswith("the call has no closing </tool_call>. Write <tool")


def unicode_as_written(template: Templates) -> None:
    said = "ü 中 😀"
    for text in (json.dumps(said), json.dumps(said, ensure_ascii=False)):
        assert block(f'{{"name": "python", "arguments": {{"code": {text}}}}}') == ("ok", "python", {"code": said})
    assert block('{"name": "python", "arguments": {"code": "\\ud83d"}}')[0] == "invalid_json"


CASES = {
    "H1-06": llama_writes_bare_json,
    "H1-15": closing_tag_in_a_string,
    "H1-17": parameters_for_arguments,
    "H1-19": nothing_is_no_arguments,
    "H1-21": a_cut_call_is_told,
    "H1-24": unicode_as_written,
}


def test_every_report_about_calls_has_its_case(shared_data: Path) -> None:
    rows = map(json.loads, (shared_data / "reports.jsonl").read_text(encoding="utf-8").splitlines())
    assert {row["id"] for row in rows if row["kind"] in ("tool calls", "tool format")} == set(CASES)


@pytest.mark.parametrize("id", CASES)
def test_report(id: str, smollm2: Path, shared_data: Path) -> None:
    CASES[id](lambda name: ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", name)))
