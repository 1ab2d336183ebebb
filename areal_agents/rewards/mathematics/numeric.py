"""Whether two SymPy expressions have one value.

Rational numbers are compared exactly. Everything else is computed to ``DIGITS`` digits, with free variables at fixed
points: two different expressions of the size that an answer has agree there with a probability that no training meets
(the argument of Schwartz and Zippel). So nothing has to be simplified, and no rewriting can hang or be wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
from sympy.core.evalf import PrecisionExhausted  # type: ignore[import-untyped]

from areal_agents.rewards.mathematics.errors import TooLarge

DIGITS = 40
DEEP = 300
"""Digits after which a difference is 0."""
_POINTS = 8
_SMALL = sympy.Float(10) ** -(DIGITS - 8)


def equal_values(a: Any, b: Any) -> bool:
    """Say whether two expressions are equal wherever both have a value."""
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    seen = 0
    for point in _usual(a, b, _whole(a, b, points(symbols))) if symbols else [{}]:
        x, y = _at(a, point), _at(b, point)
        if x is None and y is None:
            continue
        if x is None or y is None or abs(x - y) > _SMALL * max(abs(x), abs(y), _SMALL):
            return False
        if not _vanishes(a - b, point):
            return False
        seen += 1
    return seen >= min(2, max(1, len(symbols) + 1))


def _usual(a: Any, b: Any, at: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Keep the points at which roots and logarithms are real: 2 ln x is ln x² although x² may come from a negative x.

    An absolute value says that negative numbers count: ln|x| is not ln x.
    """
    if (a + b).has(sympy.I, sympy.Abs):
        return at
    inside = {p.base for x in (a, b) for p in x.atoms(sympy.Pow) if not p.exp.is_Integer and p.base.free_symbols}
    inside |= {f.args[0] for x in (a, b) for f in x.atoms(sympy.log) if f.args[0].free_symbols}
    kept = [point for point in at if all(_positive(x, point) for x in inside)]
    return kept if len(kept) > 1 else at


def _whole(a: Any, b: Any, at: list[dict[Any, Any]]) -> list[dict[Any, Any]]:
    """Take whole numbers for the n of (-1)^n, which has no real value elsewhere."""
    signs = [p for x in (a, b) for p in x.atoms(sympy.Pow) if _negative(p.base) or p.base == sympy.I]
    names = sorted(set().union(*(p.exp.free_symbols for p in signs)), key=str)
    return [
        point | {name: 2 * random.Random(f"{i} {name}").randint(1, 20) + (i >> j) % 2 for j, name in enumerate(names)}
        for i, point in enumerate(at)
    ]


def _negative(base: Any) -> bool:
    """Say whether a base is negative. Of a large number SymPy's assumptions would ask whether it is prime."""
    return bool(base.p < 0 if base.is_Rational else base.is_negative)


def _positive(expression: Any, point: dict[Any, Any]) -> bool:
    found = _at(expression, point)
    return found is not None and bool(found.is_real) and bool(found > 0)


def _vanishes(difference: Any, point: dict[Any, Any]) -> bool:
    """Say whether a number is 0 to ``DEEP`` digits, as far as those before cancel out (e^200 and e^200 + 1).

    The point is put in while digits are computed. Put in before, SymPy would look for factors of its powers.
    """
    try:
        found = difference.evalf(4, subs=point, maxn=DEEP, strict=True)
    except PrecisionExhausted:  # no digit of it is known: all of them cancelled
        return True
    except (OverflowError, ValueError, RecursionError) as error:
        raise TooLarge(f"SymPy cannot compute it: {error}") from error
    return bool(found == 0)


def points(symbols: Sequence[Any], n: int = _POINTS) -> list[dict[Any, Any]]:
    """Return the points at which variables are put in: rational, of both signs, the same in every process.

    Any two variables have all four pairs of signs at some of the first six or of the last two.
    """
    out = []
    for i in range(n):
        point = {}
        for j, symbol in enumerate(symbols):
            draw = random.Random(f"{i} {symbol}")
            negative = (False, False, False, j % 2 == 0, j % 2 == 1, True, j // 2 % 2 == 0, j // 2 % 2 == 1)[i % 8]
            sign = -1 if negative else 1
            point[symbol] = sign * sympy.Rational(draw.randint(1, 10**6), draw.randint(10**5, 10**6))
        out.append(point)
    return out


def ratio(a: Any, b: Any) -> Any | None:
    """Return a/b where it is one real number other than 0 at all points, else None."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    found = None
    for point in points(symbols):
        above, below = _at(a, point), _at(b, point)
        if above is None or below is None or abs(below) < _SMALL:
            continue
        here = above / below
        if abs(sympy.im(here)) > _SMALL:
            return None
        if found is None:
            found = sympy.re(here)
        elif abs(sympy.re(here) - found) > _SMALL * abs(found):
            return None
    return found if found is not None and abs(found) > _SMALL else None


def rounded(a: Any, digits: int) -> Fraction | None:
    """Return a real number rounded half up to ``digits`` decimals, or None where it is none."""
    found = a if a.is_Rational else _at(a, {})
    if found is None or abs(sympy.im(found)) > _SMALL:
        return None
    exact = Fraction(str(sympy.re(found))) if not a.is_Rational else Fraction(int(a.p), int(a.q))
    scaled = abs(exact) * 10**digits
    whole = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator)
    return Fraction(whole if exact >= 0 else -whole, 10**digits)


def _at(expression: Any, point: dict[Any, Any]) -> Any | None:
    """Compute the expression at a point, or return None where it has no finite value there."""
    try:
        found = expression.evalf(DIGITS, subs=point, maxn=20 * DIGITS)
    except (OverflowError, ValueError, RecursionError, PrecisionExhausted) as error:
        raise TooLarge(f"SymPy cannot compute it: {error}") from error
    real, imaginary = found.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    return found
