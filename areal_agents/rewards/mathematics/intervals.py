"""Intervals with brackets that are turned outwards: ]0, 1[ is (0, 1)."""

from __future__ import annotations

from dataclasses import replace

from areal_agents.rewards.mathematics.lexer import Token

_VALUES = {"number", "name", "unit", "text"}
_ENDS = {")", "}", "]", "infty", "pi", "!", "%", "'"}
"""What a value ends with."""


def open_intervals(tokens: list[Token]) -> list[Token]:
    """Write the brackets of ]0, 1[ and [0, 1[ as round ones.

    A ] with no value before it opens; a [ behind the second value of two closes.
    """
    out = list(tokens)
    opened: list[list[int]] = []
    """Of each bracket that is open: its place, and how many separators came since."""
    for i, token in enumerate(tokens):
        if token.kind != "op":
            continue
        before = tokens[i - 1] if i else None
        ends_value = before is not None and (
            before.kind in ("number", "name", "unit", "text")
            or before.text in (")", "}", "]", "infty", "pi", "!", "%", "'")
        )
        if token.text in (",", ";") and opened:
            opened[-1][1] += 1
        elif token.text == "[" and ends_value and opened and opened[-1][1] == 1 and tokens[opened[-1][0]].text in "[]":
            start = opened.pop()[0]
            out[i] = replace(token, text=")")
            if tokens[start].text == "]":
                out[start] = replace(tokens[start], text="(")
        elif token.text in ("(", "[") or (token.text == "]" and not ends_value):
            opened.append([i, 0])
        elif token.text in (")", "]") and opened:
            start, separators = opened.pop()
            if tokens[start].text == "]" and token.text == "]" and separators == 1:
                out[start] = replace(tokens[start], text="(")
    return out
