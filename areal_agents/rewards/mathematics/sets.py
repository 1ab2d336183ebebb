"""Sets of real numbers as SymPy has them: intervals, unions, finite sets, and the solutions of linear inequalities."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.value import value

_NAMED = {
    "reals": sympy.S.Reals, "integers": sympy.S.Integers, "naturals": sympy.S.Naturals, "rationals": sympy.S.Rationals,
}  # fmt: skip
_OPEN = {"<", ">", "!="}


MAX_PARTS = 64
"""Elements, intervals and comparisons of one set."""


def as_set(node: t.Node) -> Any:
    """Return the set that a node is.

    Raises ParseError where it is none, or has more than ``MAX_PARTS``.
    """
    if _parts(node) > MAX_PARTS:
        raise ParseError(f"a set of more than {MAX_PARTS} parts is compared as it is written")
    return _set(node)


def _parts(node: t.Node) -> int:
    match node:
        case t.SetOp(_, items) | t.Row("" | "{", items, _):
            return sum(map(_parts, items))
        case t.Relation(operands, _):
            return len(operands) - 1
    return 1


def _set(node: t.Node) -> Any:
    match node:
        case t.SetOp(operator, (left, right)):
            a, b = _set(left), _set(right)
            return {"cup": a.union, "cap": a.intersect, "setminus": lambda x: a - x}[operator](b)
        case t.Row("{", items, "}"):
            return sympy.FiniteSet(*map(_real, items))
        case t.Row("(" | "[" as opened, (low, high), closed):
            return _interval(_real(low), _real(high), opened == "(", closed == ")")
        case t.Row("", items, ""):
            parts = [_set(item) for item in items]
            both = sympy.S.Reals.intersect(sympy.Intersection(*parts))
            return sympy.Union(*parts) if both.is_empty else both  # x < 1, x > 2 says or
        case t.Constant(name) if name in _NAMED:
            return _NAMED[name]
        case t.Relation(operands, operators):
            return _solutions(operands, operators)
    raise ParseError("it is no set")


def _real(node: t.Node) -> Any:
    found = value(node)
    if not found.is_extended_real:
        raise ParseError("a set of real numbers has real ends")
    return found


def _interval(low: Any, high: Any, left_open: bool, right_open: bool) -> Any:
    return sympy.Interval(low, high, left_open or low.is_infinite, right_open or high.is_infinite)


def _solutions(operands: tuple[t.Node, ...], operators: tuple[str, ...]) -> Any:
    """Solve a chain of comparisons that is linear in its one variable."""
    if operators == ("in",):
        return _set(operands[1])
    found: Any = sympy.S.Reals
    for left, operator, right in zip(operands, operators, operands[1:], strict=False):
        if operator not in ("<", ">", "<=", ">=", "!=", "="):
            raise ParseError("it is no inequality")
        found = found.intersect(_half_line(value(left), operator, value(right)))
    return found


def _half_line(left: Any, operator: str, right: Any) -> Any:
    for infinite in (left, right):
        if infinite in (sympy.oo, -sympy.oo):
            return sympy.S.Reals
    if isinstance(left, sympy.Abs) and right.is_positive and operator in ("<", "<=", ">", ">="):
        inside = left.args[0]
        outer = _half_line(inside, operator, right), _half_line(-inside, operator, right)
        return outer[0].intersect(outer[1]) if operator in ("<", "<=") else outer[0].union(outer[1])
    difference = left - right
    symbols = difference.free_symbols
    if len(symbols) != 1:
        raise ParseError("it has not one variable")
    (x,) = symbols
    slope = difference.diff(x)
    if slope.free_symbols or not slope.is_extended_real or slope == 0:
        raise ParseError("it is not linear")
    end = -difference.subs(x, 0) / slope
    if operator == "=":
        return sympy.FiniteSet(end)
    if operator == "!=":
        return sympy.S.Reals - sympy.FiniteSet(end)
    below = (operator in ("<", "<=")) == bool(slope > 0)
    is_open = operator in _OPEN
    return sympy.Interval(-sympy.oo, end, True, is_open) if below else sympy.Interval(end, sympy.oo, is_open, True)
