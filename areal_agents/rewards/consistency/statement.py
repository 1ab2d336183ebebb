"""The grammar of declared statements, read by a strict parser of our own. Nothing of a model's text is evaluated.

    statement   an implication, or several joined by iff (<->)
    implication a disjunction, or one that implies (->) an implication
    disjunction conjunctions joined by or
    conjunction negations joined by and
    negation    not (!) a negation, or a comparison
    comparison  a sum, or several joined by < <= > >= = !=: a < b < c says a < b and b < c
    sum         products joined by + and -
    product     factors joined by * and /, or a number before a factor: 2x; linear, with rational coefficients
    factor      a number, a name, true, false, - before a factor, or a statement in parentheses

A name is a proposition or a number, the same one everywhere. ``integer n, m`` declares that numbers are whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

MAX_CHARS = 16_000
"""Of all statements together."""
MAX_TOKENS = 2_000
MAX_DEPTH = 60
MAX_DIGITS = 60
MAX_NAMES = 64
"""In one sum."""
MAX_BITS = 1_000
"""Of a coefficient's numerator and denominator together."""
_NAME_CHARS = 64

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<name>[^\W\d]\w*)"
    r"|(?P<sign><->|<=>|->|=>|<=|>=|==|!=|&&|\|\||[-−<>=≤≥≠+*·/()¬!~∧∨&→⇒↔⇔,]))"
)
_POWER = re.compile(r"[eE][+-]?[0-9]")
_SPELT = {
    "<->": "iff", "<=>": "iff", "↔": "iff", "⇔": "iff", "->": "implies", "=>": "implies", "→": "implies",
    "⇒": "implies", "∨": "or", "||": "or", "∧": "and", "&": "and", "&&": "and", "¬": "not", "!": "not", "~": "not",
    "≤": "<=", "≥": ">=", "≠": "!=", "==": "=", "−": "-", "·": "*",
}  # fmt: skip
_WORDS = ("iff", "implies", "or", "and", "not", "true", "false", "integer")
_ENDED = ("", "end of the statement")


class StatementError(ValueError):
    """A statement that is none of the grammar."""


class TooLarge(ValueError):
    """More than the bounds allow."""


def bits_of(number: Fraction) -> int:
    """Return the bits of numerator and denominator."""
    return number.numerator.bit_length() + number.denominator.bit_length()


@dataclass(frozen=True, slots=True)
class Linear:
    """The number Σ coefficient · name + constant."""

    terms: tuple[tuple[str, Fraction], ...]
    """Sorted by name, without zeros."""
    constant: Fraction

    def plus(self, other: Linear, times: Fraction) -> Linear:
        """Return this and ``times`` the other."""
        sums = dict(self.terms)
        for name, c in other.terms:
            sums[name] = sums.get(name, Fraction(0)) + times * c
        found = Linear(tuple(sorted((n, c) for n, c in sums.items() if c)), self.constant + times * other.constant)
        numbers = [found.constant, *(c for _, c in found.terms)]
        if len(numbers) > MAX_NAMES or max(map(bits_of, numbers)) > MAX_BITS:
            raise TooLarge(f"a sum of more than {MAX_NAMES} names, or a number of more than {MAX_BITS} bits")
        return found


ZERO = Linear((), Fraction(0))


@dataclass(frozen=True, slots=True)
class Name:
    """A name that nothing around it has made a proposition or a number yet. Alone it is a proposition."""

    name: str


@dataclass(frozen=True, slots=True)
class Truth:
    value: bool


@dataclass(frozen=True, slots=True)
class Below:
    """The statement that a number is below 0."""

    number: Linear


@dataclass(frozen=True, slots=True)
class Not:
    inner: Formula


@dataclass(frozen=True, slots=True)
class Many:
    """Statements joined by one word. ``iff`` has two."""

    word: Literal["and", "or", "iff"]
    items: tuple[Formula, ...]


Formula: TypeAlias = "Name | Truth | Below | Not | Many"
Parsed: TypeAlias = "Formula | Linear"


@dataclass(frozen=True, slots=True)
class Statements:
    """Statements that were read, all of which are claimed at once."""

    formulas: tuple[Formula, ...]
    integers: frozenset[str]


def read_statements(texts: Sequence[str]) -> Statements:
    """Read statements.

    Raises StatementError for one that is none, or a name that is a proposition and a number, and TooLarge.
    """
    if sum(map(len, texts)) > MAX_CHARS:
        raise TooLarge(f"more than {MAX_CHARS} characters")
    formulas: list[Formula] = []
    integers: set[str] = set()
    kinds: dict[str, str] = {}
    room = MAX_TOKENS
    for text in texts:
        tokens = _tokens(text, room)
        room -= len(tokens)
        if tokens and tokens[0] == ("word", "integer"):
            names = _declared(tokens[1:])
            integers |= set(names)
            _note(kinds, names, "number")
            continue
        formula = _Parser(tokens).statement_alone()
        for kind, name in _names(formula):
            _note(kinds, [name], kind)
        formulas.append(formula)
    return Statements(tuple(formulas), frozenset(integers))


def _note(kinds: dict[str, str], names: Sequence[str], kind: str) -> None:
    for name in names:
        if kinds.setdefault(name, kind) != kind:
            raise StatementError(f"{name!r} is a proposition in one place and a number in another")


def _names(formula: Formula) -> list[tuple[str, str]]:
    match formula:
        case Name(name):
            return [("proposition", name)]
        case Below(number):
            return [("number", name) for name, _ in number.terms]
        case Not(inner):
            return _names(inner)
        case Many(_, items):
            return [found for item in items for found in _names(item)]
    return []


def _tokens(text: str, room: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    at, text = 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise StatementError(f"{text[at : at + 20]!r} is no part of a statement")
        at = match.end()
        kind, value = match.lastgroup or "", match[match.lastgroup or 0]
        if kind == "name":
            if len(value) > _NAME_CHARS:
                raise TooLarge(f"a name of more than {_NAME_CHARS} characters")
            if not value.isidentifier():  # x² is no name of its own
                raise StatementError(f"{value!r} is no name")
            if value.lower() in _WORDS:
                kind, value = "word", value.lower()
        elif kind == "sign":
            value = _SPELT.get(value, value)
            kind = "word" if value in _WORDS else "sign"
        elif _POWER.match(text, at):
            raise StatementError(f"{value}e… is no number here: write it out, or a space before a name")
        elif len(value) > MAX_DIGITS:
            raise TooLarge(f"a number of more than {MAX_DIGITS} digits")
        found.append((kind, value))
        if len(found) > room:
            raise TooLarge(f"more than {MAX_TOKENS} words and signs")
    return found


def _declared(tokens: Sequence[tuple[str, str]]) -> list[str]:
    names, commas = tokens[::2], tokens[1::2]
    if not all(kind == "name" for kind, _ in names) or any(t != ("sign", ",") for t in commas) or len(tokens) % 2 == 0:
        raise StatementError("a declaration reads: integer n, m")
    return [name for _, name in names]


class _Parser:
    """A recursive-descent parser of one statement, whose depth is bounded."""

    def __init__(self, tokens: Sequence[tuple[str, str]]) -> None:
        self._tokens, self._at, self._depth = tokens, 0, 0

    def statement_alone(self) -> Formula:
        """Read the whole of it."""
        found = _formula(self._statement())
        if self._at < len(self._tokens):
            raise StatementError(f"{self._tokens[self._at][1]!r} is not expected here")
        return found

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else _ENDED

    def _take(self, *values: str) -> str | None:
        """Take the next word or sign where it is one of ``values``."""
        kind, value = self._peek()
        if kind in ("word", "sign") and value in values:
            self._at += 1
            return value
        return None

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooLarge(f"nested more than {MAX_DEPTH} deep")

    def _statement(self) -> Parsed:
        left, joined = self._implication(), 0
        while self._take("iff"):
            joined += 1  # the tree gets deeper with each one
            self._deeper()
            left = Many("iff", (_formula(left), _formula(self._implication())))
        self._depth -= joined
        return left

    def _implication(self) -> Parsed:
        left = self._joined("or")
        if not self._take("implies"):
            return left
        self._deeper()
        right = self._implication()
        self._depth -= 1
        return Many("or", (Not(_formula(left)), _formula(right)))

    def _joined(self, word: Literal["or", "and"]) -> Parsed:
        items = [self._joined("and") if word == "or" else self._negation()]
        while self._take(word):
            items.append(self._joined("and") if word == "or" else self._negation())
        return items[0] if len(items) == 1 else Many(word, tuple(_formula(item) for item in items))

    def _negation(self) -> Parsed:
        if not self._take("not"):
            return self._comparison()
        self._deeper()
        inner = _formula(self._negation())
        self._depth -= 1
        return Not(inner)

    def _comparison(self) -> Parsed:
        left, found = self._sum(), list[Formula]()
        while sign := self._take("<", "<=", ">", ">=", "=", "!="):
            right = self._sum()
            found.append(_compared(_number(left), sign, _number(right)))
            left = right
        if not found:
            return left
        return found[0] if len(found) == 1 else Many("and", tuple(found))

    def _sum(self) -> Parsed:
        left = self._product()
        while sign := self._take("+", "-"):
            left = _number(left).plus(_number(self._product()), Fraction(1 if sign == "+" else -1))
        return left

    def _product(self) -> Parsed:
        if self._take("-"):  # -2x is -(2x)
            self._deeper()
            inner = _number(self._product())
            self._depth -= 1
            return ZERO.plus(inner, Fraction(-1))
        implicit = self._peek()[0] == "number"
        left = self._factor()
        while True:
            if sign := self._take("*", "/"):
                left = _scaled(_number(left), sign, _number(self._factor()))
            elif implicit and (self._peek()[0] == "name" or self._peek() == ("sign", "(")):
                left = _scaled(_number(left), "*", _number(self._factor()))
            else:
                return left
            implicit = False

    def _factor(self) -> Parsed:
        kind, value = self._peek()
        self._at += 1
        if kind == "number":
            return Linear((), Fraction(value))
        if kind == "name":
            return Name(value)
        if kind == "word" and value in ("true", "false"):
            return Truth(value == "true")
        if (kind, value) in (("sign", "-"), ("sign", "(")):
            self._deeper()
            found: Parsed
            if value == "-":
                found = ZERO.plus(_number(self._factor()), Fraction(-1))
            else:
                found = self._statement()
                if not self._take(")"):
                    raise StatementError("a parenthesis is left open")
            self._depth -= 1
            return found
        raise StatementError(f"{value!r} is not expected here")


def _formula(found: Parsed) -> Formula:
    if isinstance(found, Linear):
        raise StatementError("a number stands where a statement is expected")
    return found


def _number(found: Parsed) -> Linear:
    if isinstance(found, Name):
        return Linear(((found.name, Fraction(1)),), Fraction(0))
    if not isinstance(found, Linear):
        raise StatementError("a statement stands where a number is expected")
    return found


def _scaled(left: Linear, sign: str, right: Linear) -> Linear:
    if sign == "/":
        if right.terms or not right.constant:
            raise StatementError("a number is divided by numbers other than 0 alone")
        return ZERO.plus(left, 1 / right.constant)
    if left.terms and right.terms:
        raise StatementError("a product of two names is not linear")
    return ZERO.plus(left, right.constant) if left.terms else ZERO.plus(right, left.constant)


def _compared(left: Linear, sign: str, right: Linear) -> Formula:
    """Write a comparison with ``below 0`` alone."""
    below, above = Below(left.plus(right, Fraction(-1))), Below(right.plus(left, Fraction(-1)))
    match sign:
        case "<":
            return below
        case ">":
            return above
        case "<=":
            return Not(above)
        case ">=":
            return Not(below)
        case "=":
            return Many("and", (Not(below), Not(above)))
    return Many("or", (below, above))
