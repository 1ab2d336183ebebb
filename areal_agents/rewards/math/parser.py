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

from collections.abc import Callable
from fractions import Fraction

from areal_agents.rewards.math import tree as t
from areal_agents.rewards.math import units
from areal_agents.rewards.math.errors import ParseError
from areal_agents.rewards.math.lexer import FUNCTIONS, Commas, Lexer, Token

MAX_DEPTH = 48
MAX_TOKENS = 2048
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "lt": "<", "gt": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "ne": "!=", "neq": "!=", "approx": "~", "sim": "~", "simeq": "~", "equiv": "==",
    "in": "in", "notin": "notin", "to": "->", "rightarrow": "->", "subset": "subset", "subseteq": "subset",
}  # fmt: skip
_SETS = {"cup": "cup", "cap": "cap", "setminus": "setminus", "backslash": "setminus", "bigcup": "cup"}
_SEPARATORS = {",", ";", "lor", "vee", "land", "wedge", r"\\"}
_TIMES = {"*", "cdot", "times", "ast"}
_OVER = {"/", "div"}
_INNER = {
    "vec", "hat", "bar", "overline", "overrightarrow", "underline", "tilde", "boldsymbol", "boxed", "fbox", "textstyle",
    "overparen", "widehat", "mathcal", "mathop", "phantom",
}  # fmt: skip
_IGNORED = {"angle", "triangle", "therefore", "displaystyle", "measuredangle", "left", "right", "qquad", "quad", "mathbf"}
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split()
)
_FUNCTION_LETTERS = set("fghFGHWPQpq")
_NUMBER_SETS = {"R": "reals", "Z": "integers", "N": "naturals", "Q": "rationals", "C": "complexes"}
_BIG = {"sum", "prod", "int", "lim"}
_CLOSING = {"(": ")]", "[": "])"}


def parse(text: str, commas: Commas = "thousands") -> t.Node:
    """Read one answer.

    Raises ParseError where it is none that the grammar reads.
    """
    return _Parser(Lexer(text, commas).tokens).answer()


class _Parser:
    def __init__(self, tokens: list[Token]) -> None:
        if len(tokens) > MAX_TOKENS:
            raise ParseError(f"the answer has {len(tokens)} symbols, at most {MAX_TOKENS} are read")
        self._tokens, self._at, self._depth = tokens, 0, 0
        self._bars = 0
        """How many | are open, or one where | separates (a set of those x | x > 0)."""

    # ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _now(self) -> Token:
        return self._tokens[self._at]

    def _is(self, *texts: str) -> bool:
        return self._now.kind in ("op", "command") and self._now.text in texts

    def _op(self, *texts: str) -> bool:
        """Take an operator, which is no command of the same name."""
        if self._now.kind == "op" and self._now.text in texts:
            self._at += 1
            return True
        return False

    def _cmd(self, *texts: str) -> bool:
        if self._now.kind == "command" and self._now.text in texts:
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not (self._op(text) or self._cmd(text)):
            raise ParseError(f"{text!r} is missing before {self._now.text or 'the end'!r}")

    def _nested(self, read: Callable[[], t.Node]) -> t.Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ParseError(f"the answer nests more than {MAX_DEPTH} deep")
        found = read()
        self._depth -= 1
        return found

    # ── rows and relations ───────────────────────────────────────────────────────────────────────────────────────

    def answer(self) -> t.Node:
        self._op("=")
        items = self._items()
        self._op(".")
        if self._now.kind != "end":
            raise ParseError(f"{self._now.text!r} is not expected")
        if not items:
            raise ParseError("the answer is empty")
        return items[0] if len(items) == 1 else t.Row("", tuple(items), "")

    def _items(self) -> list[t.Node]:
        items: list[t.Node] = []
        while True:
            while self._is(*_SEPARATORS):
                self._at += 1
            if self._ends():
                return items
            items.append(self._nested(self._relation))
            if not self._is(*_SEPARATORS):
                return items

    def _ends(self) -> bool:
        if self._is("|"):
            return self._bars > 0
        return self._now.kind == "end" or self._is(")", "]", "}", "end", "rangle", "rbrack", "rbrace", ".", "mid")

    def _relation(self) -> t.Node:
        operands, operators = [self._ratio()], []
        while True:
            if self._now.kind == "op" and self._now.text in "=<>" or self._now.kind == "command" and self._now.text in _RELATIONS:
                operators.append(_RELATIONS[self._now.text])
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
        while self._now.kind == "command" and self._now.text in _SETS:
            operator = _SETS[self._now.text]
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
                terms.append(_negative(self._term()))
            elif self._is("pm", "mp"):
                flip = self._now.text == "mp"
                self._at += 1
                found = _sum_of(terms) if terms else None
                terms = [t.Either(found, self._term(), flip)]
            elif not terms:
                terms.append(self._term())
            else:
                return _sum_of(terms)

    def _term(self) -> t.Node:
        found = self._signed()
        while True:
            if self._is(*_TIMES):
                self._at += 1
                found = _product(found, self._signed())
            elif self._is(*_OVER):
                self._at += 1
                found = t.Quotient(found, self._signed())
            elif self._starts_atom():
                found = self._beside(found)
            else:
                return found

    def _signed(self) -> t.Node:
        if self._op("-"):
            return _negative(self._nested(self._signed))
        if self._op("+"):
            return self._nested(self._signed)
        return self._factor()

    def _beside(self, left: t.Node) -> t.Node:
        """Read a factor without a sign before it."""
        token = self._now
        if isinstance(left, t.Number) and token.kind == "number" or _is_fraction_command(token) and isinstance(left, t.Number):
            whole = left.value
            right = self._factor()
            if token.kind == "number" and self._is("/"):
                self._at += 1
                right = t.Quotient(right, self._factor())
            if _proper(right) and whole.denominator == 1 and (token.spaced or token.kind == "command"):
                return t.Sum((left, right)) if whole >= 0 else t.Sum((left, _negative(right)))
            if token.kind == "number":
                raise ParseError(f"{token.text!r} stands beside another number")
            return _product(left, right)
        if token.kind == "number":
            raise ParseError(f"{token.text!r} stands behind a value")
        if token.kind == "text":
            self._at += 1
            return t.Measure(left, units.Unit(((token.text.lower(), 1),)))
        if token.kind == "unit" and not (isinstance(left, t.Measure)):
            return t.Measure(left, self._unit())
        return _product(left, self._factor())

    def _starts_atom(self) -> bool:
        token = self._now
        if token.kind in ("number", "name", "text", "unit"):
            return True
        if token.kind == "op":
            return token.text in "({[" or (token.text == "|" and not self._bars)
        if token.kind == "command":
            return token.text not in _RELATIONS and token.text not in _SETS and token.text not in (
                *_SEPARATORS, *_TIMES, *_OVER, "pm", "mp", "}", "end", "mid", "rangle", "rfloor", "rceil", "rvert",
                "pmod", "mod", "bmod", "colon", "rbrace", "rbrack",
            )  # fmt: skip
        return False

    def _factor(self) -> t.Node:
        token = self._now
        found = self._nested(self._atom)
        while True:
            if self._op("!"):
                found = t.Apply("factorial", (found,))
            elif self._op("%"):
                found = t.Measure(found, t.PERCENT)
            elif self._op("'"):
                found = t.Symbol(f"{found.name}'") if isinstance(found, t.Symbol) else found
            elif self._op("^"):
                found = self._raised(found)
            elif self._op("_"):
                found = self._indexed(found, token)
            elif self._cmd("degree"):
                found = _degrees(found)
            elif self._now.kind == "unit" and token.kind == "number":
                found = t.Measure(found, self._unit())
            else:
                return found

    def _raised(self, base: t.Node) -> t.Node:
        if self._cmd("circ", "degree"):
            return _degrees(base)
        if self._cmd("prime"):
            return t.Symbol(f"{base.name}'") if isinstance(base, t.Symbol) else base
        if self._is("{") and self._tokens[self._at + 1].text in ("circ", "degree", "prime"):
            self._at += 2
            self._expect("}")
            return _degrees(base)
        sign = self._op("-")
        if not sign:
            self._op("+")
        exponent = self._nested(self._atom)
        if self._op("^"):  # 2^3^2: to the right
            exponent = self._raised(exponent)
        while self._op("!"):
            exponent = t.Apply("factorial", (exponent,))
        return t.Power(base, _negative(exponent) if sign else exponent)

    def _indexed(self, base: t.Node, token: Token) -> t.Node:
        index = self._nested(self._atom)
        if isinstance(base, t.Number) and isinstance(index, t.Number):
            return _in_base(token.text, int(index.value))
        from areal_agents.rewards.math.canonical import written

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
        return found

    def _one_unit(self) -> units.Unit:
        unit = units.find(self._now.text)
        if unit is None:
            raise ParseError(f"{self._now.text!r} is no unit")
        self._at += 1
        if self._is("^"):
            self._at += 1
            power = self._nested(self._atom)
            if not isinstance(power, t.Number) or power.value.denominator != 1 or abs(power.value) > 4:
                raise ParseError("a unit has a small whole power")
            unit = units.Unit(()).times(unit, int(power.value))
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
        if symbol.name[0] in _FUNCTION_LETTERS and self._is("(") and not self._now.spaced:
            self._at += 1
            args = self._items()
            self._expect(")")
            if all(isinstance(a, t.Symbol | t.Number) for a in args) or symbol.name[0] in "fghFGHW":
                return t.Apply(symbol.name, tuple(args))
            return _product(symbol, args[0] if len(args) == 1 else t.Row("(", tuple(args), ")"))
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
            if len(items) == 1 and (opened, closed) in (("(", ")"), ("[", "]")):
                return items[0]
            return t.Row(opened, tuple(items), closed)
        raise ParseError(f"{opened!r} is not expected")

    def _command(self, name: str) -> t.Node:
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return t.Quotient(self._digit_or_group(), self._digit_or_group())
        if name in ("binom", "dbinom", "tbinom"):
            return t.Apply("binomial", (self._digit_or_group(), self._digit_or_group()))
        if name == "sqrt":
            return self._root()
        if name == "{" or name == "lbrace":
            return self._set()
        if name in ("langle", "lbrack"):
            items = self._items()
            self._expect({"langle": "rangle", "lbrack": "rbrack"}[name])
            return t.Row({"langle": "(", "lbrack": "["}[name], tuple(items), {"langle": ")", "lbrack": "]"}[name])
        if name in ("lfloor", "lceil", "lvert"):
            found = self._sum()
            self._expect({"lfloor": "rfloor", "lceil": "rceil", "lvert": "rvert"}[name])
            return t.Apply({"lfloor": "floor", "lceil": "ceil", "lvert": "abs"}[name], (found,))
        if name == "begin":
            return self._environment()
        if name == "mathbb":
            letter = self._nested(self._atom)
            if isinstance(letter, t.Symbol) and letter.name in _NUMBER_SETS:
                return t.Constant(_NUMBER_SETS[letter.name])
            raise ParseError("\\mathbb has no such set")
        if name in ("infty", "infin"):
            return t.Constant("infty")
        if name == "pi":
            return t.Constant("pi")
        if name in ("emptyset", "varnothing"):
            return t.Row("{", (), "}")
        if name in FUNCTIONS:
            return self._function(name)
        if name in _BIG:
            return self._big(name)
        if name in _INNER:
            return self._nested(self._atom)
        if name in _IGNORED:
            return self._nested(self._atom)
        if name in _GREEK:
            return self._applied(t.Symbol(name))
        if name in ("ldots", "dots", "cdots", "dotsc"):
            return t.Symbol("...")
        if name in _RELATIONS or name in _SETS or name in ("}", "end"):
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
        return _negative(found) if sign else found

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
        if len(items) == 1 and isinstance(items[0], t.Ratio) and isinstance(items[0].items[-1], t.Relation):
            return items[0].items[-1]
        return t.Row("{", tuple(items), "}")

    def _function(self, name: str) -> t.Node:
        base: t.Node | None = None
        power: t.Node | None = None
        while True:
            if self._op("_"):
                base = self._nested(self._atom)
            elif self._op("^"):
                sign = self._op("-")
                power = self._nested(self._atom)
                power = _negative(power) if sign else power
            else:
                break
        args = self._arguments()
        if name == "lg":
            base = t.Number(Fraction(10))
        if power == t.Number(Fraction(-1)) or power == _negative(t.Number(Fraction(1))):
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
            found = _product(found, self._factor())
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
            return t.Matrix(tuple(rows))
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


def _is_fraction_command(token: Token) -> bool:
    return token.kind == "command" and token.text in ("frac", "dfrac", "tfrac", "cfrac")


def _proper(node: t.Node) -> bool:
    """Whether a fraction can be the end of a mixed number: 0 < a/b < 1 in whole numbers."""
    match node:
        case t.Quotient(t.Number(above), t.Number(below)):
            return above.denominator == below.denominator == 1 and 0 < above < below
    return False


def _negative(node: t.Node) -> t.Node:
    if isinstance(node, t.Number):
        return t.Number(-node.value)
    if isinstance(node, t.Measure):
        return t.Measure(_negative(node.value), node.unit)
    if isinstance(node, t.Sum):
        return t.Sum(tuple(_negative(x) for x in node.terms))
    return _product(t.Number(Fraction(-1)), node)


def _product(left: t.Node, right: t.Node) -> t.Node:
    if isinstance(right, t.Measure) and not isinstance(left, t.Measure):
        return t.Measure(_product(left, right.value), right.unit)
    before = left.factors if isinstance(left, t.Product) else (left,)
    after = right.factors if isinstance(right, t.Product) else (right,)
    return t.Product((*before, *after))


def _sum_of(terms: list[t.Node]) -> t.Node:
    return terms[0] if len(terms) == 1 else t.Sum(tuple(terms))


def _degrees(node: t.Node) -> t.Node:
    unit = units.find("degree")
    assert unit is not None
    return t.Measure(node, unit)


def _in_base(digits: str, base: int) -> t.Node:
    if not 2 <= base <= 36 or not digits.isalnum():
        raise ParseError(f"{digits}_{base} is no number of a base")
    try:
        return t.Number(Fraction(int(digits, base)))
    except ValueError as error:
        raise ParseError(f"{digits} is no number of base {base}") from error
