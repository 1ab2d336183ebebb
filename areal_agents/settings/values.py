"""One value of a setting, as it is read from a file or a flag and shown in a message."""

from __future__ import annotations

import difflib
import tomllib
from typing import Any, Literal, get_args, get_origin

from areal_agents.settings.describe import Setting, members

Origins = dict[str, str]
"""Dotted key to where it was set: a file's path or a flag."""


def value_of(raw: str, setting: Setting) -> Any:
    """Read a value as it was typed on the command line.

    It is read as TOML. It stays text where it is no TOML, or where the setting takes text and it has no quotes. The
    word ``none`` is None where the setting accepts it.
    """
    if setting.optional and _is_none(raw):
        return None
    quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'"
    if setting.textual and not quoted:
        return raw
    text = raw.lower() if raw in ("True", "False") else raw
    try:
        # Only one value may stand here: a newline would let a second assignment in.
        value = tomllib.loads(f"value = {text}")["value"] if "\n" not in text else raw
    except tomllib.TOMLDecodeError:
        value = raw
    return none_of(value, setting)


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


def mismatch(setting: Setting, value: Any, origins: Origins) -> str:
    """Say where ``value`` was set, what was expected instead, and what it may have meant."""
    hint = ""
    choices = [c for m in members(setting.info.annotation) if get_origin(m) is Literal for c in get_args(m)]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, choices, n=1)):
        hint = f"; did you mean {near[0]!r}?"
    place = f" ({origins[setting.key]})" if setting.key in origins else ""
    return f"{setting.key} = {show(value)}{place}: expected {setting.expects}{hint}"


def show(value: Any) -> str:
    """Write ``value`` for a message, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
