"""The parts that several commands share.

They are the error of wrong usage, variables of a chat template, and JSON for files and standard output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError


class UsageError(Exception):
    """Wrong usage that the argument parser does not see.

    The exit code is 2.
    """


def template_variables(given: Sequence[str]) -> dict[str, Any]:
    """Read the chat template's variables from texts such as ``enable_thinking=false``.

    Values are read as ``--model.template_variables.NAME VALUE`` is. Raises UsageError.
    """
    from areal_agents.settings.describe import settings
    from areal_agents.settings.values import value_of

    found: dict[str, Any] = {}
    for text in given:
        name, equals, raw = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--template-variables {text!r}: write NAME=VALUE, such as enable_thinking=false")
        found[name] = value_of(raw, settings()["model.template_variables"])
    return found


def write_json(value: Any, path: Path | None) -> None:
    """Write ``value`` as JSON to the file ``path``, or to standard output where it is None.

    Raises ArealError where the file cannot be written.
    """
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=True, allow_nan=False)
    if path is None:
        print(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ArealError(f"cannot write {path}: {error.strerror}") from error


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value
