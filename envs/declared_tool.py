"""Tools that a benchmark declares by a JSON schema, whose arguments are converted where that loses nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from areal_agents.tool import ToolSpec
from areal_agents.utils.short_text import short

_JSON_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


@dataclass(frozen=True)
class DeclaredTool(ToolSpec):
    """A tool whose function gets all arguments as one dictionary, ``arguments``.

    Names are checked as declared. A value of another type is converted where it says the same (``"3"`` → ``3``, a list
    that is written as text). A text, a number or a truth value that cannot be converted is passed on as it is, where
    the declared type is one of these: the benchmark's own function answers it, as it does on the leaderboard.
    """

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any] | str:
        declared: Mapping[str, Any] = self.parameters.get("properties", {})
        known = {name: converted(arguments[name], declared[name]) for name in arguments if name in declared}
        problems = [
            *(f"{name!r} is not a parameter" for name in arguments if name not in declared),
            *(f"{name!r} is missing" for name in self.parameters.get("required", ()) if name not in arguments),
            *(f"{name!r}: {short(value)} is no {declared[name]['type']}"
              for name, value in known.items() if not _passes(value, declared[name])),
        ]  # fmt: skip
        if problems:
            return f"invalid arguments for {self.name!r}: {problems[0]}. Expected: {self.signature()}"
        return {"arguments": known}


def converted(value: Any, schema: Mapping[str, Any]) -> Any:
    """Return ``value`` as the type of its schema, where it says the same, else as it is."""
    kind = str(schema.get("type"))
    if kind not in _JSON_TYPES or _is(value, kind):
        return value
    read = value
    if isinstance(value, str):
        try:
            read = json.loads(value.lower() if kind == "boolean" else value)
        except (ValueError, RecursionError):
            return value
    if isinstance(read, float) and not math.isfinite(read):  # JSON has no such number
        return value
    if isinstance(read, float) and kind == "integer" and read == int(read):
        read = int(read)
    return read if _is(read, kind) else value


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _JSON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _passes(value: Any, schema: Mapping[str, Any]) -> bool:
    """Say whether a value may be passed on: it is of its type, or both are a text, a number or a truth value."""
    kind = str(schema.get("type"))
    nested = kind in ("array", "object") or isinstance(value, list | dict)
    return kind not in _JSON_TYPES or not nested or _is(value, kind)
