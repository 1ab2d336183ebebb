"""Python calls with literal arguments, read as data: ``search(query="tea", limit=3)``.

Nothing is compiled or evaluated, and Python's own parser is not used. It warns, recurses as deep as its input says,
and refuses the raw newlines that small models write inside quotes. Literals are strings, numbers, True, False, None,
JSON's true, false, null, lists, tuples, and dictionaries with string keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from areal_agents.chat.tool_formats.json_calls import MAX_DEPTH, MAX_JSON_CHARS, sane

_NAME = re.compile(r"[\w.\-]{1,256}")
_NUMBER = re.compile(r"[+-]?(?:[0-9][0-9_]{0,4000})?(?:\.[0-9]{0,400})?(?:[eE][+-]?[0-9]{1,4})?")
_BLANK = re.compile(r"(?:[ \t\r\n]+|\\\n|#[^\n]*)*+")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HEX = {"x": 2, "u": 4, "U": 8}
_PIECES = {quote: re.compile(rf"[^\\{quote}]+") for quote in "'\""}


class Unreadable(ValueError):
    """A text that is no call with literal arguments."""

    def __init__(self, message: str, *, cut: bool) -> None:
        super().__init__(message)
        self.cut = cut
        """Whether the text ended too early."""


class LiteralReader:
    """A reader of calls and literals in one text, each within the limits of a block."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._end = len(text)

    def call(self, pos: int) -> tuple[str, dict[str, Any], str, int]:
        """Read the call at ``pos``.

        Returns:
            The name, the arguments, what is wrong with them in words or nothing, and the position after the call.

        Raises:
            Unreadable: there is none.
        """
        self._end = min(len(self._text), pos + MAX_JSON_CHARS)
        name, pos = self._name(pos)
        pos = self._expect("(", self._blank(pos))
        arguments: dict[str, Any] = {}
        problem = ""
        while not self._at(")", pos := self._blank(pos)):
            key, value, pos = self._argument(pos)
            pairs = [(key, value)] if key is not None else list(value.items()) if isinstance(value, dict) else []
            if not pairs and key is None and value != {}:
                problem = problem or "an argument has no name"
            for one, given in pairs:
                problem = problem or (f'"{one[:40]}" is given twice' if one in arguments else "")
                arguments[one] = given
            pos = self._blank(pos)
            if not self._at(")", pos):
                pos = self._expect(",", pos)
        if not sane(arguments):
            raise Unreadable("a string that is no text, or too deep", cut=False)
        return name, arguments, problem, pos + 1

    def value(self, pos: int, depth: int = 1) -> tuple[Any, int]:
        """Read the literal at ``pos``, and return it with the position after it. Raises Unreadable."""
        if depth > MAX_DEPTH:
            raise Unreadable("nested too deep", cut=False)
        pos = self._blank(pos)
        char = self._char(pos)
        if char in "'\"":
            return self._strings(pos)
        if char in "[(":
            return self._sequence(pos, depth)
        if char == "{":
            return self._mapping(pos, depth)
        name = _NAME.match(self._text, pos, self._end)
        if name and name[0] in _WORDS:
            return _WORDS[name[0]], name.end()
        return self._number(pos)

    def _argument(self, pos: int) -> tuple[str | None, Any, int]:
        if self._text.startswith("**", pos):
            value, pos = self.value(pos + 2)
            if not isinstance(value, dict):
                raise Unreadable("** takes a dictionary", cut=False)
            return None, value, pos
        match = _NAME.match(self._text, pos, self._end)
        if match:
            after = self._blank(match.end())
            if self._at("=", after) and not self._at("==", after):
                value, pos = self.value(after + 1)
                return match[0], value, pos
        value, pos = self.value(pos)
        return None, value if not isinstance(value, dict) else [value], pos

    def _name(self, pos: int) -> tuple[str, int]:
        match = _NAME.match(self._text, pos, self._end)
        if match is None:
            raise Unreadable("no name", cut=pos >= self._end)
        return match[0], match.end()

    def _sequence(self, pos: int, depth: int) -> tuple[list[Any], int]:
        close = "]" if self._text[pos] == "[" else ")"
        out: list[Any] = []
        pos = self._blank(pos + 1)
        while not self._at(close, pos):
            item, pos = self.value(pos, depth + 1)
            out.append(item)
            pos = self._blank(pos)
            if not self._at(close, pos):
                pos = self._blank(self._expect(",", pos))
        return out, pos + 1

    def _mapping(self, pos: int, depth: int) -> tuple[dict[str, Any], int]:
        out: dict[str, Any] = {}
        pos = self._blank(pos + 1)
        while not self._at("}", pos):
            key, pos = self.value(pos, depth + 1)
            if not isinstance(key, str) or key in out:
                raise Unreadable("a key that is no string, or is there twice", cut=False)
            out[key], pos = self.value(self._expect(":", self._blank(pos)), depth + 1)
            pos = self._blank(pos)
            if not self._at("}", pos):
                pos = self._blank(self._expect(",", pos))
        return out, pos + 1

    def _strings(self, pos: int) -> tuple[str, int]:
        """Read string literals that stand side by side, which Python joins."""
        out: list[str] = []
        end = pos
        while pos < self._end and self._text[pos] in "'\"":
            piece, end = self._string(pos)
            out.append(piece)
            pos = self._blank(end)
        joined = "".join(out)
        # \ud83d\ude00 is one character in JSON, which models mix with Python.
        return _PAIR.sub(lambda m: m[0].encode("utf-16", "surrogatepass").decode("utf-16"), joined), end

    def _string(self, pos: int) -> tuple[str, int]:
        quote = self._text[pos]
        end = quote * 3 if self._text.startswith(quote * 3, pos) else quote
        pos += len(end)
        out: list[str] = []
        while not self._text.startswith(end, pos):
            match = _PIECES[quote].match(self._text, pos, self._end)
            if match:
                out.append(match[0])
                pos = match.end()
            elif self._char(pos) == "\\":
                piece, pos = self._escape(pos + 1)
                out.append(piece)
            else:  # the quote itself, inside three of them
                out.append(quote)
                pos += 1
        if pos + len(end) > self._end:
            raise Unreadable("an open string", cut=True)
        return "".join(out), pos + len(end)

    def _escape(self, pos: int) -> tuple[str, int]:
        char = self._char(pos)
        if char in _ESCAPES:
            return _ESCAPES[char], pos + 1
        if char == "\n":
            return "", pos + 1
        width = _HEX.get(char, 0)
        digits = self._text[pos + 1 : pos + 1 + width]
        if width and len(digits) == width and re.fullmatch("[0-9a-fA-F]+", digits) and int(digits, 16) < 0x110000:
            return chr(int(digits, 16)), pos + 1 + width
        return "\\" + char, pos + 1  # as Python does

    def _number(self, pos: int) -> tuple[int | float, int]:
        match = _NUMBER.match(self._text, pos, self._end)
        text = match[0].replace("_", "") if match else ""
        try:
            value: int | float = int(text) if text.lstrip("+-").isdecimal() else float(text)
        except ValueError:
            raise Unreadable("no literal", cut=pos >= self._end) from None
        assert match is not None
        after = self._text[match.end() : match.end() + 1]
        if after.isalnum() or (isinstance(value, float) and not math.isfinite(value)):
            raise Unreadable("no finite number", cut=False)
        return value, match.end()

    def _blank(self, pos: int) -> int:
        match = _BLANK.match(self._text, pos, self._end)
        return match.end() if match else pos

    def _char(self, pos: int) -> str:
        if pos >= self._end:
            raise Unreadable("cut off", cut=self._end == len(self._text))
        return self._text[pos]

    def _at(self, what: str, pos: int) -> bool:
        if pos >= self._end:
            raise Unreadable("cut off", cut=self._end == len(self._text))
        return self._text.startswith(what, pos)

    def _expect(self, what: str, pos: int) -> int:
        if not self._at(what, pos):
            raise Unreadable(f"{what} is missing", cut=False)
        return pos + len(what)


def literal(text: str) -> Any:
    """Return the Python literal that ``text`` is, or ``text`` where it is none."""
    reader = LiteralReader(text[:MAX_JSON_CHARS])
    try:
        value, end = reader.value(0)
    except Unreadable:
        return text
    return text if text[end:].strip() or not sane(value) else value


def write_literal(value: Any) -> str:
    """Write a JSON value as a Python literal."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(str(k))}: {write_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(write_literal(v) for v in value) + "]"
    return _quoted(value) if isinstance(value, str) else repr(value)


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Write a call whose arguments are literals. Names that Python cannot write go into ``**{…}``."""
    plain = {k: v for k, v in arguments.items() if _NAME.fullmatch(k) and k.isidentifier()}
    other = {k: v for k, v in arguments.items() if k not in plain}
    parts = [f"{k}={write_literal(v)}" for k, v in plain.items()] + ([f"**{write_literal(other)}"] if other else [])
    return f"{name}({', '.join(parts)})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
