"""Values as JSON text that reads back exactly, and text as UTF-8 that reads back exactly.

JSON lacks NaN, infinities, tuples and keys that are no strings. UTF-8 lacks lone surrogates, which a model's JSON
escapes can produce. Each gets a mark. Everything else is written as it is:

    nan, inf, -inf            {"$float": "nan"}                            a tuple   {"$tuple": [...]}
    a mapping whose keys      {"$dict": [[key, value], ...]}               a lone surrogate U+D800
    clash or are no strings                                                in text   U+FDD0 "d800"

U+FDD0 is a noncharacter that Unicode reserves for such marks. Where it stands in the text itself, it is marked too.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

MARK = "\ufdd0"
_TO_MARK = re.compile(r"[\ud800-\udfff\ufdd0]")
_MARKED = re.compile(MARK + r"([0-9a-f]{4})")
_TAGS = frozenset({"$float", "$tuple", "$dict"})


def to_utf8(text: str) -> str:
    """Replace each lone surrogate in ``text`` by U+FDD0 and its four hexadecimal digits.

    A U+FDD0 in ``text`` is replaced in the same way.
    """
    return _TO_MARK.sub(lambda found: f"{MARK}{ord(found[0]):04x}", text)


def from_utf8(text: str) -> str:
    """Undo ``to_utf8``."""
    return _MARKED.sub(lambda found: chr(int(found[1], 16)), text) if MARK in text else text


def dumps(value: Any) -> str:
    """Write a value as strict JSON, in valid UTF-8.

    Raises TypeError for a value that is neither JSON, a tuple nor a number.
    """
    return to_utf8(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def loads(text: str) -> Any:
    """Read what ``dumps`` wrote, as an equal value.

    Raises ValueError for text that it did not write.
    """
    return _exact(json.loads(from_utf8(text)))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's integers too
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    if isinstance(value, Mapping):
        if (value.keys() <= _TAGS and value) or not all(isinstance(key, str) for key in value):
            return {"$dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"$tuple": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} is no JSON value: use str, int, float, bool, None, list, tuple or dict")


def _exact(value: Any) -> Any:
    if isinstance(value, list):
        return [_exact(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, inner),) = value.items()
        if tag == "$float":
            return float(inner)
        if tag == "$tuple":
            return tuple(_exact(item) for item in inner)
        if tag == "$dict":
            return {_exact(key): _exact(item) for key, item in inner}
    return {key: _exact(item) for key, item in value.items()}
