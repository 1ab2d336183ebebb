"""The exact value of a tree, as a SymPy expression.

SymPy computes while it builds an expression, so everything that can grow is bounded before it is built: powers,
factorials, binomials. Nothing here simplifies, solves or parses text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import permutations
from typing import Any

import sympy  # type: ignore[import-untyped]
from sympy.core.evalf import PrecisionExhausted  # type: ignore[import-untyped]

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics.canonical import written
from areal_agents.rewards.mathematics.errors import ParseError, TooLarge
from areal_agents.rewards.mathematics.units import RADIAN

MAX_BITS = 1 << 18
"""Of one exact number."""
MAX_FACTORIAL = 5000
MAX_FACTORED = 256
"""Bits of a number under a root or a logarithm that SymPy may take apart."""
MAX_HEIGHT = 3
"""Powers above one another."""
MAX_ARGUMENTS = 16

_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infty": sympy.oo}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "arccot": sympy.acot, "asin": sympy.asin,
    "acos": sympy.acos, "atan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh, "tanh": sympy.tanh,
    "coth": sympy.coth, "arcsinh": sympy.asinh, "arccosh": sympy.acosh, "arctanh": sympy.atanh, "log": sympy.log,
    "abs": sympy.Abs, "floor": sympy.floor, "ceil": sympy.ceiling, "sqrt": sympy.sqrt, "cbrt": sympy.cbrt,
    "re": sympy.re, "im": sympy.im, "arg": sympy.arg, "sgn": sympy.sign, "sign": sympy.sign, "max": sympy.Max,
    "min": sympy.Min,
}  # fmt: skip


def value(node: t.Node) -> sympy.Expr:
    """Compute the value of one expression.

    Raises TooLarge where it cannot be computed within the limits, ParseError where it is no single value.
    """
    try:
        return _value(node)
    except (OverflowError, ValueError, RecursionError, PrecisionExhausted) as error:
        raise TooLarge(f"SymPy cannot compute it: {error}") from error


def _value(node: t.Node) -> sympy.Expr:
    match node:
        case t.Number(number):
            return sympy.Rational(number.numerator, number.denominator)
        case t.Symbol(name):
            return sympy.Symbol(name)
        case t.Constant(name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case t.Sum(terms):
            return sympy.Add(*map(_value, terms))
        case t.Product(factors):
            return _product(list(map(_value, factors)))
        case t.Quotient(above, below):
            divisor = value(below)
            if divisor == 0:
                raise ParseError("it divides by zero")
            return _product([value(above), power(divisor, sympy.Integer(-1))])
        case t.Power(base, exponent):
            return power(value(base), value(exponent))
        case t.Apply(name, args):
            return _applied(name, args)
        case t.Measure(inner, unit):
            if unit == t.PERCENT:
                return value(inner) / 100
            if unit.dimension == (("angle", 1),):
                return value(inner) * sympy.pi / 180
            if unit == RADIAN:
                return value(inner)
            return value(inner) * sympy.Symbol(f"unit {unit.dimension} {unit.factor}")
    raise ParseError(f"{written(node)[:80]} is no single value")


def bits(number: sympy.Rational) -> int:
    """Return how many bits an exact number takes."""
    return int(number.p).bit_length() + int(number.q).bit_length()


def power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """Raise ``base`` to ``exponent``, where the result has at most ``MAX_BITS``."""
    if _height(exponent) >= MAX_HEIGHT:
        raise TooLarge(f"a tower of more than {MAX_HEIGHT} powers")
    if exponent.is_Rational:
        if not exponent.is_Integer and base.is_Rational and bits(base) > MAX_FACTORED:
            return sympy.Pow(base, exponent, evaluate=False)  # else SymPy looks for factors
        size = abs(float(exponent)) if bits(exponent) < 64 else float("inf")
        if base.is_Rational and base not in (0, 1, -1) and size * bits(base) > MAX_BITS:
            raise TooLarge(f"a power has more than {MAX_BITS} bits")
        if not base.is_Rational and size > 10_000:
            raise TooLarge("an exponent is over 10,000")
        if base.is_Add and base.is_number and size > 64:  # SymPy multiplies (1 + sqrt(2))**n out
            return sympy.Pow(base, exponent, evaluate=False)
    if base == 0 and exponent.is_negative:
        raise ParseError("it divides by zero")
    if exponent.is_Rational and exponent.q > 1 and exponent.q % 2 and not base.has(sympy.I):
        return _odd_root(base, exponent)
    return sympy.Pow(base, exponent)


def _odd_root(base: sympy.Expr, exponent: sympy.Rational) -> sympy.Expr:
    """Take the real root, as schools do: the cube root of -8 is -2, and of SymPy's it is a complex number."""
    if base.is_Rational:  # SymPy's assumptions would ask whether it is prime
        return sympy.Pow(base, exponent) if base.p >= 0 else (-1) ** int(exponent.p) * sympy.Pow(-base, exponent)
    if base.is_nonnegative or (base.is_number and not base.is_extended_real):
        return sympy.Pow(base, exponent)
    if base.is_negative:
        return (-1) ** int(exponent.p) * sympy.Pow(-base, exponent)
    return sympy.sign(base) ** int(exponent.p) * sympy.Pow(sympy.Abs(base), exponent)


def _height(exponent: sympy.Expr) -> int:
    return 1 + max((_height(p.exp) for p in exponent.atoms(sympy.Pow, sympy.exp)), default=-1)


def _product(factors: list[Any]) -> sympy.Expr:
    if sum(bits(f) for f in factors if f.is_Rational) > MAX_BITS:
        raise TooLarge(f"a product has more than {MAX_BITS} bits")
    return sympy.Mul(*factors)


def _applied(name: str, args: tuple[t.Node, ...]) -> sympy.Expr:
    if name == "factorial":
        return _factorial(value(args[0]))
    if name == "factorial2":
        n = value(args[0])
        if not (n.is_Integer and 0 <= n <= MAX_FACTORIAL):
            raise TooLarge("a double factorial is compared as it is written")
        return sympy.factorial2(n)
    if name == "binomial":
        n, k = map(value, args)
        if not (n.is_Integer and k.is_Integer):
            return sympy.gamma(n + 1) / (sympy.gamma(k + 1) * sympy.gamma(n - k + 1))
        if not (0 <= k <= n <= 100_000 and min(k, n - k) <= MAX_FACTORIAL):
            raise TooLarge("a binomial coefficient is too large")
        return sympy.binomial(n, k)
    if name == "log" and len(args) == 2:
        below = _log(value(args[1]))
        if below == 0:
            raise ParseError("a logarithm has base 1")
        return _log(value(args[0])) / below
    if name == "lg":
        return _log(value(args[0])) / sympy.log(10)
    if name == "cis":
        angle = value(args[0])
        return sympy.cos(angle) + sympy.I * sympy.sin(angle)
    if name == "det" and isinstance(args[0], t.Matrix):
        return _determinant(args[0])
    if name == "exp":
        return power(sympy.E, value(args[0]))
    if name in ("gcd", "lcm"):
        numbers = [value(a) for a in args]
        if all(n.is_Integer for n in numbers):
            # SymPy's take two or more, and (154, 231) is read as one number too.
            return sympy.Integer(reduce(sympy.igcd, numbers, 0) if name == "gcd" else reduce(sympy.ilcm, numbers, 1))
    if name in _FUNCTIONS:
        found = [value(a) for a in args]
        if name not in ("max", "min") and len(found) != 1:
            raise ParseError(f"{name} takes one value, not {len(found)}")
        if len(found) > MAX_ARGUMENTS:
            raise TooLarge(f"{name} of more than {MAX_ARGUMENTS} values")
        if name == "log":
            return _log(found[0])
        return _FUNCTIONS[name](*found)
    if name in ("sum", "prod", "int", "lim", "index", "det", "dim", "deg"):
        raise TooLarge(f"{name} is compared as it is written")
    return sympy.Symbol(written(t.Apply(name, args)))  # f(x): a name


def _log(number: sympy.Expr) -> sympy.Expr:
    """Take the natural logarithm. Of a large number SymPy would look for factors."""
    return sympy.log(number, evaluate=not (number.is_Rational and bits(number) > MAX_FACTORED))


def _factorial(n: sympy.Expr) -> sympy.Expr:
    if not n.is_Integer:
        if n.is_number:
            raise TooLarge("a factorial of no whole number is compared as it is written")
        return sympy.gamma(n + 1)
    if n < 0:
        raise ParseError("a factorial of a negative number")
    if n > MAX_FACTORIAL:
        raise TooLarge(f"a factorial over {MAX_FACTORIAL}!")
    return sympy.factorial(n)


def _determinant(matrix: t.Matrix) -> sympy.Expr:
    """Expand a determinant of at most four rows."""
    rows = [[value(x) for x in row] for row in matrix.rows]
    if len(rows) != len(rows[0]) or len(rows) > 4:
        raise TooLarge("a determinant of more than four rows is compared as it is written")
    return sympy.Add(
        *(
            sympy.LeviCivita(*order) * sympy.Mul(*(rows[i][j] for i, j in enumerate(order)))
            for order in permutations(range(len(rows)))
        )
    )
