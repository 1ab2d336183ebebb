"""Rows of a JSONL file in the usual chat format, read as messages.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "tools": […]}

An assistant's message may have ``tool_calls``, and its thinking in ``reasoning_content``. With ``"weight": 0`` it is
shown and not trained. What cannot be read raises ``RowRefused`` with the reason, and costs its row alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_agents.chat.tool_formats.base import Call
from areal_agents.chat.toolcalls import read_arguments
from areal_agents.tool import ToolSpec
from areal_agents.types import Message, Role, Text
from areal_agents.utils.short_text import short

_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "tool": "tool"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_KNOWN = frozenset({"role", "content", "name", "tool_call_id", "tool_calls", "weight", "refusal", *_REASONING})
_AROUND = frozenset({"id", "type", "index", "function"})
"""What a call or a tool has around its name."""
_ARGUMENTS = ("parameters", "args", "params", "kwargs", "input", "inputs", "tool_input")
"""Where other formats have a call's arguments."""
_SCHEMAS = ("input_schema", "inputSchema", "args_schema", "arguments", "schema")
"""Where other formats have a tool's parameters."""


class RowRefused(Exception):
    """A row of a data set that cannot be trained on. Its text is the reason."""


@dataclass(frozen=True, slots=True)
class Said:
    """One message of the assistant, as a file has it."""

    content: str
    reasoning: str | None = None
    """The thinking before it. None where the file says nothing of any."""
    calls: tuple[Call, ...] = ()
    trains: bool = True
    hermes: bool = False
    """Its calls stand in ``content`` as Hermes blocks, as saved episodes have them."""


Spoken = Message | Said


def read_messages(rows: object, *, trains: bool = True) -> list[Spoken]:
    """Read a list of messages.

    ``trains`` says whether the assistant's messages are targets. Raises RowRefused.
    """
    if not isinstance(rows, list) or not rows:
        raise RowRefused("its messages are no list, or an empty one")
    found: list[Spoken] = []
    for i, row in enumerate(rows):
        try:
            found.append(_message(row, trains=trains))
        except RowRefused as error:
            raise RowRefused(f"message {i}: {error}") from None
    return found


def read_tools(given: object) -> tuple[ToolSpec, ...]:
    """Read the tools of a row: a list of functions, each in OpenAI's wrapper or bare, or that list as JSON text.

    Raises RowRefused.
    """
    if isinstance(given, str) and given.strip():
        given = _json(given, "its tools")
    if given in _EMPTY:
        return ()
    if not isinstance(given, list):
        raise RowRefused("its tools are no list")
    return tuple(_tool(entry, i) for i, entry in enumerate(given))


def unused_fields(rows: object) -> set[str]:
    """Return the fields of messages and their calls that hold something and are not read."""
    messages = _objects(rows)
    calls = [call for row in messages for call in _objects(row.get("tool_calls"))]
    found = {f"messages.{name}" for row in messages for name, value in row.items() if name not in _KNOWN and value}
    return found | {f"messages.tool_calls.{name}" for call in calls for name in _beside(call, ("name", "arguments"))}


def unused_tool_fields(given: object) -> set[str]:
    """Return the fields of tools that hold something and are not read."""
    tools = _json(given, "its tools") if isinstance(given, str) and given.strip() else given
    known = ("name", "description", "parameters", "strict")
    return {f"tools.{name}" for tool in _objects(tools) for name in _beside(tool, known)}


def _objects(rows: object) -> list[Mapping[str, Any]]:
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _beside(entry: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """Return the fields of a call or a tool, and of what is around it, that hold something and are not ``known``."""
    inner = entry.get("function", entry)
    parts = [entry] if inner is entry or not isinstance(inner, Mapping) else [inner, entry]
    return [
        str(name) for k, part in enumerate(parts) for name, value in part.items()
        if name not in _AROUND and (k or name not in known) and value not in _EMPTY
    ]  # fmt: skip


def _tool(entry: object, i: int) -> ToolSpec:
    inner = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(inner, Mapping) or not isinstance(name, str) or not name:
        raise RowRefused(f"tool {i} is no function with a name: {short(entry)}")
    parameters, description = inner.get("parameters"), inner.get("description")
    if parameters in _EMPTY:
        if other := next((k for k in _beside(entry, ("name", "description")) if k in _SCHEMAS), None):
            raise RowRefused(f"tool {name!r} has its schema in {other!r}: write it as parameters")
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping) or not isinstance(parameters.get("properties", {}), Mapping | None):
        raise RowRefused(f"the parameters of tool {name!r} are no JSON schema of an object")
    if description is not None and not isinstance(description, str):
        raise RowRefused(f"the description of tool {name!r} is no text")
    _clean(json.dumps([name, description, parameters], ensure_ascii=False))
    return ToolSpec(name, description or "", dict(parameters))


def _message(row: object, *, trains: bool) -> Spoken:
    if not isinstance(row, Mapping):
        raise RowRefused(f"it is no object with role and content: {short(row)}")
    role = row.get("role")
    if role == "assistant":
        return _said(row, trains=trains)
    if not isinstance(role, str) or role not in _ROLES:
        hint = "; ShareGPT's from and value have to be written as role and content" if "from" in row else ""
        raise RowRefused(f"its role is {short(role)}: it must be system, user, assistant or tool{hint}")
    if row.get("tool_calls"):
        raise RowRefused(f"a message of role {role} has tool_calls: only the assistant calls tools")
    named = {key: row.get(key) for key in ("tool_call_id", "name")}
    if wrong := next((key for key, value in named.items() if not isinstance(value, str | None)), None):
        raise RowRefused(f"its {wrong} is no text")
    _clean("".join(value for value in named.values() if value))
    return Message(_ROLES[role], (Text(_text(row.get("content"))),), **named)


def _said(row: Mapping[str, Any], *, trains: bool) -> Said:
    weight = row.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1, None):
        raise RowRefused(f"its weight is {short(weight)}: it must be 0 or 1")
    if row.get("function_call"):
        raise RowRefused("it has function_call, which tool_calls replaced: write the call there")
    content = row.get("content")
    if content in _EMPTY and isinstance(row.get("refusal"), str):
        content = row["refusal"]
    entries = [] if row.get("tool_calls") in _EMPTY else row["tool_calls"]
    if not isinstance(entries, list):
        raise RowRefused("its tool_calls are no list")
    calls = tuple(_call(entry, i) for i, entry in enumerate(entries))
    said = Said("" if content is None else _text(content), _reasoning(row), calls, trains and weight != 0)
    if said.trains and not said.content.strip() and not said.calls:
        raise RowRefused("the assistant says nothing: give content or tool_calls, or weight 0")
    return said


def _reasoning(row: Mapping[str, Any]) -> str | None:
    given = [row[key] for key in _REASONING if row.get(key) is not None]
    if any(not isinstance(value, str) for value in given):
        raise RowRefused("its reasoning is no text")
    if len(set(given)) > 1:
        raise RowRefused(f"it has several thoughts, in {' and '.join(k for k in _REASONING if row.get(k) is not None)}")
    return _clean(given[0]) if given else None


def _call(entry: object, i: int) -> Call:
    inner = entry.get("function", entry) if isinstance(entry, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if (
        not isinstance(entry, Mapping)
        or not isinstance(inner, Mapping)
        or not isinstance(name, str)
        or not name.strip()
    ):
        raise RowRefused(f"tool call {i} is no function with a name: {short(entry)}")
    given = inner.get("arguments")
    beside = _beside(entry, ("name", "arguments"))
    if lost := [k for k in beside if given is None or k in (*_ARGUMENTS, "arguments")]:
        raise RowRefused(f"tool call {i}, {name}, has {lost[0]!r} beside its name: write what it is given as arguments")
    read = read_arguments(_clean(name), given if isinstance(given, str) else json.dumps({} if given is None else given))
    if read.status != "ok":
        raise RowRefused(f"tool call {i}, {name}: its arguments are no JSON object: {short(given)}")
    return read.name, read.arguments


def _text(content: object) -> str:
    """Return a content's text. Its parts are joined."""
    if isinstance(content, str):
        return _clean(content)
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RowRefused(f"its content has a part of type {short(kind)}: the learner reads text alone")
        return _clean("".join(part["text"] for part in content))
    raise RowRefused(f"its content is {short(content)}: it must be text")


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowRefused("its text has half a character (a lone surrogate), which no tokenizer can write") from None
    return text


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowRefused(f"{what} are no JSON: {short(text)}") from None


def spoken_of(value: object, role: Role) -> Sequence[object]:
    """Return the messages of ``value``, a list of them or one text that ``role`` says."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list):
        return value
    raise RowRefused(f"{short(value)} is neither text nor a list of messages")
