"""The symbols of a written mathematical answer: LaTeX, Unicode and keyboard spelling become one list of tokens.

Nothing is evaluated here. The work is linear in the length of the text, which is at most ``MAX_CHARS``.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from areal_agents.rewards.mathematics import units
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.notation import FUNCTIONS

MAX_CHARS = 4096
"""Longest answer that is read."""
MAX_DIGITS = 4096

Kind = Literal["number", "name", "command", "op", "text", "unit", "end"]
Commas = Literal["thousands", "list", "decimal"]
"""What a comma between digits is: of 1,234 and of 3,14."""


@dataclass(frozen=True, slots=True)
class Token:
    """One symbol."""

    kind: Kind
    text: str
    value: Fraction = Fraction(0)
    spaced: bool = False
    """White space stands before it."""


_ONE_TO_ONE = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "∕": "/",
    "⁄": "/", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ",
    "π": r"\pi ", "√": r"\sqrt ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ",
    "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R} ", "ℤ": r"\mathbb{Z} ", "ℕ": r"\mathbb{N} ", "∖": r"\setminus ",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "€": r"\euro ", "£": r"\pounds ",
    "º": r"^\circ ", "˚": r"^\circ ", "″": "''", "µ": r"\mu ", "\u03a9": r"\Omega ", "\u2126": r"\Omega ",
    "∶": ":", "ⅈ": "i", "ⅇ": "e", "⟨": "(", "⟩": ")", "′": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RUN = re.compile(r"(?<=\^\{[0-9+\-n])\}\^\{(?=[0-9+\-n]\})|(?<=_\{[0-9])\}_\{(?=[0-9]\})")
"""Between two raised or lowered characters, which are one exponent or index."""
_SPACE = re.compile(
    r"\\(?:[,;:!> ]|quad\b|qquad\b|thinspace\b|displaystyle\b|textstyle\b|limits\b|nolimits\b|bf\b|rm\b|it\b"
    r"|tiny\b|small\b|normalsize\b|large\b|Large\b|LARGE\b|huge\b|Huge\b)"
    r"|\\(?:color|textcolor|hspace|vspace|tag|label)\*?\{[^{}]{0,40}\}|[\s~&]|\\\\(?:\s?\[[\d.]{1,4}(?:pt|em|ex|mm|cm)\])?|\\$"
)
_SIZE = re.compile(r"\\(?:left|right|m?left|m?right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?(?![\d])|\\middle(?![a-zA-Z])")
_GROUP = re.compile(r",(?:\\!|\\,|\s)*|\s*\{\s*,\s*\}\s*|\\,|\\;|\\ |\s|'")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|mbox|mathrm|operatorname|mathbf|mathit|mathsf|bold)\*?\s*\{"
)
_SCIENTIFIC = re.compile(r"[eE]([+-]?\d{1,6})(?![\d.])(?![a-zA-Z])")
_GOES_ON = re.compile(r"\s?(?:\.\.\.|\\(?:l|c)?dots(?:c)?\b)")
_REPEATED = re.compile(
    r"\\dot\s*\{?(\d\}?\d{0,64}\\dot\s*\{?\d)\}?"
    r"|\\overline\s*\{(\d{1,64})\}|\\bar\s*\{(\d{1,64})\}|\\dot\s*\{?(\d)\}?|\((\d{1,64})\)"
)
_WORD = re.compile(r"[A-Za-z]+")
_POWER = re.compile(rf"(?:square|cubic|sq|cu)\.?\s+(?:{units.NAMES})(?![A-Za-z])", re.IGNORECASE)
_COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_PER = re.compile(r"\s?(?:/|per\b)\s?[A-Za-z]{1,12}(?:\^\{?\d\}?)?[ .$}]*$|\s?\d")
"""After the m of 3 m/s, and of 3 m 20 cm."""
_BASED = re.compile(r"((?=[0-9A-Z]{0,63}[A-Z])[0-9][0-9A-Z]{0,63})_\{?([1-3]\d)\}?|([A-F]{2,64})_\{?(16)\}?")
"""1A3_{16}: digits of a base over ten."""
_PREFIXED = re.compile(r"0(?:[xX]([0-9A-Fa-f]{1,64})|[bB]([01]{1,256})|[oO]([0-7]{1,128}))(?![0-9A-Za-z_.])")
"""0xFF, 0b1010, 0o17."""
_NOTHING = re.compile(r"\{\s?\}\s?(?=[\^_])")
"""{} before a raised or lowered mark: {}^\\circ."""
_AMOUNT = re.compile(r"\s*[-+]?\s?\$\s?\d[\d,]{0,32}(?:\.\d{1,32})?\s*(?:million|billion|trillion|thousand)?\s*")
"""$5: of two $ the text between is a formula."""
_UNIT_POWER = re.compile(r"[23](?![\w^.,])")
"""The 2 of 5 m2."""
_OPS = set("+-*/^_=<>(){}[]|,;:!%$'.")
_LETTERS = 3
"""A longer run of letters is a word, a shorter one a product of variables."""
_WORDS = {"and": ",", "or": "lor", "to": ":", "percent": "%", "percentage": "%", "pct": "%"}
_CURRENCY = {"$": "dollar", "euro": "EUR", "pounds": "GBP"}
_CONSTANTS = {"inf": "infty", "infinity": "infty", "oo": "infty", "pi": "pi"}


def plain(text: str) -> str:
    """Spell Unicode mathematics as LaTeX and ASCII, character by character."""
    if r"\begin" not in text:
        text = text.replace(r"\\", "\\")  # commands that were escaped twice; elsewhere it ends a row
    text = text.replace("+/-", r"\pm ")
    out: list[str] = []
    for char in text:
        if char.isascii():
            out.append(char)
        elif char in _ONE_TO_ONE:
            out.append(_ONE_TO_ONE[char])
        elif char in _RAISED:
            out.append(f"^{{{_RAISED[char]}}}")
        elif char in _LOWERED:
            out.append(f"_{{{_LOWERED[char]}}}")
        elif unicodedata.category(char) == "Cf":
            continue
        else:
            folded = unicodedata.normalize("NFKC", char)
            vulgar = re.fullmatch(r"(\d+)⁄(\d+)", folded)
            out.append(f" {vulgar[1]}/{vulgar[2]}" if vulgar else folded if folded.isascii() else char)
    return _RUN.sub("", "".join(out))


def is_prose(text: str) -> bool:
    """Say whether a text is words and no mathematics, such as "no solution"."""
    if not re.fullmatch(r"[A-Za-z\s',.!?-]{4,}", text):
        return False
    known = FUNCTIONS | _WORDS.keys() | _CONSTANTS.keys()
    return any(len(word) > _LETTERS and word.lower() not in known for word in _WORD.findall(text))


class Lexer:
    """Reads tokens from a text, at one position that only grows."""

    def __init__(self, text: str, commas: Commas) -> None:
        if len(text) > MAX_CHARS:
            raise ParseError(f"the answer has {len(text)} characters, at most {MAX_CHARS} are read")
        self._text, self._commas, self._pos = plain(text), commas, 0
        self._spaced = False
        self.tokens: list[Token] = []
        while self._pos < len(self._text):
            self._next()
        self._add("end", "")

    def _add(self, kind: Kind, text: str, value: Fraction = Fraction(0)) -> None:
        self.tokens.append(Token(kind, text, value, self._spaced))
        self._spaced = False

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._pos)
        if match is not None:
            self._pos = match.end()
        return match

    def _next(self) -> None:
        char = self._text[self._pos]
        if match := self._take(_BASED):
            self._based(match[1] or match[3], int(match[2] or match[4]))
        elif match := self._take(_PREFIXED):
            base, digits = next((b, d) for b, d in zip((16, 2, 8), match.groups(), strict=True) if d)
            self._add("number", digits, Fraction(int(digits, base)))
        elif char == '"' and self.tokens and self.tokens[-1].kind == "number":  # seconds of an angle
            self._pos += 1
            self._add("op", "'")
            self._add("op", "'")
        elif char.isdigit() or (char == "." and self._text[self._pos + 1 : self._pos + 2].isdigit()):
            self._number()
        elif match := self._take(_TEXT):
            self._in_text()
        elif self._take(_SIZE) or self._take(_NOTHING):
            pass
        elif match := self._take(_SPACE):
            self._spaced = True
            if match.group() == "&" or match.group().startswith("\\\\"):
                self._add("op", match.group()[:2])
        elif match := self._take(_COMMAND):
            self._command(match[1])
        elif match := self._take(_WORD):
            self._word(match.group())
        elif char in _OPS:
            self._pos += 1
            self._operator(char)
        else:
            raise ParseError(f"{char!r} is no mathematics")

    def _operator(self, char: str) -> None:
        following = self._text[self._pos : self._pos + 1]
        double = char + following
        if double in ("<=", ">=", "!=", "=="):
            self._pos += 1
            spelt = {"<=": "le", ">=": "ge", "!=": "ne", "==": "="}[double]
            self._add("op" if spelt == "=" else "command", spelt)
        elif double == "**":
            self._pos += 1
            self._add("op", "^")
        elif char == "$" and _AMOUNT.fullmatch(self._text):
            self._add("unit", "dollar")
        elif char == "$":
            self._spaced = True
        else:
            self._add("op", char)

    def _command(self, name: str) -> None:
        if name in _CURRENCY:
            self._add("unit", _CURRENCY[name])
        elif name in ("{", "}"):
            self._add("command", name)
        elif name == "%":
            self._add("op", "%")
        elif name == "|":
            self._add("op", "|")
        elif name in ("lbrack", "rbrack"):
            self._add("op", "[" if name == "lbrack" else "]")
        elif name in "#_":
            raise ParseError(f"\\{name} is no mathematics")
        else:
            self._add("command", name)

    def _word(self, word: str) -> None:
        joined = re.match(r"(and|or)(?=[A-Z]$)", word)  # 1orW(x)
        if joined:
            self._pos -= 1
            word = joined.group()
        low = word.lower()
        if low in _WORDS:
            self._joint(low)
        elif low == "per" and self.tokens and self.tokens[-1].kind == "unit":
            self._add("op", "/")
        elif low in _CONSTANTS:
            self._add("command", _CONSTANTS[low])
        elif low in FUNCTIONS and not self._is_time(word):
            self._add("command", low)
        elif (power2 := self._unit_power(word)) is not None:
            self._add("unit", power2)
        elif self._may_be_unit(word) and units.known(word):
            self._add("unit", word)
        elif self._may_be_unit(word) and (power := _POWER.match(f"{low}{self._text[self._pos :][:64]}")) is not None:
            self._pos += power.end() - len(low)  # cubic meters
            self._add("unit", power.group())
        elif low.startswith("sqrt"):  # sqrtx
            self._pos -= len(word) - 4
            self._add("command", "sqrt")
        elif len(word) > _LETTERS:
            self._add("text", word)
        else:
            for letter in word:
                self._add("name", letter)

    def _joint(self, word: str) -> None:
        self._add("command" if word == "or" else "op", _WORDS[word])

    def _unit_power(self, word: str) -> str | None:
        """Take the power of a unit that is written behind it: 5 m2."""
        match = _UNIT_POWER.match(self._text, self._pos)
        behind = self.tokens[-1].kind if self.tokens else ""
        if match is None or behind not in ("number", "unit") or not units.known(word + match.group()):
            return None
        self._pos = match.end()
        return word + match.group()

    def _is_time(self, word: str) -> bool:
        """Whether min, sec or deg is a unit, and no function: nothing that it could apply to follows."""
        rest = self._text[self._pos :]
        ends = not rest.strip(" .$}") or rest.startswith(",") or _PER.match(rest) is not None
        return word in ("min", "sec", "deg") and ends and self._may_be_unit(word)

    def _may_be_unit(self, word: str) -> bool:
        """Whether a word stands where a unit does: behind a value. A single letter must end the answer (5 m)."""
        if not self.tokens or not (
            self.tokens[-1].kind in ("number", "unit") or self.tokens[-1].text in (")", "}", "/", "pi")
        ):
            return False
        if len(word) > 1 or [t.kind for t in self.tokens[-2:]] == ["unit", "op"]:  # km, and the h of km/h
            return True
        rest = self._text[self._pos :]
        return self._spaced and (not rest.strip(" .$}") or _PER.match(rest) is not None)

    def _in_text(self) -> None:
        start, depth = self._pos, 1
        while self._pos < len(self._text) and depth:
            depth += {"{": 1, "}": -1}.get(self._text[self._pos], 0)
            self._pos += 1
        inside = self._text[start : self._pos - (depth == 0)].replace("$", "").strip(" ~.")
        inside = inside.removesuffix(" and")
        word = inside.lower().strip(" .,()")
        if not inside:
            return
        if word in _WORDS:
            self._joint(word)
        elif word in FUNCTIONS:
            self._add("command", word)
        elif len(several := _units_in(inside)) > 1:  # m/s, of which \text{m/s}^2 raises the s alone
            for part in several:
                self._add("op" if part in "*/" else "unit", part)
        elif units.known(inside):
            self._add("unit", inside)
        elif inside.startswith("\\frac"):  # \mathrm{\frac{m}{s}}
            self._pos, self._text = 0, inside + self._text[self._pos :]
        elif len(inside) == 1 and inside.isalpha():
            self._add("name", inside)
        elif re.fullmatch(r"[\d.,\s()\[\]/%:=<>+*-]*\d[\d.,\s()\[\]/%:=<>+*-]*(?:[a-zA-Z]{1,12}\.?)?", inside):
            self._pos, self._text = 0, inside + self._text[self._pos :]  # \text{(1, 2)}, \text{5 cm}
        else:
            self._add("text", inside)

    # ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _based(self, digits: str, base: int) -> None:
        try:
            self._add("number", digits, Fraction(int(digits, base)))
        except ValueError as error:
            raise ParseError(f"{digits} is no number of base {base}") from error

    def _digits(self) -> str:
        start = self._pos
        while self._pos < len(self._text) and self._text[self._pos].isdigit():
            self._pos += 1
        return self._text[start : self._pos]

    def _number(self) -> None:
        start = self._pos
        whole = self._digits()
        if 1 <= len(whole) <= 3:
            whole += self._groups()
        point = "," if self._commas == "decimal" else "."
        text = whole
        decimals = ""
        if self._text.startswith(point, self._pos) and self._text[self._pos + 1 : self._pos + 2].isdigit():
            self._pos += 1
            decimals = self._digits()
        elif self._text.startswith(".", self._pos) and self._repeats_at(self._pos + 1):
            self._pos += 1
        elif self._text.startswith(".", self._pos) and not self._text[self._pos + 1 : self._pos + 2].isalnum():
            self._pos += 1  # "5." ends a sentence, or has no decimals
        if self._pos == start:  # .5, where the comma is the decimal sign
            raise ParseError("a decimal point where a comma is the decimal sign")
        if len(whole) + len(decimals) > MAX_DIGITS:
            raise ParseError(f"a number has more than {MAX_DIGITS} digits")
        value = Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
        if point == "." and (decimals or self._text[self._pos - 1] == "."):
            value = self._repeating(value, len(decimals))
        if match := self._take(_SCIENTIFIC):
            exponent = int(match[1])
            if abs(exponent) > MAX_DIGITS:
                raise ParseError(f"the exponent {exponent} is too large")
            value *= Fraction(10) ** exponent
        self._add("number", f"{whole}.{decimals}" if decimals else text, value)

    def _groups(self) -> str:
        """Read groups of three digits with their separators, as far as every group has three."""
        out = ""
        separator = ""
        while match := _GROUP.match(self._text, self._pos):
            kind = match.group().strip()[:1] or " "
            if separator and kind != separator:
                break
            digits = self._text[match.end() : match.end() + 4]
            if not (len(digits) >= 3 and digits[:3].isdigit()) or digits[3:4].isdigit():
                break
            if kind == "," and "\\" not in match.group() and (self._commas != "thousands" or match.group() != ","):
                break  # 84, 210 are two; 84,210 is one in a reading with thousands, 84,\! 210 in every one
            if kind == "," and self._text[self._pos - 1] == "0" and not self._text[: self._pos - 1][-1:].isdigit():
                break  # (0,100)
            if (kind == "\\" and match.group() == "\\ ") or (kind == "'" and not digits[:3].isdigit()):
                break
            separator = kind
            out += digits[:3]
            self._pos = match.end() + 3
        if separator == "," and self._commas == "decimal":
            return out
        if self._commas == "decimal":
            while re.match(r"\.\d{3}(?!\d)", self._text[self._pos : self._pos + 5]):
                out += self._text[self._pos + 1 : self._pos + 4]
                self._pos += 4
        return out

    def _repeats_at(self, pos: int) -> bool:
        return _REPEATED.match(self._text, pos) is not None

    def _repeating(self, value: Fraction, decimals: int) -> Fraction:
        match = _REPEATED.match(self._text, self._pos)
        if match is None:
            return self._going_on(value, decimals)
        block = re.sub(r"\D", "", next(group for group in match.groups() if group))
        self._pos = match.end()
        return value + Fraction(int(block), (10 ** len(block) - 1) * 10**decimals)

    def _going_on(self, value: Fraction, decimals: int) -> Fraction:
        """Read 0.333… where a block stands three times; another number that goes on has no value."""
        before = self._pos
        if not decimals or not self._take(_GOES_ON):
            return value
        digits = self._text[before - min(decimals, 64) : before]
        block = re.search(r"(\d{1,12}?)\1\1$", digits)
        if block is None:
            raise ParseError("a decimal goes on in a way that is not said")
        return value + Fraction(int(block[1]), (10 ** len(block[1]) - 1) * 10**decimals)


def _units_in(text: str) -> list[str]:
    """Return the units of ``m/s`` and ``N m`` with the signs between them, or nothing where it is something else."""
    if len(text) > 64 or " per " in text:
        return []
    parts = re.split(r"\s*([/·*])\s*|\s+", text)
    found = [part or "*" for part in parts]
    return found if all(units.known(part) for part in found[::2]) else []
