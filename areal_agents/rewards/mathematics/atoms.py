"""The factors of a term: numbers, names, brackets and commands, with what is written behind and above them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from fractions import Fraction

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics import units
from areal_agents.rewards.mathematics.canonical import written
from areal_agents.rewards.mathematics.combine import BASES, degrees, in_base, negative, product, said_of_elements
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.lexer import Token
from areal_agents.rewards.mathematics.notation import (
    BIG,
    FRACTIONS,
    FUNCTION_LETTERS,
    FUNCTIONS,
    GREEK,
    IGNORED,
    INNER,
    NUMBER_SETS,
    RELATIONS,
    SETS,
)
from areal_agents.rewards.mathematics.token_reader import TokenReader
from areal_agents.rewards.mathematics.tree import symbols_in

_INFIX: dict[str, Callable[[t.Node, t.Node], t.Node]] = {
    "over": t.Quotient,
    "choose": lambda n, k: t.Apply("binomial", (n, k)),
}
_CLOSING = {"(": ")]", "[": "])"}


class AtomReader(TokenReader, ABC):
    """The lower half of the grammar."""

    @abstractmethod
    def _items(self) -> list[t.Node]: ...
    @abstractmethod
    def _relation(self) -> t.Node: ...
    @abstractmethod
    def _sum(self) -> t.Node: ...
    @abstractmethod
    def _term(self) -> t.Node: ...

    def _factor(self) -> t.Node:
        token = self._now
        return self._postfixed(self._nested(self._atom), token)

    def _postfixed(self, found: t.Node, token: Token) -> t.Node:
        """Read what stands behind an atom, which began with ``token``."""
        while True:
            if self._op("!"):
                found = t.Apply("factorial2" if self._op("!") else "factorial", (found,))
            elif self._op("%"):
                found = t.Measure(found, t.PERCENT)
            elif self._op("'"):
                found = t.Symbol(f"{found.name}'") if isinstance(found, t.Symbol) else found
            elif self._op("^"):
                found = self._raised(found)
            elif self._op("_"):
                found = self._indexed(found, token)
            elif self._cmd("degree") or (self._is("deg") and self._ends_value(1) and self._cmd("deg")):
                found = degrees(found)
            elif self._now.kind == "unit" and token.kind == "number":
                found = t.Measure(found, self._unit())
            else:
                return found

    def _raised(self, base: t.Node) -> t.Node:
        if self._cmd("circ", "degree"):
            return self._degrees(base)
        if self._takes_letter_o() and not symbols_in(base):
            return self._degrees(base)
        if self._cmd("prime"):
            return t.Symbol(f"{base.name}'") if isinstance(base, t.Symbol) else base
        if self._is("{") and self._tokens[self._at + 1].text in ("circ", "degree", "prime"):
            self._at += 2
            self._expect("}")
            return self._degrees(base)
        sign = self._op("-")
        if not sign:
            self._op("+")
        exponent = self._nested(self._atom)
        if self._op("^"):  # 2^3^2: to the right
            exponent = self._raised(exponent)
        while self._op("!"):
            exponent = t.Apply("factorial", (exponent,))
        exponent = negative(exponent) if sign else exponent
        inverse = exponent == t.Number(Fraction(-1)) and self._is("(")
        if inverse and isinstance(base, t.Symbol) and base.name in ("f", "g", "h"):
            return self._applied(t.Symbol(f"{base.name}_inverse"))
        return t.Power(base, exponent)

    def _degrees(self, value: t.Node) -> t.Node:
        """Read 20°, 20° C, 20° 30' and 20° 30' 15''."""
        found = degrees(value)
        scale = {"C": "celsius", "F": "fahrenheit"}.get(self._now.text)
        after = self._tokens[self._at + 1].text if self._at + 1 < len(self._tokens) else ""
        if scale and self._now.kind != "end" and after in ("", ".", ",", ")", "}"):
            self._at += 1
            unit = units.find(scale)
            assert unit is not None
            return t.Measure(value, unit)
        if self._now.kind == "number" and after == "'":
            share = self._now.value / 60
            self._at += 2
            marks = [x.text for x in self._tokens[self._at + 1 : self._at + 3]]
            if self._now.kind == "number" and marks == ["'", "'"]:
                share += self._now.value / 3600
                self._at += 3
            return degrees(t.Sum((value, t.Number(share))))
        return found

    def _indexed(self, base: t.Node, token: Token) -> t.Node:
        index = self._nested(self._atom)
        if isinstance(index, t.Words) and index.text.lower() in BASES:
            index = t.Number(Fraction(BASES[index.text.lower()]))
        if isinstance(base, t.Number) and isinstance(index, t.Number):
            digits = next((x.text for x in self._tokens[self._tokens.index(token) :] if x.kind == "number"), "")
            return in_base(digits, int(index.value))
        if isinstance(base, t.Words) and base.text.isalnum() and isinstance(index, t.Number) and index.value > 10:
            return in_base(base.text, int(index.value))
        if isinstance(base, t.Symbol):
            name = t.Symbol(f"{base.name}_{written(index)}")
            return self._applied(name)
        return t.Apply("index", (base, index))

    def _unit(self) -> units.Unit:
        found = self._one_unit()
        while self._is("/", "*") and self._tokens[self._at + 1].kind in ("unit", "name"):
            over = self._now.text == "/"
            if units.find(self._tokens[self._at + 1].text) is None:
                break
            self._at += 1
            found = found.times(self._one_unit(), -1 if over else 1)
        while self._now.kind == "unit":  # kg m
            found = found.times(self._unit())
        return found

    def _one_unit(self) -> units.Unit:
        unit = units.find(self._now.text)
        if unit is None:
            raise ParseError(f"{self._now.text!r} is no unit")
        self._at += 1
        if self._is("^"):
            self._at += 1
            sign = -1 if self._op("-") else 1
            power = self._nested(self._atom)
            if not isinstance(power, t.Number) or power.value.denominator != 1 or abs(power.value) > 4:
                raise ParseError("a unit has a small whole power")
            unit = units.Unit(()).times(unit, sign * int(power.value))
        return unit

    # ── atoms ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _atom(self) -> t.Node:
        token = self._now
        self._at += 1
        if token.kind == "number":
            return t.Number(token.value)
        if token.kind == "name":
            return self._name(token.text)
        if token.kind == "text":
            words = [token.text]
            while self._now.kind in ("text", "name") and self._now.spaced:
                words.append(self._now.text)
                self._at += 1
            return t.Words(" ".join(words))
        if token.kind == "unit":
            self._at -= 1
            unit = self._unit()
            if self._now.kind == "number":
                return t.Measure(self._factor(), unit)
            return t.Words(token.text)
        if token.kind == "op":
            return self._bracketed(token.text)
        if token.kind == "command":
            return self._command(token.text)
        raise ParseError("the answer ends too early")

    def _name(self, letter: str) -> t.Node:
        if letter in ("e", "i"):
            return t.Constant(letter)
        return self._applied(t.Symbol(letter))

    def _applied(self, symbol: t.Symbol) -> t.Node:
        """Read f(x): a letter that usually names a function, right before a bracket with arguments."""
        if symbol.name[0] in FUNCTION_LETTERS and self._is("(") and not self._now.spaced:
            self._at += 1
            args = self._items()
            self._expect(")")
            if all(isinstance(a, t.Symbol | t.Number) for a in args) or symbol.name[0] in "fghFGHW":
                return t.Apply(symbol.name, tuple(args))
            return product(symbol, args[0] if len(args) == 1 else t.Row("(", tuple(args), ")"))
        return symbol

    def _bracketed(self, opened: str) -> t.Node:
        if opened == "|":
            self._bars += 1
            found = self._sum()
            self._bars -= 1
            self._expect("|")
            return t.Apply("abs", (found,))
        if opened == "{":
            items = self._items()
            for infix in ("over", "choose"):
                if self._cmd(infix):
                    items = [_INFIX[infix](*(_one(x) for x in (items, self._items())))]
            self._expect("}")
            if not items:
                raise ParseError("{} is empty")
            return items[0] if len(items) == 1 else t.Row("", tuple(items), "")
        if opened in _CLOSING:
            items = self._items()
            closed = self._now.text
            if self._now.kind != "op" or closed not in _CLOSING[opened]:
                raise ParseError(f"{opened!r} is not closed")
            self._at += 1
            rows = [x.items for x in items if isinstance(x, t.Row) and x.opened == "["]
            if len(rows) == len(items) > 1 and opened == "[" and len(set(map(len, rows))) == 1:
                return t.Matrix(tuple(rows))  # [[1, 2], [3, 4]]
            if len(items) == 1 and (opened, closed) in (("(", ")"), ("[", "]")):
                return items[0]
            return t.Row(opened, tuple(items), closed)
        raise ParseError(f"{opened!r} is not expected")

    def _command(self, name: str) -> t.Node:
        if name in FRACTIONS:
            return t.Quotient(self._digit_or_group(), self._digit_or_group())
        if name in ("binom", "dbinom", "tbinom"):
            return t.Apply("binomial", (self._digit_or_group(), self._digit_or_group()))
        if name == "sqrt":
            return self._root()
        if name == "{" or name == "lbrace":
            return self._set()
        if name == "langle":
            items = self._items()
            self._expect("rangle")
            return t.Row("(", tuple(items), ")")
        if name in ("lfloor", "lceil", "lvert"):
            found = self._sum()
            self._expect({"lfloor": "rfloor", "lceil": "rceil", "lvert": "rvert"}[name])
            return t.Apply({"lfloor": "floor", "lceil": "ceil", "lvert": "abs"}[name], (found,))
        if name == "begin":
            return self._environment()
        if name == "mathbb":
            letter = self._nested(self._atom)
            if isinstance(letter, t.Symbol) and letter.name in NUMBER_SETS:
                return t.Constant(NUMBER_SETS[letter.name])
            raise ParseError("\\mathbb has no such set")
        if name in ("infty", "infin"):
            return t.Constant("infty")
        if name == "pi":
            return t.Constant("pi")
        if name in ("emptyset", "varnothing"):
            return t.Row("{", (), "}")
        if name in FUNCTIONS:
            return self._function(name)
        if name in BIG:
            return self._big(name)
        if name in INNER:
            return self._nested(self._atom)
        if name in IGNORED:
            return self._nested(self._atom)
        if name in GREEK:
            return self._applied(t.Symbol(name))
        if name in ("ldots", "dots", "cdots", "dotsc"):
            return t.Symbol("...")
        if name in RELATIONS or name in SETS or name in ("}", "end"):
            raise ParseError(f"\\{name} is not expected")
        return t.Symbol(f"\\{name}")

    def _digit_or_group(self) -> t.Node:
        r"""Read an argument of \frac: a group, or one token, which is one digit (\frac12)."""
        token = self._now
        if token.kind == "number" and token.text.isdigit() and len(token.text) > 1 and token.value == int(token.text):
            rest = token.text[1:]
            self._tokens[self._at] = Token("number", rest, Fraction(int(rest)))
            return t.Number(Fraction(int(token.text[0])))
        sign = self._op("-")
        found = self._nested(self._atom)
        return negative(found) if sign else found

    def _root(self) -> t.Node:
        degree: t.Node = t.Number(Fraction(2))
        if self._op("["):
            degree = self._nested(self._sum)
            self._expect("]")
        return t.Power(self._nested(self._atom), t.Quotient(t.Number(Fraction(1)), degree))

    def _set(self) -> t.Node:
        bars, self._bars = self._bars, 1
        items = self._items()
        if self._op("|") or self._cmd("mid"):  # those x for which …
            items = self._items()
            self._bars = bars
            self._expect("}")
            return items[0] if len(items) == 1 else t.Row("", tuple(items), "")
        self._bars = bars
        if not (self._cmd("}", "rbrace")):
            raise ParseError("\\{ is not closed")
        return said_of_elements(items) or t.Row("{", tuple(items), "}")

    def _function(self, name: str) -> t.Node:
        base: t.Node | None = None
        power: t.Node | None = None
        while True:
            if self._op("_"):
                base = self._nested(self._atom)
            elif self._op("^"):
                sign = self._op("-")
                power = self._nested(self._atom)
                power = negative(power) if sign else power
            else:
                break
        args = self._arguments()
        if name == "lg":
            base = t.Number(Fraction(10))
        if power == t.Number(Fraction(-1)) or power == negative(t.Number(Fraction(1))):
            name, power = f"arc{name}", None
        found: t.Node = t.Apply({"ln": "log"}.get(name, name), args if base is None else (*args, base))
        return found if power is None else t.Power(found, power)

    def _arguments(self) -> tuple[t.Node, ...]:
        if self._op("("):
            items = self._items()
            self._expect(")")
            if not items:
                raise ParseError("a function needs an argument")
            return tuple(items)
        found = self._factor()
        while self._starts_atom() and not (self._now.kind == "command" and self._now.text in FUNCTIONS):
            found = product(found, self._factor())
        return (found,)

    def _big(self, name: str) -> t.Node:
        parts: dict[str, t.Node] = {}
        while self._is("_", "^"):
            key = self._now.text
            self._at += 1
            parts[key] = self._nested(self._atom)
        none = t.Words("")
        return t.Apply(name, (parts.get("_", none), parts.get("^", none), self._nested(self._term)))

    def _environment(self) -> t.Node:
        name = self._env_name()
        if name == "array":
            self._at += 1  # {cc}
            while not self._op("}"):
                self._at += 1
                if self._now.kind == "end":
                    raise ParseError("array is not closed")
        rows: list[tuple[t.Node, ...]] = []
        row: list[t.Node] = []
        while not self._cmd("end"):
            if self._now.kind == "end":
                raise ParseError(f"{name} is not closed")
            if self._op(r"\\"):
                rows.append(tuple(row))
                row = []
            elif not self._op("&", ",", "."):
                row.append(self._nested(self._relation))
        rows.append(tuple(row))
        if self._env_name() != name:
            raise ParseError(f"{name} is closed by another name")
        rows = [r for r in rows if r]
        if "matrix" in name or name in ("array",):
            if len({len(r) for r in rows}) != 1:
                raise ParseError("the rows of a matrix have one length")
            matrix = t.Matrix(tuple(rows))
            return t.Apply("det", (matrix,)) if name == "vmatrix" else matrix
        return t.Row("", tuple(x for r in rows for x in r), "")

    def _env_name(self) -> str:
        self._expect("{")
        name = ""
        while not self._op("}"):
            if self._now.kind == "end":
                raise ParseError("an environment has no name")
            name += self._now.text
            self._at += 1
        return name


def _one(items: list[t.Node]) -> t.Node:
    if len(items) != 1:
        raise ParseError("one value is expected on each side")
    return items[0]
