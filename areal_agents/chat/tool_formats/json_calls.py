"""Calls that are written as JSON: the limits of what is read, and where a call's name and arguments stand.

A call is never read without what it said. Its arguments may stand under another key than the format's, or beside the
name. They are read where that has one meaning. Else the call is ``invalid_arguments``, and the problem names the keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from areal_agents.types import CallStatus

MAX_CALLS = 64
"""Calls of one message that are read; later ones are ``invalid_json``."""
MAX_JSON_CHARS = 65_536
"""Longest JSON of one call."""
MAX_DEPTH = 32
"""Deepest nesting of arguments."""

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""

_KEYS = ("arguments", "parameters", "args", "params", "kwargs", "input", "inputs", "tool_input")
_IDS = ("id", "call_id", "tool_call_id")
_TYPES = ("function", "tool_call", "tool_use", "function_call")


class Read(NamedTuple):
    """What was read of one call."""

    name: str
    arguments: Mapping[str, Any]
    status: CallStatus
    problem: str = ""


def decode(text: str, pos: int) -> tuple[Any, int, bool]:
    """Decode the JSON value that starts at ``pos``, after white space, to (value, end, failed)."""
    chunk = text[pos : pos + MAX_JSON_CHARS]
    lead = len(chunk) - len(chunk.lstrip(" \t\r\n"))
    try:
        value, end = _DECODER.raw_decode(chunk, lead)
    except (ValueError, RecursionError):  # ValueError includes JSONDecodeError and Python's integer-digits limit
        return None, pos, True
    if not sane(value):
        return None, pos, True
    return value, pos + end, False


def item_end(text: str, pos: int, end: int, quotes: str = '"') -> int | None:
    """Return where a list's item at ``pos`` ends that could not be read, or None where it is still open at ``end``.

    Brackets inside ``quotes`` are not counted.
    """
    depth, quote, escaped = 0, "", False
    for at in range(pos, min(end, pos + MAX_JSON_CHARS)):
        char = text[at]
        if quote:
            quote = quote if escaped or char != quote else ""
            escaped = char == "\\" and not escaped
        elif char in quotes:
            quote = char
        elif char in "{[(":
            depth += 1
        elif depth == 0 and char in ",;]":
            return at
        elif char in "}])":
            depth -= 1
            if depth <= 0:
                return at + 1
    return None


def call_of(value: Any, tools: Schemas, own: str = "arguments") -> Read:
    """Read one call from a JSON value.

    Args:
        value: what was decoded.
        tools: the tools that may be called; empty where they are not known.
        own: the key under which the format puts the arguments.
    """
    if not isinstance(value, dict):
        return Read("", {}, "invalid_json")
    inner = value.get("function")
    if isinstance(inner, dict) and "name" not in value:  # OpenAI's form
        lost = [k for k in value if k != "function" and not _envelope(k, value[k], ())]
        if lost:
            name = inner.get("name")
            named = name.strip() if isinstance(name, str) else ""
            return Read(named, {}, "invalid_arguments", _beside(lost, "function")) if named else _NAMELESS
        value = inner
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        return _NAMELESS
    name = name.strip()
    return _with_arguments(name, {k: v for k, v in value.items() if k != "name"}, tools.get(name), own)


def arguments_of(name: str, value: Any, key: str = "arguments") -> Read:
    """Read a call's arguments, which stand under ``key``.

    Nothing, null and empty text are no arguments. Some models quote the object once more.
    """
    if isinstance(value, str) and value.strip():
        inner, end, failed = decode(value, 0)
        value = value if failed or value[end:].strip() else inner
    if value is None or (isinstance(value, str) and not value.strip()):
        return Read(name, {}, "ok")
    if not isinstance(value, dict):
        return Read(name, {}, "invalid_arguments", f'"{key}" must be a JSON object')
    return Read(name, value, "ok")


def alternative(value: Mapping[str, Any]) -> Any:
    """Return the arguments of a server's call that stand under another key than ``arguments``; None without."""
    given = [value[k] for k in _KEYS[1:] if not _empty(value.get(k))]
    return given[0] if len(given) == 1 else None


def looks_like_call(value: Any, tools: Schemas) -> bool:
    """Say whether a JSON value that stands alone is meant as a call, and not as an answer."""
    if not isinstance(value, dict):
        return False
    inner = value.get("function")
    if isinstance(inner, dict):
        return "name" in inner
    keyed = any(k in value for k in ("arguments", "parameters"))
    name = value.get("name")
    if isinstance(name, str):
        keyed = keyed or any(isinstance(value.get(k), dict) for k in _KEYS)
        return keyed or name.strip() in tools or (not tools and set(value) <= {"name", "type"})
    return keyed and set(value) <= {"arguments", "parameters", "type", "function", "name", *_IDS}


def sane(value: Any) -> bool:
    """Say whether the value nests at most MAX_DEPTH deep and all its strings can be encoded as UTF-8."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            return False
        if isinstance(item, dict):
            stack += [(v, depth + 1) for v in item.values()] + [(k, depth) for k in item]
        elif isinstance(item, list):
            stack += [(v, depth + 1) for v in item]
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:  # a lone surrogate, written as \ud800
                return False
    return True


def _with_arguments(name: str, rest: dict[str, Any], schema: Mapping[str, Any] | None, own: str) -> Read:
    properties = {} if schema is None else schema.get("properties")
    known = None if schema is None else tuple(properties) if isinstance(properties, Mapping) else ()
    parameters = known or ()
    rest = {k: v for k, v in rest.items() if not _envelope(k, v, parameters)}
    unclear = [k for k in rest if k in _KEYS and k != own and k in parameters and _fits(rest[k], parameters)]
    if unclear and own not in rest:
        problem = f'"{unclear[0]}" may be the arguments or one of them: write them inside "{own}"'
        return Read(name, {}, "invalid_arguments", problem)
    places = [k for k in rest if k in _KEYS and (k == own or k not in parameters)]
    given = [k for k in places if not _empty(rest[k])]
    beside = {k: v for k, v in rest.items() if k not in places}
    if any(rest[k] != rest[given[0]] for k in given[1:]):
        problem = f'the arguments stand under {_listed(given)}: write them inside "{own}" alone'
        return Read(name, {}, "invalid_arguments", problem)
    if given:
        return arguments_of(name, rest[given[0]], given[0]) if not beside else _refused(name, beside, own)
    if beside and places and not all(k in parameters for k in beside):
        return _refused(name, beside, own)
    return Read(name, beside, "ok")


def _fits(value: Any, parameters: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and all(k in parameters for k in value)


def _refused(name: str, beside: Mapping[str, Any], own: str) -> Read:
    return Read(name, {}, "invalid_arguments", _beside(list(beside), own))


def _beside(keys: list[str], own: str) -> str:
    return f'{_listed(keys)} {"stands" if len(keys) == 1 else "stand"} beside "{own}": write everything inside it'


def _listed(keys: list[str]) -> str:
    shown = [json.dumps(k[:40], ensure_ascii=False) for k in keys[:8]]
    return ", ".join(shown) + (", …" if len(keys) > 8 else "")


def _envelope(key: str, value: Any, parameters: tuple[str, ...]) -> bool:
    """Say whether an entry beside the name says nothing, as the type and the id of OpenAI's calls."""
    if key in parameters:
        return False
    if key == "type":
        return value in _TYPES
    return (key in _IDS and (value is None or isinstance(value, str))) or (key == "index" and isinstance(value, int))


def _empty(value: Any) -> bool:
    return value is None or value == {} or (isinstance(value, str) and not value.strip())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate key")
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


_NAMELESS = Read("", {}, "missing_name")
# strict=False: small models write code with literal newlines inside JSON strings, and that is unambiguous.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
