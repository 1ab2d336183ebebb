"""Settings as TOML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.describe import sections, settings


def dump(config: TrainConfig, *, leave_out: Callable[[str], object] = lambda key: None) -> str:
    """Write ``config`` as TOML that ``load`` reads back to an equal one.

    None is left out where it is the default. ``leave_out`` says of a key whether it is not written.
    """
    tree = config.model_dump(mode="python")
    lines: list[str] = []
    for section, names in sections().items():
        if section == "env" and config.mixture:
            lines += _mixture(tree["mixture"])
            continue
        names = tuple(n for n in names if not leave_out(f"{section}.{n}" if section else n))
        if section and names:
            lines += ["", f"[{section}]"]
        table: Any = tree
        for part in section.split(".") if section else ():
            table = table[part]
        tables: list[str] = []
        for name in names:
            setting = settings()[f"{section}.{name}" if section else name]
            if setting.registry is not None:
                tables += ["", f"[{setting.key}]", *(f"{k} = {_toml(v)}" for k, v in table[name].items())]
            elif table[name] is not None or setting.default is not None:
                lines.append(f"{name} = {_toml(table[name])}")
        lines += tables
    return "\n".join(lines) + "\n"


def _mixture(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the tables ``[[env]]``."""
    lines: list[str] = []
    for table in tables:
        lines += ["", "[[env]]", *(f"{name} = {_toml(value)}" for name, value in table.items())]
    return lines


def _toml(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str() | Path():
            return _quoted(str(value))
        case list() | tuple():
            return "[" + ", ".join(_toml(v) for v in value) + "]"
        case dict():
            return "{" + ", ".join(f"{_quoted(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise ConfigError(f"{value!r} of type {type(value).__name__} cannot be written as TOML")


def _quoted(text: str) -> str:
    """Write ``text`` as a TOML basic string.

    JSON's escapes are TOML's, but TOML wants the delete character escaped too.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
