"""The tokens of an answer, with the position that the grammar has reached."""

from __future__ import annotations

from collections.abc import Callable

from areal_agents.rewards.mathematics import tree as t
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.lexer import Token
from areal_agents.rewards.mathematics.notation import STARTS_NOTHING

MAX_DEPTH = 48
MAX_TOKENS = 2048


class TokenReader:
    """Tokens in a row, of which each method takes those that it reads."""

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

    def _takes_letter_o(self) -> bool:
        """Take an o or {o}, which is a degree sign above a number."""
        braces = int(self._is("{"))
        found = [x.text for x in self._tokens[self._at : self._at + 1 + 2 * braces]]
        if found != ["{", "o", "}"][1 - braces : 2 + braces]:
            return False
        self._at += len(found)
        return True

    def _ends_value(self, ahead: int) -> bool:
        token = self._tokens[self._at + ahead]
        return token.kind == "end" or token.text in (",", ".", ")", "]", "}", ";")

    def _starts_atom(self) -> bool:
        token = self._now
        if token.kind in ("number", "name", "text", "unit"):
            return True
        if token.kind == "op":
            return token.text in "({[" or (token.text == "|" and not self._bars)
        if token.kind == "command":
            return token.text not in STARTS_NOTHING
        return False
