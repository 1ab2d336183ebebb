"""Texts of somebody else's values and errors, short enough for a message and never an error themselves."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

import numpy as np

MAX_CHARS = 2_000
"""Of an error's text in a message or an event."""
_VALUE_CHARS = 120
_MAX_BITS = 4_000
"""Longer whole numbers are described. Python refuses to print those of more than 4300 digits."""


def cut(text: str, limit: int = MAX_CHARS) -> str:
    """Return ``text``, or its first ``limit`` characters and "…"."""
    return text if len(text) <= limit else text[:limit] + "…"


def short(value: object) -> str:
    """Return the start of ``value``'s text form, or its type's name where it has none."""
    try:
        return cut(_Short().repr(value), _VALUE_CHARS)
    except Exception:  # noqa: BLE001  the author's own __repr__, and only the message wants it
        return cut(f"a {type(value).__name__}", _VALUE_CHARS)


def text_of(error: BaseException) -> str:
    """Return what ``error`` says, cut at ``MAX_CHARS``."""
    try:
        return cut(str(error))
    except Exception:  # noqa: BLE001  the author's own __str__, and the error itself is what counts
        return "(its text cannot be read)"


def described(error: BaseException) -> str:
    """Return the name of the error's class and what it says."""
    return f"{cut(type(error).__name__, _VALUE_CHARS)}: {text_of(error)}"


class _Short(reprlib.Repr):
    """The standard library's limited ``repr``, which also looks into subclasses, bytes, arrays and dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _VALUE_CHARS

    def repr_int(self, x: int, level: int) -> str:
        bits = int.bit_length(x)
        return repr(x) if bits <= _MAX_BITS else f"a whole number of about {int(bits * 0.30103)} digits"

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, str):
            return self.repr_str(str.__getitem__(x, slice(_VALUE_CHARS)), level)
        if isinstance(x, bytes | bytearray | memoryview):
            return repr(bytes(x[:_VALUE_CHARS]))
        if isinstance(x, bool) or x is None:
            return repr(x)
        for base in (int, tuple, list, set, frozenset, dict):
            if isinstance(x, base):
                text: str = getattr(self, f"repr_{base.__name__}")(x, level)
                return text
        if isinstance(x, np.ndarray) and (x.size > 8 or x.dtype.kind not in "biufc"):
            return f"an array of {x.dtype} and shape {x.shape}"
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return self._dataclass(x, level)
        return repr(x)

    def _dataclass(self, x: Any, level: int) -> str:
        name = type(x).__qualname__
        if level <= 0:
            return f"{name}(…)"
        fields = (f"{f.name}={self.repr1(getattr(x, f.name), level - 1)}" for f in dataclasses.fields(x) if f.repr)
        return f"{name}({', '.join(fields)})"
