"""The parts of a written answer, as it was written: nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from areal_agents.rewards.mathematics.units import Unit


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable with its index, such as a_1."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """One of pi, e, i, infty, and a set's name (R, Z, N, Q, empty)."""

    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Quotient:
    above: Node
    below: Node


@dataclass(frozen=True, slots=True)
class Power:
    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Apply:
    """A function of arguments. Those that are not known (f, W) are names only."""

    name: str
    args: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with a unit. A percent has the unit ``%``."""

    value: Node
    unit: Unit


@dataclass(frozen=True, slots=True)
class Either:
    """Two values by ±. ``flip`` is True for ∓."""

    left: Node | None
    right: Node
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Several values between brackets. ``opened`` and ``closed`` are "" for a plain list."""

    opened: str
    items: tuple[Node, ...]
    closed: str


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain of comparisons, such as 0 < x ≤ 2 or x = 1."""

    operands: tuple[Node, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Several values with colons between, a time of day too."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class SetOp:
    """A union, intersection or difference of sets."""

    operator: str
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """Plain text."""

    text: str


Node: TypeAlias = (
    "Number | Symbol | Constant | Sum | Product | Quotient | Power | Apply | Measure | Either | Row | Matrix"
    " | Relation | Ratio | SetOp | Words"
)
PERCENT = Unit((("%", 1),))


def children(node: Node) -> tuple[Node, ...]:
    """Return the parts of a node, from left to right."""
    match node:
        case Sum(x) | Product(x) | Ratio(x) | SetOp(_, x) | Apply(_, x) | Row(_, x, _) | Relation(x, _):
            return x
        case Quotient(a, b) | Power(a, b):
            return (a, b)
        case Measure(a, _):
            return (a,)
        case Either(a, b, _):
            return (b,) if a is None else (a, b)
        case Matrix(rows):
            return tuple(x for row in rows for x in row)
    return ()


def symbols_in(node: Node) -> bool:
    """Say whether a variable or a word stands in a tree."""
    return isinstance(node, Symbol | Words) or any(map(symbols_in, children(node)))


def rebuilt(node: Node, parts: tuple[Node, ...]) -> Node:
    """Return the node with other parts, as many as ``children`` gave."""
    match node:
        case Sum():
            return Sum(parts)
        case Product():
            return Product(parts)
        case Ratio():
            return Ratio(parts)
        case SetOp(operator, _):
            return SetOp(operator, parts)
        case Apply(name, _):
            return Apply(name, parts)
        case Row(opened, _, closed):
            return Row(opened, parts, closed)
        case Relation(_, operators):
            return Relation(parts, operators)
        case Quotient():
            return Quotient(*parts)
        case Power():
            return Power(*parts)
        case Measure(_, unit):
            return Measure(parts[0], unit)
        case Either(None, _, flip):
            return Either(None, parts[0], flip)
        case Either(_, _, flip):
            return Either(parts[0], parts[1], flip)
        case Matrix(rows):
            width = len(rows[0])
            return Matrix(tuple(parts[i : i + width] for i in range(0, len(parts), width)))
    return node
