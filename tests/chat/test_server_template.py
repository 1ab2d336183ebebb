"""The chat template that is served renders OpenAI messages to the ids that ChatFormat gives ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.server_template import served_template
from areal_agents.chat.tool_formats import FORMATS
from areal_agents.engines.openai.messages import read_reply, request_messages, request_tools
from areal_agents.errors import TemplateError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Message, Text, system, tool_result, user
from tests.chat_server import call
from tests.tiny_tokenizer import CHATML, DROPS_SYSTEM, NO_SYSTEM, NO_TOOL_ROLE, SWITCH, THINKING, WITH_TOOLS, tiny

TOOLS = (
    ToolSpec(
        "python",
        'Run "code" & print <its> output, ünïcode.',
        {"type": "object", "properties": {"code": {"type": "string", "default": "é"}}, "required": ["code"]},
    ),
    ToolSpec("noop", "", {"type": "object", "properties": {}}),
)


def said(content: str, *calls: tuple[str, Any]) -> AssistantMessage:
    entries = [call(name, json.dumps(given, ensure_ascii=False), f"id{i}") for i, (name, given) in enumerate(calls)]
    return read_reply({"choices": [{"message": {"content": content, "tool_calls": entries}}]}).message


CALLS = said("I'll run it.\n", ("python", {"code": "print('<é>')\n", "n": [1, 2.5, None, True]}), ("noop", {}))
RESULTS = tuple(tool_result(t, call=c) for t, c in zip(("é <1>\n", ""), CALLS.tool_calls, strict=True))
CONVERSATIONS: dict[str, tuple[Message | AssistantMessage, ...]] = {
    "user": (user(" hello\n\n"),),
    "system": (system("Be brief."), user("hello")),
    "calls": (system("Be brief."), user("run"), CALLS, *RESULTS),
    "no system": (user("run"), CALLS, *RESULTS, said("<think>\nwhy\n</think>\n\nIt says é."), user("and again")),
    "two turns": (user("run"), CALLS, *RESULTS, said("", ("noop", {})), RESULTS[1]),
    "text alone": (user("q"), AssistantMessage((Text("plain"),)), user("r")),
}


def served_ids(fmt: ChatFormat, messages: tuple[Message | AssistantMessage, ...], tools: tuple[ToolSpec, ...]) -> Any:
    """What vLLM does: arguments become objects, tools are complete models, the whole rendering is encoded at once."""
    rows = request_messages(messages)
    for row in rows:
        for entry in row.get("tool_calls", ()):
            entry["function"]["arguments"] = json.loads(entry["function"]["arguments"])
    given = [{**t, "function": {**t["function"], "strict": None}} for t in request_tools(tools)]
    text = fmt.tokenizer.apply_chat_template(
        rows, tools=given or None, chat_template=served_template(fmt), tokenize=False, add_generation_prompt=True
    )
    return tuple(fmt.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize(
    "template",
    [CHATML, WITH_TOOLS, NO_TOOL_ROLE, NO_SYSTEM, DROPS_SYSTEM, THINKING, "  {% if true %}\n" + CHATML + "{% endif %}"],
)
def test_the_same_ids(template: str, tools: tuple[ToolSpec, ...], name: str) -> None:
    fmt = ChatFormat(tiny(template), merge_system=True)
    messages = CONVERSATIONS[name]
    assert served_ids(fmt, messages, tools) == fmt.first_prompt(messages, tools)


def test_the_same_ids_with_smollm2(smollm2: Path) -> None:
    fmt = ChatFormat.load(smollm2)
    for tools in ((), TOOLS):
        for messages in CONVERSATIONS.values():
            assert served_ids(fmt, messages, tools) == fmt.first_prompt(messages, tools)
    assert served_template(fmt) != fmt.tokenizer.chat_template


@pytest.mark.parametrize("tool_format", FORMATS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_same_ids_in_every_tool_format(name: str, tool_format: str) -> None:
    fmt = ChatFormat(tiny(CHATML), tool_format=tool_format)
    messages = CONVERSATIONS[name]
    assert fmt.tool_format.name == tool_format
    assert served_ids(fmt, messages, TOOLS) == fmt.first_prompt(messages, TOOLS)


def test_variables_of_the_template_reach_the_server() -> None:
    given = {"enable_thinking": False}
    fmt = ChatFormat(tiny(SWITCH), template_variables=given)
    messages = CONVERSATIONS["calls"]
    assert served_ids(fmt, messages, TOOLS) == fmt.first_prompt(messages, TOOLS)
    assert fmt.first_prompt(messages) != ChatFormat(tiny(SWITCH)).first_prompt(messages)


@pytest.mark.parametrize("value", [True, None, -3, 0.5, 'é "quoted" \\ {{ x }} \n 😀', ["a", 1, {"b": [False]}], {}])
def test_every_kind_of_value_reaches_the_server(value: Any) -> None:
    fmt = ChatFormat(tiny("{{ given | tojson }}" + CHATML), template_variables={"given": value})
    messages = CONVERSATIONS["user"]
    assert served_ids(fmt, messages, ()) == fmt.first_prompt(messages)


def test_a_system_message_is_refused_by_the_server_too() -> None:
    fmt = ChatFormat(tiny(NO_SYSTEM))
    with pytest.raises(Exception, match="knows no system message"):
        served_ids(fmt, CONVERSATIONS["system"], ())


def test_of_several_templates_the_one_of_our_prompts_is_served() -> None:
    tokenizer = tiny(CHATML)
    tokenizer.chat_template = {"default": NO_TOOL_ROLE, "tool_use": CHATML}
    fmt = ChatFormat(tokenizer)
    for tools in ((), TOOLS):
        assert served_ids(fmt, CONVERSATIONS["calls"], tools) == fmt.first_prompt(CONVERSATIONS["calls"], tools)


def test_a_value_that_jinja_cannot_write_is_refused() -> None:
    fmt = ChatFormat(tiny("{{ given }}" + CHATML), template_variables={"given": b"bytes"})
    with pytest.raises(TemplateError, match="has no Jinja literal"):
        served_template(fmt)
