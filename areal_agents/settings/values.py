"""One value of a setting, as it is read from a file or a flag and shown in a message."""

from __future__ import annotations

import contextlib
import difflib
import json
import tomllib
from typing import Any, Literal, get_args, get_origin

from areal_agents.settings.describe import Setting, members

Origins = dict[str, str]
"""Dotted key to where it was set: a file's path or a flag."""


def value_of(raw: str, setting: Setting) -> Any:
    """Read a value as it was typed on the command line.

    It is read as TOML, and a table or a list as JSON too. It stays text where it is neither, or where the setting takes
    text and it has no quotes. The word ``none`` is None where the setting accepts it.
    """
    if setting.optional and _is_none(raw):
        return None
    quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'"
    if setting.textual and not quoted:
        return raw
    text = raw.lower() if raw in ("True", "False") else raw
    return none_of(_parsed(text, raw), setting)


def table_of(raw: str) -> dict[str, Any] | None:
    """Read a table as it was typed, as TOML or JSON. None where it is none."""
    value = _parsed(raw, raw)
    return _none_inside(value) if isinstance(value, dict) else None


def _parsed(text: str, otherwise: str) -> Any:
    # One value alone may stand here: in TOML a newline would let a second assignment in.
    if "\n" not in text:
        with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
            return tomllib.loads(f"value = {text}")["value"]
    if text.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number)
    return otherwise


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of the entries of a JSON object. Raises ValueError where two have one name, as TOML does."""
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("two entries have one name")
    return table


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def none_of(value: Any, setting: Setting) -> Any:
    """Replace the word ``none`` by None where the setting accepts it."""
    if setting.free:
        return _none_inside(value)
    return None if setting.optional and _is_none(value) else value


def _none_inside(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _none_inside(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_none_inside(v) for v in value]
    return None if _is_none(value) else value


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "none"


def how_to_write(setting: Setting) -> str:
    """Return the ways to write a table on the command line, to end a message with, or nothing for another setting."""
    if not setting.free:
        return ""
    flag = f"--{setting.key}"
    return f"; write {flag} '{{\"NAME\": 2}}' (JSON), {flag} '{{NAME = 2}}' (TOML), or {flag}.NAME 2"


def mismatch(setting: Setting, value: Any, origins: Origins) -> str:
    """Say where ``value`` was set, what was expected instead, and what it may have meant."""
    hint = ""
    choices = [c for m in members(setting.info.annotation) if get_origin(m) is Literal for c in get_args(m)]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, choices, n=1)):
        hint = f"; did you mean {near[0]!r}?"
    if setting.free and not isinstance(value, dict):
        hint = how_to_write(setting)
    place = f" ({origins[setting.key]})" if setting.key in origins else ""
    return f"{setting.key} = {show(value)}{place}: expected {setting.expects}{hint}"


def show(value: Any) -> str:
    """Write ``value`` for a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
