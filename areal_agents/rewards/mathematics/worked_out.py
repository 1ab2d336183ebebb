"""Say whether an answer is worked out, so that a question's own numbers with a function around them are none.

2 · 3, 2^10, gcd(4, 6) and 7 - 2⌊7/2⌋ leave something to compute with numbers. A fraction, 3 + √5, 2√2, 1.2 · 10^5 and
2 1/3 do not.
"""

from __future__ import annotations

from fractions import Fraction

from areal_agents.rewards.mathematics import tree as t

_COMPUTES = frozenset(
    {
        "floor", "ceil", "gcd", "lcm", "max", "min", "abs", "factorial", "factorial2", "binomial", "det", "sgn", "sign",
        "sum", "prod",
    }
)  # fmt: skip
"""Functions whose value is a plain number where their arguments are."""
_TEN = t.Number(Fraction(10))
_MINUS = t.Number(Fraction(-1))


def worked_out(node: t.Node) -> bool:
    """Say whether nothing is left to compute with numbers alone.

    Of an equation one side without a variable suffices.
    """
    if isinstance(node, t.Relation):
        sides = [side for side in node.operands if not t.symbols_in(side)] or list(node.operands)
        return any(map(worked_out, sides))
    if _is_mixed(node) or _is_scientific(node):
        return True
    return not _computes(node) and all(map(worked_out, t.children(node)))


def _computes(node: t.Node) -> bool:
    match node:
        case t.Sum(terms):
            return sum(map(_is_plain, terms)) > 1
        case t.Product(factors):
            return sum(_is_plain(x) for x in factors if x != _MINUS) > 1
        case t.Quotient(above, below):
            return _is_plain(node) and not (isinstance(above, t.Number) and isinstance(below, t.Number))
        case t.Power(base, exponent):
            return _is_plain(base) and isinstance(exponent, t.Number) and exponent.value.denominator == 1
        case t.Apply(name, args):
            return name in _COMPUTES and not any(map(t.symbols_in, args))
    return False


def _is_plain(node: t.Node) -> bool:
    """Say whether a node is a number or a fraction, or minus one."""
    match node:
        case t.Number():
            return True
        case t.Quotient(above, below):
            return _is_plain(above) and _is_plain(below)
        case t.Product(factors):
            return len(factors) == 2 and factors[0] == _MINUS and _is_plain(factors[1])
    return False


def _is_mixed(node: t.Node) -> bool:
    """Say whether a node is a whole number with a fraction behind it, as in 2 1/3."""
    match node:
        case t.Sum((t.Number(whole), t.Quotient(t.Number(above), t.Number(below)))):
            return whole.denominator == 1 and 0 < above < below
    return False


def _is_scientific(node: t.Node) -> bool:
    """Say whether a node is a number times a power of ten."""
    match node:
        case t.Product((t.Number(), t.Power(base, exponent))):
            return base == _TEN and isinstance(exponent, t.Number | t.Product)
    return False
