"""Units that are written as variables: the m and s of 5 m s^{-1}, where the other answer says that they are units."""

from __future__ import annotations

from fractions import Fraction

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics import units

_SYMBOLS = {"mu": units.Unit((), Fraction(1, 10**6)), "Omega": units.find("ohm")}


def as_measure(node: t.Node) -> t.Measure | None:
    """Return a product of a value and units as a measure, or None where something else stands in it."""
    parts: list[t.Node] = []
    unit = _taken(node, 1, parts)
    if unit is None or not unit.dimension:
        return None
    return t.Measure(parts[0] if len(parts) == 1 else t.Product(tuple(parts)), unit)


def _taken(node: t.Node, power: int, parts: list[t.Node]) -> units.Unit | None:
    """Put what is no unit into ``parts``, and return the product of the units. None where a variable is none."""
    match node:
        case t.Product(factors):
            found = units.Unit(())
            for factor in factors:
                one = _taken(factor, power, parts)
                if one is None:
                    return None
                found = found.times(one)
            return found
        case t.Quotient(above, below):
            over, under = _taken(above, power, parts), _taken(below, -power, parts)
            return None if over is None or under is None else over.times(under)
        case t.Power(base, t.Number(exponent)) if exponent.denominator == 1 and abs(exponent) <= 4:
            if isinstance(base, t.Symbol | t.Words):
                return _taken(base, power * int(exponent), parts)
        case t.Symbol(name) | t.Words(name):
            unit = _SYMBOLS.get(name) or units.find(name)
            return None if unit is None else units.Unit(()).times(unit, power)
        case t.Measure(value, unit):
            parts.append(_to(value, power))
            return units.Unit(()).times(unit, power)
    if t.symbols_in(node):
        return None
    parts.append(_to(node, power))
    return units.Unit(())


def _to(node: t.Node, power: int) -> t.Node:
    return node if power == 1 else t.Power(node, t.Number(Fraction(power)))
