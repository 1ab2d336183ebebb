"""The translation of our messages to the JSON of OpenAI's chat completions and back, without network.

A server that parses tool calls returns them beside the text. They are put back into the text as blocks, so that
``AssistantMessage.text`` is whole: rewards, chat templates and saved episodes read it. They are taken out again when
the message is sent.

What a server returns as the model's thinking (``reasoning_content``, ``reasoning``, or parts of type ``thinking``) is
kept beside the text, where no reward and no parser looks. It is sent back only where that is asked for, in the form in
which it came.

A server that has no parser, or could not read a call, leaves it in the text. Our own parser finds it there, in the tool
format that ``model.tool_format`` names (Hermes by default). Such a message is sent back as the text it is.

The reply is hostile: it is only read as JSON, within the limits of ``chat/tool_formats``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from areal_agents.chat.tool_formats import DEFAULT, ToolFormat
from areal_agents.chat.tool_formats.hermes import CLOSE
from areal_agents.chat.tool_formats.json_calls import Read, alternative
from areal_agents.chat.toolcalls import MAX_CALLS, parse_text, read_arguments, write_block
from areal_agents.chat_model import ChatReply, MessageRefused
from areal_agents.errors import EngineError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Finish, Image, Message, Part, Text, ToolCall

Json = dict[str, Any]
ReasoningForm = Literal["reasoning_content", "reasoning", "thinking"]
"""Where a server puts the model's thinking: a field of the message, or parts of its content."""

_TEXT_ID = re.compile(r"call_\d+")  # the ids of calls that were found in text; those of a server are kept apart
_MAX_ID = 256
_URL = ("http://", "https://", "data:image/")
FILTERED = frozenset(
    {"content_filter", "content_policy_violation", "safety", "refusal", "sensitive", "recitation", "blocklist"}
    | {"prohibited_content", "guardrail_intervened"}
)
"""Words of servers for what their filters did, as a finish_reason or an error's code."""
_LENGTH = frozenset(
    {"length", "max_tokens", "max_output_tokens", "max_length", "model_length", "model_context_window_exceeded"}
)
_BROKEN = frozenset({"error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource"})


def request_tools(tools: Sequence[ToolSpec]) -> list[Json]:
    """Return the ``tools`` of a request."""
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
        }
        for t in tools
    ]


def request_messages(
    messages: Sequence[Message | AssistantMessage], *, text_calls: bool = True, reasoning: ReasoningForm | None = None
) -> list[Json]:
    """Return the ``messages`` of a request.

    ``reasoning`` is the form in which the assistant's thinking is sent back; None sends none. ``text_calls=False`` is
    for servers that insist on a ``tool_calls`` entry for every result. Calls found in text are
    then sent as such entries too. A call without a name cannot be, and its result travels in a user message.

    Raises MessageRefused for an image that is no URL.
    """
    rows: list[Json] = []
    called: set[str] = set()
    for message in messages:
        if isinstance(message, AssistantMessage):
            row = _assistant(message, text_calls=text_calls)
            if reasoning is not None and message.reasoning:
                row = _with_reasoning(row, _clean(message.reasoning), reasoning)
            called = {call["id"] for call in row.get("tool_calls", ())}
        elif message.role == "tool" and not text_calls and message.tool_call_id not in called:
            row = {"role": "user", "content": f"<tool_response>\n{_clean(message.text)}\n</tool_response>"}
        else:
            row = {"role": message.role, "content": _content(message.parts)}
            named = {"tool_call_id": message.tool_call_id, "name": message.name}
            row |= {key: _clean(value) for key, value in named.items() if value is not None}
        rows.append(row)
    return rows


def read_reply(
    body: object, *, text_calls: bool = True, form: ToolFormat = DEFAULT, tools: Sequence[ToolSpec] = ()
) -> ChatReply:
    """Read the first choice of a chat completion.

    Args:
        body: the decoded JSON.
        text_calls: look for calls in the text where the server read none.
        form: the tool format of those.
        tools: what the request offered.

    Raises EngineError, saying what is missing, where the body is no chat completion, and where the server broke off.
    """
    choice = _first_choice(body)
    message = _mapping(choice.get("message"), "choices[0].message")
    content = _text_of(message)
    older = message.get("function_call")  # of servers that know one call a message
    entries = message.get("tool_calls") or ([{"function": older}] if older else [])
    if not isinstance(entries, list):
        raise EngineError("choices[0].message.tool_calls is no list")
    finish = _finish(choice.get("finish_reason"), empty=not content.strip() and not entries)
    if entries:
        calls = _calls(entries)
        text = content + "\n".join(call.raw for call in calls)
        said = AssistantMessage((Text(text),), calls, finish)
    else:
        read = parse_text(content, finish, form=form, tools=tools) if text_calls else None
        said = read or AssistantMessage((Text(content),), (), finish)
    said = replace(said, reasoning=_reasoning(message)[1])
    assert isinstance(body, dict)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    name = body.get("model")
    return ChatReply(
        said,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        _clean(name)[:_MAX_ID] if isinstance(name, str) else "",
    )


def reasoning_form(body: object) -> ReasoningForm | None:
    """Return the form of the thinking in a chat completion that ``read_reply`` has read, or None where it has none."""
    return _reasoning(_mapping(_first_choice(body).get("message"), "choices[0].message"))[0]


def error_text(body: bytes) -> tuple[str, str]:
    """Return (message, code) of an error body.

    Where the body does not have OpenAI's form, the message is the body.
    """
    plain = body.decode("utf-8", "replace").strip()
    try:
        value = json.loads(plain)
    except (ValueError, RecursionError):
        return plain, ""
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        message, code = error.get("message", error.get("detail", error)), error.get("code") or error.get("type") or ""
        return (message if isinstance(message, str) else json.dumps(message)), str(code)
    return (error if isinstance(error, str) else plain), ""


# --- sending ----------------------------------------------------------------------------------------------------


def _assistant(message: AssistantMessage, *, text_calls: bool) -> Json:
    calls = message.tool_calls
    found_in_text = text_calls and all(_TEXT_ID.fullmatch(c.id) for c in calls)
    if not calls or found_in_text or any(not c.name.strip() for c in calls):
        return {"role": "assistant", "content": _content(message.parts)}
    entries = [
        {"id": c.id, "type": "function", "function": {"name": _clean(c.name), "arguments": _arguments(c)}}
        for c in calls
    ]
    return {"role": "assistant", "content": _clean(_without_blocks(message)), "tool_calls": entries}


def _with_reasoning(row: Json, reasoning: str, form: ReasoningForm) -> Json:
    if form != "thinking":
        return row | {form: reasoning}
    content = row["content"]
    rest = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    return row | {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": reasoning}]}, *rest]}


def _without_blocks(message: AssistantMessage) -> str:
    """Return the text around the calls' blocks.

    Blocks of a server's calls are the end of the text. Others are taken out where they stand.
    """
    text, raws = message.text, [call.raw for call in message.tool_calls]
    end = "\n".join(raws)
    if text.endswith(end):
        return text[: len(text) - len(end)]
    for raw in raws:
        before, _, after = text.partition(raw) if raw else (text, "", "")
        text = before + after
    return text


def _arguments(call: ToolCall) -> str:
    """Return the arguments as the model wrote them, if they stand in a block of ours, else as JSON of our own."""
    head = write_block(call.name, "").removesuffix("}" + CLOSE)
    if call.raw.startswith(head) and call.raw.endswith("}" + CLOSE):
        return _clean(call.raw[len(head) : -len("}" + CLOSE)])
    return json.dumps(dict(call.arguments), ensure_ascii=False)


def _content(parts: Sequence[Part]) -> str | list[Json]:
    if all(isinstance(p, Text) for p in parts):
        return _clean("".join(p.text for p in parts if isinstance(p, Text)))
    return [
        {"type": "text", "text": _clean(p.text)}
        if isinstance(p, Text)
        else {"type": "image_url", "image_url": {"url": _image_url(p)}}
        for p in parts
    ]


def _image_url(image: Image) -> str:
    if not image.ref.startswith(_URL):
        raise MessageRefused(
            f"image {image.ref[:80]!r} cannot be sent to a chat server: give an http(s) URL or a data:image/… URL"
        )
    return image.ref


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent


# --- reading ----------------------------------------------------------------------------------------------------


def _first_choice(body: object) -> Json:
    reply = _mapping(body, "the body")
    choices = reply.get("choices")
    if isinstance(choices, list) and choices:
        return _mapping(choices[0], "choices[0]")
    if "error" in reply:
        raise EngineError(f"the server answered with an error: {error_text(json.dumps(reply).encode())[0][:300]}")
    raise EngineError("the body has no choices")


def _finish(reason: object, *, empty: bool) -> Finish:
    """Return how the reply ended.

    Servers have many words for a turn that the model ended itself (stop, tool_calls, eos_token, end_turn, none at all).
    So only the words for what cuts a reply are known here.
    """
    given = reason.get("type") if isinstance(reason, dict) else reason
    word = given.strip().lower().replace("-", "_") if isinstance(given, str) else ""
    if word in _BROKEN:
        raise EngineError(f"the server broke the reply off (finish_reason {word!r})")
    if word in FILTERED:
        return "content_filter"
    if word in _LENGTH:
        return "length"
    return "empty" if empty else "stop"


def _mapping(value: object, what: str) -> Json:
    if not isinstance(value, dict):
        raise EngineError(f"{what} is no JSON object")
    return value


def _text_of(message: Mapping[str, Any]) -> str:
    """Return the content, or a refusal's text where there is none.

    Parts that are no text are left out, those of thinking too (``_reasoning``).
    """
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            p["text"] for p in content if isinstance(p, dict) and p.get("type") == "text" and _is_text(p.get("text"))
        )
    if not content:
        content = message.get("refusal")
    return _clean(content) if isinstance(content, str) else ""


def _reasoning(message: Mapping[str, Any]) -> tuple[ReasoningForm | None, str]:
    """Return the model's thinking, with the form in which the server gave it; None and no text where it gave none."""
    forms: tuple[ReasoningForm, ...] = ("reasoning_content", "reasoning")
    for form in forms:  # some servers send both, with one text
        if text := _thought(message.get(form)):
            return form, text
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    thoughts = [p for p in parts if isinstance(p, dict) and p.get("type") in ("thinking", "reasoning")]
    text = "".join(_thought(p.get("thinking") or p.get("reasoning") or p.get("text")) for p in thoughts)
    return ("thinking", text) if text else (None, "")


def _thought(value: object) -> str:
    """Return a text, or the texts of parts."""
    if isinstance(value, list):
        return "".join(_thought(p.get("text")) for p in value if isinstance(p, dict))
    return _clean(value) if isinstance(value, str) else ""


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _calls(entries: Sequence[object]) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    taken: set[str] = set()
    for i, entry in enumerate(entries):
        row = _mapping(entry, f"tool_calls[{i}]")
        inner = row.get("function")
        # Without one, it is a broken call of the model's, or its name and arguments stand in the entry itself.
        function = inner if isinstance(inner, dict) else row
        given = row.get("id")
        free = isinstance(given, str) and 0 < len(given) <= _MAX_ID and given not in taken
        id = _clean(given) if free and isinstance(given, str) and not _TEXT_ID.fullmatch(given) else f"served-{i}"
        taken.add(id)
        calls.append(_call(id, function, readable=i < MAX_CALLS))
    return tuple(calls)


def _call(id: str, function: Mapping[str, Any], *, readable: bool) -> ToolCall:
    name, given = function.get("name"), function.get("arguments")
    name = _clean(name).strip() if isinstance(name, str) else ""
    if given is None or (isinstance(given, str) and not given.strip()):
        given = alternative(function)
    text = _clean(given) if isinstance(given, str) else "" if given is None else json.dumps(given)
    read = read_arguments(name, text) if readable else Read(name, {}, "invalid_json")
    if not name:
        read = Read("", {}, "missing_name")
    raw = write_block(name, text if text.strip() else "{}")
    return ToolCall(id, name, read.arguments, raw, read.status, None, "api", read.problem)


def _count(value: object) -> int | None:
    """Return a server's number, or None for anything that is no count.

    A server may send any number, also one that no float holds.
    """
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None
