"""Typed values of formats that write every argument as text, read by the tool's JSON schema.

A value that does not fit its schema stays text, and the tool's own check says so. A parameter that is a string keeps
what looks like a number: a phone number is not one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from areal_agents.chat.tool_formats.json_calls import decode
from areal_agents.chat.tool_formats.literals import literal

_WORDS = {"true": True, "false": False}
_NULLS = ("null", "none")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_MAX_NUMBER = 400
_MAX_SCHEMA_DEPTH = 16


def typed(values: Mapping[str, str], schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments whose texts are ``values``.

    ``schema`` is the JSON schema of the whole arguments. Without one everything is text.
    """
    if schema is None:
        return dict(values)
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    extra = schema.get("additionalProperties")
    return {
        name: _typed(text, list(_alternatives(properties.get(name, extra), schema, 0))) for name, text in values.items()
    }


def _typed(text: str, alternatives: list[Mapping[str, Any]]) -> Any:
    """Return the first reading of ``text`` that fits an alternative, where text itself is the last one."""
    for one in alternatives:
        for allowed in _choices(one):
            if allowed == text:
                return text
    for one in alternatives:
        fits, value = _as(text, one)
        if fits:
            return value
    return text


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    allowed = schema.get("enum")
    out = list(allowed) if isinstance(allowed, list | tuple) else []
    return [*out, schema["const"]] if "const" in schema else out


def _as(text: str, schema: Mapping[str, Any]) -> tuple[bool, Any]:
    bare = text.strip()
    allowed = _choices(schema)
    kinds = schema.get("type")
    if kinds is None and allowed:
        value = _plain(bare)
        return any(type(value) is type(a) and value == a for a in allowed), value
    named = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list | tuple) else []
    readers = [_READERS[k] for k in named if isinstance(k, str) and k in _READERS]
    for read in readers:
        fits, value = read(bare)
        if fits and (not allowed or value in allowed):
            return True, value
    return False, None


def _plain(text: str) -> Any:
    for read in (_null, _boolean, _integer, _number):
        fits, value = read(text)
        if fits:
            return value
    return text


def _null(text: str) -> tuple[bool, Any]:
    return text.lower() in _NULLS, None


def _boolean(text: str) -> tuple[bool, Any]:
    return text.lower() in _WORDS, _WORDS.get(text.lower())


def _number(text: str) -> tuple[bool, Any]:
    if len(text) > _MAX_NUMBER or not _NUMBER.fullmatch(text):
        return False, None
    value, _, failed = decode(text, 0)
    return not failed, value


def _integer(text: str) -> tuple[bool, Any]:
    fits, value = _number(text)
    if fits and isinstance(value, float):
        return value.is_integer() and abs(value) < 2**53, int(value)
    return fits, value


def _array(text: str) -> tuple[bool, Any]:
    return _container(text, list)


def _object(text: str) -> tuple[bool, Any]:
    return _container(text, dict)


def _container(text: str, kind: type) -> tuple[bool, Any]:
    value, end, failed = decode(text, 0)
    if failed or text[end:].strip():
        value = literal(text)  # some models write Python's own notation
    return isinstance(value, kind), value


_READERS = {
    "null": _null,
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "array": _array,
    "object": _object,
}


def _alternatives(schema: Any, root: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield the plain schemas that a value may fit, with references resolved."""
    if not isinstance(schema, Mapping) or depth > _MAX_SCHEMA_DEPTH:
        return
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        yield from _alternatives(target, root, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        several = schema.get(key)
        for one in several if isinstance(several, list | tuple) else ():
            yield from _alternatives(one, root, depth + 1)
    if any(k in schema for k in ("type", "enum", "const")):
        yield schema
