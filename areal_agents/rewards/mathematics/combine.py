"""Larger trees of smaller ones: products, signs, degrees, numbers of a base, matrices times a number."""

from __future__ import annotations

from fractions import Fraction

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics import units
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.lexer import Token
from areal_agents.rewards.mathematics.notation import FRACTIONS, INEQUALITIES

BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
         "twelve": 12, "sixteen": 16}  # fmt: skip


def is_fraction_command(token: Token) -> bool:
    return token.kind == "command" and token.text in FRACTIONS


def proper(node: t.Node) -> bool:
    """Whether a fraction can be the end of a mixed number: 0 < a/b < 1 in whole numbers."""
    match node:
        case t.Quotient(t.Number(above), t.Number(below)):
            return above.denominator == below.denominator == 1 and 0 < above < below
    return False


def negative(node: t.Node) -> t.Node:
    if isinstance(node, t.Number):
        return t.Number(-node.value)
    if isinstance(node, t.Measure):
        return t.Measure(negative(node.value), node.unit)
    if isinstance(node, t.Sum):
        return t.Sum(tuple(negative(x) for x in node.terms))
    return product(t.Number(Fraction(-1)), node)


def product(left: t.Node, right: t.Node) -> t.Node:
    for matrix, factor in ((left, right), (right, left)):
        if isinstance(matrix, t.Matrix) and isinstance(factor, t.Number | t.Quotient | t.Symbol | t.Power | t.Product):
            return t.rebuilt(matrix, tuple(product(factor, x) for x in t.children(matrix)))
    if isinstance(right, t.Measure) and not isinstance(left, t.Measure):
        return t.Measure(product(left, right.value), right.unit)
    before = left.factors if isinstance(left, t.Product) else (left,)
    after = right.factors if isinstance(right, t.Product) else (right,)
    return t.Product((*before, *after))


MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def counted(left: t.Node, text: str) -> t.Node:
    """Return 4 apples, or 3 million dollars."""
    first, _, rest = text.lower().partition(" ")
    if first not in MULTIPLES:
        return t.Measure(left, units.find(text) or units.Unit(((text.lower(), 1),)))
    if isinstance(left, t.Measure):
        return t.Measure(product(left.value, t.Number(Fraction(MULTIPLES[first]))), left.unit)
    found = product(left, t.Number(Fraction(MULTIPLES[first])))
    return counted(found, rest) if rest else found


def together(left: t.Measure, right: t.Node) -> t.Node | None:
    """Add 5 ft and 3 in, 2 hours and 30 minutes. None where the second is no smaller unit of the same kind."""
    if not isinstance(right, t.Measure) or left.unit.dimension != right.unit.dimension:
        return None
    if not right.unit.factor < left.unit.factor:
        return None
    share = t.Number(right.unit.factor / left.unit.factor)
    return t.Measure(t.Sum((left.value, t.Product((share, right.value)))), left.unit)


def said_of_elements(items: list[t.Node]) -> t.Node | None:
    """Return the condition of {x : x > 3}, which the grammar has read as a ratio within a comparison."""
    first = items[0] if items else None
    if not isinstance(first, t.Relation):
        return None
    for i, operand in enumerate(first.operands[:-1]):
        if isinstance(operand, t.Ratio) and len(operand.items) == 2:
            condition = t.Relation((operand.items[1], *first.operands[i + 1 :]), first.operators[i:])
            return condition if len(items) == 1 else t.Row("", (condition, *items[1:]), "")
    return None


def listed(items: list[t.Node], either: bool) -> t.Node:
    """Return one value, or several: x < 1 or x > 2 is a union."""
    if len(items) == 1:
        return items[0]
    if either and all(isinstance(x, t.Relation | t.SetOp) for x in items) and any(map(_is_inequality, items)):
        found = items[0]
        for x in items[1:]:
            found = t.SetOp("cup", (found, x))
        return found
    return t.Row("", tuple(items), "")


def _is_inequality(node: t.Node) -> bool:
    return isinstance(node, t.Relation) and bool(INEQUALITIES & set(node.operators))


def sum_of(terms: list[t.Node]) -> t.Node:
    matrices = [x for x in terms if isinstance(x, t.Matrix)]
    if len(matrices) == len(terms) > 1 and len({tuple(map(len, x.rows)) for x in matrices}) == 1:
        cells = zip(*(t.children(x) for x in matrices), strict=True)
        return t.rebuilt(matrices[0], tuple(t.Sum(cell) for cell in cells))
    return terms[0] if len(terms) == 1 else t.Sum(tuple(terms))


def degrees(node: t.Node) -> t.Node:
    unit = units.find("degree")
    assert unit is not None
    return t.Measure(node, unit)


def in_base(digits: str, base: int) -> t.Node:
    whole, _, decimals = digits.partition(".")
    if not 2 <= base <= 36 or not (whole + decimals).isalnum():
        raise ParseError(f"{digits}_{base} is no number of a base")
    try:
        return t.Number(Fraction(int(whole + decimals, base), base ** len(decimals)))
    except ValueError as error:
        raise ParseError(f"{digits} is no number of base {base}") from error
