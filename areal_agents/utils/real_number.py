"""What a number is, in one place: rewards of functions, steps, turns and components, and of other processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from areal_agents.utils.short_text import described

_SYMPY_TRUTHS = ("BooleanTrue", "BooleanFalse")


LARGEST = 1e30
"""Rewards are compared, squared and summed, in float32 at last. Beyond this size no room is left for that."""


def finite(value: object) -> float:
    """Return ``value`` as a float.

    Numbers are Python's own (booleans, Decimal and Fraction among them), NumPy's scalars and 0-d arrays, 0-d tensors,
    SymPy's numbers and truth values, and whatever else has a ``__float__``. Texts, None, complex numbers and arrays
    with axes are none.

    Raises ValueError, whose text is "not a number", "not finite" or "too large" and why.
    """
    if type(value) is float and -LARGEST <= value <= LARGEST:  # nearly all of them
        return value
    try:
        number = _number(value)
    except Exception as error:  # somebody else's object, which may raise anything
        raise ValueError(f"not a number: {described(error)}") from error
    if number is None:
        raise ValueError("not a number")
    if not math.isfinite(number):
        raise ValueError("not finite")
    if abs(number) > LARGEST:
        raise ValueError(f"too large: {number:g}, and numbers of up to {LARGEST:g} in size can be compared")
    return number


def _number(value: Any) -> float | None:
    """Return ``value`` as a float, infinite where it is too large for one, or None where it is no number."""
    kind = type(value)
    if kind.__name__ in _SYMPY_TRUTHS and kind.__module__.startswith("sympy."):  # without importing SymPy
        return float(bool(value))
    if isinstance(value, str | bytes) or not hasattr(kind, "__float__"):  # float() would read a text
        return None
    if isinstance(value, np.generic | np.ndarray):
        if value.ndim or value.dtype.kind not in "biufO":  # no dates, which float() would count in days
            return None
        if value.dtype.kind == "O":
            return _number(value.item())
    if tuple(getattr(value, "shape", ())) or "complex" in str(getattr(value, "dtype", "")):
        return None
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except OverflowError:
        return math.inf
