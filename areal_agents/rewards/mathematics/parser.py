"""The grammar of written answers, from tokens to a tree.

    answer    = relation {("," | ";" | and | or) relation}
    relation  = ratio {("=" | "<" | "≤" | "∈" | …) ratio}
    ratio     = sets {":" sets}
    sets      = sum {(∪ | ∩ | \\) sum}
    sum       = term {("+" | "-" | ±) term}
    term      = factor {[* | /] factor}              a missing sign multiplies: 2x, and 2 1/3 is a mixed number
    factor    = atom {"^" exponent | "!" | "%" | "°" | unit | index}

It reads what competition and school mathematics write, and refuses the rest with a ParseError. It computes nothing,
looks at each token a bounded number of times, and nests at most ``MAX_DEPTH`` deep.
"""

from __future__ import annotations

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics.atoms import AtomReader
from areal_agents.rewards.mathematics.combine import (
    counted,
    is_fraction_command,
    listed,
    negative,
    product,
    proper,
    sum_of,
    together,
)
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.intervals import open_intervals
from areal_agents.rewards.mathematics.lexer import Commas, Lexer, Token
from areal_agents.rewards.mathematics.notation import OVER, RELATIONS, SEPARATORS, SETS, TIMES


def parse(text: str, commas: Commas = "thousands") -> t.Node:
    """Read one answer.

    Raises ParseError where it is none that the grammar reads.
    """
    return _Parser(open_intervals(Lexer(text, commas).tokens)).answer()


class _Parser(AtomReader):
    """The upper half of the grammar."""

    # ── rows and relations ───────────────────────────────────────────────────────────────────────────────────────

    def answer(self) -> t.Node:
        _ = self._op("=") or self._cmd("approx")
        either = any(x.kind == "command" and x.text in ("lor", "vee") for x in self._tokens)
        items = self._items()
        self._op(".")
        if self._now.kind != "end":
            raise ParseError(f"{self._now.text!r} is not expected")
        if not items:
            raise ParseError("the answer is empty")
        return listed(items, either)

    def _items(self) -> list[t.Node]:
        items: list[t.Node] = []
        while True:
            while self._is(*SEPARATORS):
                self._at += 1
            if self._ends():
                return items
            items.append(self._nested(self._relation))
            if not self._is(*SEPARATORS):
                return items

    def _ends(self) -> bool:
        if self._is("|"):
            return self._bars > 0
        return self._now.kind == "end" or self._is(")", "]", "}", "end", "rangle", "rbrack", "rbrace", ".", "mid")

    def _relation(self) -> t.Node:
        operands, operators = [self._ratio()], []
        while True:
            if self._now.text in RELATIONS and self._now.kind in ("op", "command"):
                operators.append(RELATIONS[self._now.text])
                self._at += 1
                if self._op("="):  # \approx=
                    pass
                operands.append(self._ratio())
            elif self._cmd("pmod", "mod", "bmod"):
                operators.append("mod")
                operands.append(self._factor())
            else:
                break
        return operands[0] if len(operands) == 1 else t.Relation(tuple(operands), tuple(operators))

    def _ratio(self) -> t.Node:
        items = [self._sets()]
        while self._op(":") or self._cmd("colon"):
            items.append(self._sets())
        return items[0] if len(items) == 1 else t.Ratio(tuple(items))

    def _sets(self) -> t.Node:
        found = self._sum()
        while self._now.kind == "command" and self._now.text in SETS:
            operator = SETS[self._now.text]
            self._at += 1
            found = t.SetOp(operator, (found, self._sum()))
        return found

    # ── sums and products ────────────────────────────────────────────────────────────────────────────────────────

    def _sum(self) -> t.Node:
        found: t.Node | None = None
        terms: list[t.Node] = []
        while True:
            if self._op("+"):
                terms.append(self._term())
            elif self._op("-"):
                terms.append(negative(self._term()))
            elif self._is("pm", "mp"):
                flip = self._now.text == "mp"
                self._at += 1
                found = sum_of(terms) if terms else None
                terms = [t.Either(found, self._term(), flip)]
            elif not terms:
                terms.append(self._term())
            else:
                return sum_of(terms)

    def _term(self) -> t.Node:
        found = self._signed()
        while True:
            if self._is(*TIMES):
                self._at += 1
                found = product(found, self._mixed())
            elif self._is(*OVER):
                self._at += 1
                found = t.Quotient(found, self._mixed())
            elif self._starts_atom():
                found = self._beside(found)
            else:
                return found

    def _mixed(self) -> t.Node:
        """Read the factor behind a sign, which may be a mixed number: 2 · 3½."""
        found = self._signed()
        if isinstance(found, t.Number) and is_fraction_command(self._now):
            return self._beside(found)
        return found

    def _signed(self) -> t.Node:
        if self._op("-"):
            return negative(self._nested(self._signed))
        if self._op("+"):
            return self._nested(self._signed)
        return self._factor()

    def _beside(self, left: t.Node) -> t.Node:
        """Read a factor without a sign before it."""
        token = self._now
        if isinstance(left, t.Number) and (token.kind == "number" or is_fraction_command(token)):
            whole = left.value
            right = self._nested(self._atom)
            if token.kind == "number" and self._is("/"):
                self._at += 1
                right = t.Quotient(right, self._nested(self._atom))
            if proper(right) and whole.denominator == 1 and (token.spaced or token.kind == "command"):
                mixed = t.Sum((left, right)) if whole >= 0 else t.Sum((left, negative(right)))
                return self._postfixed(mixed, Token("number", ""))  # 33 1/3 %
            if token.kind == "number":
                raise ParseError(f"{token.text!r} stands beside another number")
            return product(left, self._postfixed(right, token))
        if token.kind == "number" and isinstance(left, t.Measure):
            both = together(left, self._factor())
            if both is not None:
                return both
        before = self._tokens[self._at - 1]
        ended = before.text == "!" or (_is_power(left) and (before.text == "}" or before.kind == "name"))
        if token.kind == "number" and not ended:
            raise ParseError(f"{token.text!r} stands behind a value")  # but 2^{3}3^{2}, 2^n 3^m, 3!7! are products
        if token.kind == "text":
            self._at += 1
            return counted(left, token.text)
        if token.kind == "unit" and not (isinstance(left, t.Measure)):
            return t.Measure(left, self._unit())
        return product(left, self._factor())


def _is_power(node: t.Node) -> bool:
    return isinstance(node.factors[-1] if isinstance(node, t.Product) else node, t.Power)
