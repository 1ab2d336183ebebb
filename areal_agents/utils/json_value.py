"""The copy of a value that somebody else's code made, as JSON would give it back."""

from __future__ import annotations

import json
from typing import Any, Final

from areal_agents.utils.short_text import described

MAX_JSON_CHARS: Final = 1 << 20


def json_copy(value: object) -> Any:
    """Return ``value`` with lists for tuples, texts for keys and Python's numbers for NumPy's.

    Raises ValueError for what JSON lacks (NaN among it), and for more than ``MAX_JSON_CHARS`` characters.
    """
    try:
        text = json.dumps(value, allow_nan=False, default=_number)
        if len(text) <= MAX_JSON_CHARS:
            return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"which is not JSON: {described(error)}") from error
    raise ValueError(f"which has {len(text)} characters as JSON, more than {MAX_JSON_CHARS}")


def _number(value: object) -> object:
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()  # type: ignore[attr-defined]
    raise TypeError(f"a {type(value).__name__} is in it")
