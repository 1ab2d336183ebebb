"""Whether two written answers are equal: the same in both directions, whichever is the gold one.

text ─▶ readings (1,234 is a number, or a list) ─▶ equal spelling? ─▶ equal lists, sets, relations, values?
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from areal_agents.rewards.mathematics import numeric, units
from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics.canonical import words, written
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.lexer import MAX_CHARS, Commas, is_prose
from areal_agents.rewards.mathematics.measures import as_measure
from areal_agents.rewards.mathematics.notation import INEQUALITIES
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.parser import parse
from areal_agents.rewards.mathematics.sets import as_set
from areal_agents.rewards.mathematics.spellings import others
from areal_agents.rewards.mathematics.value import value

MAX_ITEMS = 64
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_GROUPED = re.compile(r"(?<![A-Za-z])(?:[(\[]|\\\{)\s*[-+]?\d{1,3}(?:,\d{3})+\s*(?:\\right|[)\]]|\\\})")
"""(1,200) is a pair, and no number."""
_LOG = re.compile(r"\\log(?![A-Za-z])(?!\s*_)|(?<![A-Za-z\\])log(?=[\s(])")
"""A logarithm without a base, which is natural to some and to the base 10 to others."""
_LEAD = re.compile(
    r"\s*(?:\\text\s*\{\s*)?(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*:)|exactly\b|approximately\b|about\b)"
    r"[\s:]*\}?\s*(?=\S)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?=.{0,64}[A-Za-z]{3})(?:\\text\s*\{)?[A-Za-z0-9\s',.:-]{4,200}\}?")
_MEANINGS: dict[str, t.Node] = {
    **{word: t.Number(Fraction(i)) for i, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"])},
    **dict.fromkeys(("all real numbers", "all reals", "the real numbers"), t.Constant("reals")),
    **dict.fromkeys(("the empty set", "empty set", "no solution", "no solutions"), t.Row("{", (), "}")),
}  # fmt: skip
_EQUALS = {"=", "~", "->", "=="}


def readings(text: str, options: Options) -> list[t.Node]:
    """Read an answer in each way that its commas allow.

    Raises ParseError where there is none.
    """
    if len(text) > MAX_CHARS:
        raise ParseError(f"the answer has {len(text)} characters, at most {MAX_CHARS} are read")
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    if is_prose(text) or words(text) in _MEANINGS:
        same = _MEANINGS.get(words(text))
        return [t.Words(text)] if same is None else [t.Words(text), same]
    if re.fullmatch(r"\s*\d{4}-\d\d-\d\d\s*", text):
        return [t.Words(text)]  # a date, and no difference
    commas: list[Commas] = ["thousands"]
    if re.search(r"\d,\d{3}", text):
        commas = ["list"] if _GROUPED.search(text) else [*commas, "list"]
    if options.decimal_comma or re.fullmatch(r"[\s$+-]*\d+,(?:\d{1,2}|\d{4,})[\s$]*", text):
        commas.append("decimal")
    found: list[t.Node] = []
    first: ParseError | None = None
    spelt = [text, _LOG.sub(r"\\lg ", text)] if _LOG.search(text) else [text]
    spelt += others(text)
    for one, spelling in ((one, spelling) for one in commas for spelling in spelt):
        try:
            node = _either(parse(spelling, one))
        except ParseError as error:
            first = first or error
            continue
        if node not in found:
            found.append(node)
    if not found and _SENTENCE.fullmatch(text):
        return [t.Words(text)]  # \text{January 3}
    if not found:
        assert first is not None
        raise first
    return [*found, *(_MEANINGS[words(x.text)] for x in found if isinstance(x, t.Words) and words(x.text) in _MEANINGS)]


def equal_nodes(gold: t.Node, answer: t.Node, options: Options) -> bool:
    """Say whether two trees are one answer."""
    return _Comparison(options).equal(gold, answer)


class _Comparison:
    def __init__(self, options: Options) -> None:
        self._options = options

    def equal(self, a: t.Node, b: t.Node) -> bool:
        if written(a) == written(b):
            return True
        if isinstance(a, t.Words) or isinstance(b, t.Words):
            return _as_words(a) == _as_words(b) != ""
        rules: tuple[tuple[type, Callable[[Any, t.Node], bool]], ...] = (
            (t.Relation, self._relation),
            (t.Row, self._row),
            (t.SetOp, self._sets),
            (t.Matrix, self._matrix),
            (t.Ratio, self._ratio),
            (t.Measure, self._measure),
        )
        for kind, rule in rules:
            if isinstance(a, kind):
                return rule(a, b)
            if isinstance(b, kind):
                return rule(b, a)
        return self._values(a, b)

    # ── relations ────────────────────────────────────────────────────────────────────────────────────────────────

    def _relation(self, a: t.Relation, b: t.Node) -> bool:
        if isinstance(b, t.Relation):
            if self._same_relation(a, b):
                return True
            left, right = named(a), named(b)
            if left is None or right is None:
                return self._options.intervals and self._sets(a, b)
            said = _with_arguments_of(left[0], right[0], right[1])
            return _same_name(left[0], right[0]) and self.equal(left[1], said)
        if (
            set(a.operators) == {"="} and not _variables(a) and named(a) is None
        ):  # 2^4 = 16 is 16, and 2^4 = 15 is nothing
            return all(self.equal(x, b) for x in a.operands)
        if a.operators == ("mod",):
            return self.equal(a.operands[0], b)
        found = named(a) if self._options.names else None
        if found is not None:
            return self.equal(found[1], b)
        return self._options.intervals and isinstance(b, t.Row | t.SetOp | t.Constant) and self._sets(a, b)

    def _same_relation(self, a: t.Relation, b: t.Relation) -> bool:
        if len(a.operands) != len(b.operands):
            return False
        for operands, operators in ((b.operands, b.operators), _turned(b)):
            if operators == a.operators and all(
                self.equal(x, y) for x, y in zip(a.operands, operands, strict=True)
            ):  # fmt: skip
                return True
        if len(a.operands) != 2 or not {*a.operators, *b.operators} <= set(_FLIPPED):
            return False
        try:
            mine, other = (value(r.operands[0]) - value(r.operands[1]) for r in (a, b))
            factor = numeric.ratio(mine, other)
        except ParseError:
            return False
        if factor is None or not (mine.free_symbols and other.free_symbols):
            return False
        operator = b.operators[0] if factor > 0 else _FLIPPED[b.operators[0]]
        return a.operators[0] == operator

    # ── several values ───────────────────────────────────────────────────────────────────────────────────────────

    def _row(self, a: t.Row, b: t.Node) -> bool:
        if isinstance(b, t.Matrix):
            return (
                a.opened in ("(", "[") and 1 in (len(b.rows), len(b.rows[0])) and self._in_order(a.items, t.children(b))
            )
        if not isinstance(b, t.Row):
            if isinstance(b, t.SetOp | t.Constant):
                return self._sets(a, b)
            return a.opened == "{" and len(a.items) == 1 and self.equal(a.items[0], b)
        if max(len(a.items), len(b.items)) > MAX_ITEMS:
            return False  # their spellings differ
        shapes = {a.opened, b.opened}
        if shapes <= {"", "{"}:
            if self._options.ordered and shapes == {""}:
                return self._in_order(a.items, b.items)
            single = not any(isinstance(x, t.Row | t.Relation) for x in (*a.items, *b.items))
            if shapes == {""} and single:  # the prime factors 2, 2, 5 are not 2, 5; solutions said twice count once
                return self._as_often(a.items, b.items)
            return self._in_any_order(a.items, b.items)
        if "" in shapes and len(shapes) > 1 and any(_is_condition(x) for x in (a, b)):
            return self._options.intervals and self._sets(a, b)
        if "{" in shapes or ("" not in shapes and (a.opened, a.closed) != (b.opened, b.closed)):
            return False
        return self._in_order(a.items, b.items)

    def _in_order(self, a: Sequence[t.Node], b: Sequence[t.Node]) -> bool:
        return len(a) == len(b) and all(self.equal(x, y) for x, y in zip(a, b, strict=True))

    def _in_any_order(self, a: Sequence[t.Node], b: Sequence[t.Node]) -> bool:
        """Say whether each value of one row is in the other. What is said twice counts once."""
        left, right = ({written(x): x for x in row}.values() for row in (a, b))
        return all(any(self.equal(x, y) for y in right) for x in left) and all(
            any(self.equal(x, y) for x in left) for y in right
        )

    def _as_often(self, a: Sequence[t.Node], b: Sequence[t.Node]) -> bool:
        """Say whether each value is as often in one row as in the other."""
        left = list(b)
        for x in a:
            match = next((i for i, y in enumerate(left) if self.equal(x, y)), None)
            if match is None:
                return False
            del left[match]
        return not left

    def _matrix(self, a: t.Matrix, b: t.Node) -> bool:
        return (
            isinstance(b, t.Matrix)
            and [len(r) for r in a.rows] == [len(r) for r in b.rows]
            and self._in_order(t.children(a), t.children(b))
        )

    def _ratio(self, a: t.Ratio, b: t.Node) -> bool:
        if isinstance(b, t.Ratio):
            if self._in_order(a.items, b.items):
                return True
            if len(a.items) != len(b.items) or any(_zero_padded(x) for x in (a, b)):
                return False
            return all(
                self._values(t.Product((a.items[0], y)), t.Product((b.items[0], x)))
                for x, y in zip(a.items[1:], b.items[1:], strict=True)
            )
        return len(a.items) == 2 and self._values(t.Quotient(*a.items), b)

    def _sets(self, a: t.Node, b: t.Node) -> bool:
        if len(_variables(a) | _variables(b)) > 1:  # x > 2 is not y > 2
            return False
        try:
            mine, other = as_set(a), as_set(b)
        except ParseError:
            return False
        return bool(mine == other or (mine.symmetric_difference(other)).is_empty)

    # ── single values ────────────────────────────────────────────────────────────────────────────────────────────

    def _measure(self, a: t.Measure, b: t.Node) -> bool:
        if isinstance(b, t.Measure):
            if {a.unit, b.unit} == {units.RADIAN, units.DEGREE}:
                return self._values(a, b)
            if a.unit.dimension != b.unit.dimension:
                return False
            return self._values(_scaled(a), _scaled(b))
        if a.unit == t.PERCENT:
            return self._values(a, b)
        written_as_variables = as_measure(b)
        if written_as_variables is not None and self._measure(a, written_as_variables):
            return True
        if self._options.units and a.unit != units.RADIAN:
            return False
        return self.equal(a.value, b) or (a.unit.dimension == (("angle", 1),) and self._values(a, b))

    def _values(self, a: t.Node, b: t.Node) -> bool:
        """Compare two values. Those that are too large to compute are compared by their spelling, which differs."""
        try:
            x, y = value(a), value(b)
            return numeric.equal_values(x, y) or self._near(x, y)
        except ParseError:
            return False

    def _near(self, gold: Any, answer: Any) -> bool:
        o = self._options
        if o.precision is not None:
            left, right = numeric.rounded(gold, o.precision), numeric.rounded(answer, o.precision)
            if left is not None and left == right:
                return True
        if o.tolerance or o.relative:
            left, right = numeric.rounded(gold, 30), numeric.rounded(answer, 30)
            if left is not None and right is not None:
                return abs(left - right) <= max(Fraction(o.tolerance), Fraction(o.relative) * abs(left))
        return False


def named(node: t.Relation) -> tuple[t.Node, t.Node] | None:
    """Return the name and the value of x = 5, f(x) = 5, x ≈ 5, x ∈ S and of a chain that ends so, else None."""
    if node.operators == ("in",) and _is_name(node.operands[0]):
        return node.operands[0], node.operands[1]
    if not set(node.operators) <= _EQUALS:
        return None
    ends = next((i for i, op in enumerate(node.operators) if op == "~" and i), len(node.operators))
    operands = node.operands[: ends + 1]
    name = next((x for x in operands[:-1] if _is_name(x)), None)
    if name is not None:
        return name, operands[-1]
    if _is_name(operands[-1]) and len(operands) == 2:
        return operands[-1], operands[0]
    return None


def _is_name(node: t.Node) -> bool:
    match node:
        case t.Symbol():
            return True
        case t.Apply(name, args):
            return (
                (len(name) == 1 and name.isalpha())
                or "_" in name
                or (name in ("abs", "index") and all(map(_is_name, args)))
            )
        case t.Product(parts) | t.Ratio(parts) | t.Row("(" | "", parts, _):
            return all(map(_is_name, parts)) and bool(parts)
        case t.Quotient(above, below):
            return _is_name(above) and _is_name(below)
    return False


def _variables(node: t.Node) -> set[str]:
    """Return the variables of an inequality or a set."""
    if isinstance(node, t.Symbol):
        return {node.name}
    return {name for x in t.children(node) for name in _variables(x)}


def _is_condition(node: t.Row) -> bool:
    """Whether a list says x > 1, x < 2."""
    return all(isinstance(x, t.Relation) and set(x.operators) <= INEQUALITIES for x in node.items)


def _with_arguments_of(wanted: t.Node, name: t.Node, node: t.Node) -> t.Node:
    """Write t² as x², where one answer says f(x) and the other one f(t)."""
    if not isinstance(wanted, t.Apply) or not isinstance(name, t.Apply) or len(wanted.args) != len(name.args):
        return node
    if not all(isinstance(x, t.Symbol) for x in (*wanted.args, *name.args)):
        return node
    pairs = list(zip(name.args, wanted.args, strict=True))
    return _put_in(node, dict([(y, x) for x, y in pairs] + pairs))


def _put_in(node: t.Node, given: dict[t.Node, t.Node]) -> t.Node:
    if isinstance(node, t.Symbol):
        return given.get(node, node)
    return t.rebuilt(node, tuple(_put_in(x, given) for x in t.children(node)))


def _same_name(a: t.Node, b: t.Node) -> bool:
    if isinstance(a, t.Apply) and isinstance(b, t.Apply):
        return a.name == b.name
    return written(a) == written(b)


def _turned(node: t.Relation) -> tuple[tuple[t.Node, ...], tuple[str, ...]]:
    return node.operands[::-1], tuple(_FLIPPED.get(op, f"not {op}") for op in node.operators[::-1])


def _either(node: t.Node) -> t.Node:
    """Write x = 2 ± 1 as x = 2 + 1, x = 2 - 1."""
    if not _has_either(node):
        return node
    if isinstance(node, t.Row) and node.opened in ("", "{"):
        return t.Row(node.opened, tuple(y for x in node.items for y in _both(x)), node.closed)
    both = _both(node)
    return t.Row("", tuple(both), "")


def _both(node: t.Node) -> tuple[t.Node, ...]:
    return tuple(_chosen(node, sign) for sign in (1, -1)) if _has_either(node) else (node,)


def _has_either(node: t.Node) -> bool:
    return isinstance(node, t.Either) or any(map(_has_either, t.children(node)))


def _chosen(node: t.Node, sign: int) -> t.Node:
    found = t.rebuilt(node, tuple(_chosen(x, sign) for x in t.children(node)))
    if isinstance(found, t.Either):
        plus = (sign > 0) != found.flip
        right = found.right if plus else t.Product((t.Number(Fraction(-1)), found.right))
        return right if found.left is None else t.Sum((found.left, right))
    return found


def _as_words(node: t.Node) -> str:
    """Spell a short product of letters as the word that it may be."""
    match node:
        case t.Words(text):
            return words(text)
        case t.Symbol(name) | t.Constant(name):
            return name.lower()
        case t.Product(parts) if all(isinstance(x, t.Symbol | t.Constant) for x in parts):
            return "".join(map(_as_words, parts))
        case t.Row(_, items, _):
            return ", ".join(map(_as_words, items))
    return ""


def _zero_padded(node: t.Ratio) -> bool:
    """Whether a ratio has a zero, as 12:00 has, so that it is a time rather than a ratio."""
    return any(isinstance(x, t.Number) and x.value == 0 for x in node.items)


def _scaled(node: t.Measure) -> t.Node:
    return t.Product((t.Number(node.unit.factor), node.value))
