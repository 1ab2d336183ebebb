"""Other ways to write an answer, as the grammar reads it: combinations, numbers of a base.

Each is one more reading, beside that of the text as it stands: C_1^2 may be a constant's square too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_ARG = r"(?:\d{1,6}|[a-z](?:[+-]\d{1,3})?)"
_IN = rf"\{{?\s?({_ARG})\s?\}}?"
_LETTER = r"(?:\\(?:text|mathrm|operatorname|mathbf)\s?\{\s?(%s)\s?\}|(?<![A-Za-z\\])(%s))"
_NAMED = re.compile(
    r"(?<![A-Za-z])\\?(?:(?P<c>binom|binomial|comb|nCr|nCk)|(?P<p>nPr|nPk|perm|permutations?))"
    rf"\s?\(\s?({_ARG})\s?[,;]\s?({_ARG})\s?\)"
)
_CALL = re.compile(_LETTER % ("[CP]", "[CP]") + rf"\s?\(\s?({_ARG})\s?[,;]\s?({_ARG})\s?\)")
_BEFORE = re.compile(r"(?:\{\s?\})?[\^_]" + _IN + r"\s?" + _LETTER % ("[CPA]", "[CPA]") + r"\s?_" + _IN)
_BEHIND = re.compile(
    _LETTER % ("[CPA]", "[CPA]") + r"\s?(?:_" + _IN + r"\s?\^" + _IN + r"|\^" + _IN + r"\s?_" + _IN + ")"
)
_BETWEEN = re.compile(r"(?<![\w.])(\d{1,6})\s?([CP])\s?(\d{1,6})(?![\w.])")
_CHOOSE = re.compile(rf"(?<![\w.])({_ARG})\s?(?:\\choose\b|\bchoose\b)\s?({_ARG})(?![\w.])")

_WORDS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "sixteen": 16, "binary": 2, "octal": 8, "decimal": 10, "hex": 16, "hexadecimal": 16,
}  # fmt: skip
_WHICH = r"(\d{1,2}|two|three|four|five|six|seven|eight|nine|ten|twelve|sixteen)"
_DIGITS = r"((?=[A-Fa-f]*\d|[A-F]|[a-f]{2})[0-9A-Fa-f]{1,64}(?:\.[0-9A-Fa-f]{1,64})?)"
_SAID = re.compile(
    rf"\s*(?:\\text\s?\{{)?{_DIGITS}\}}?\s?(?:\\text\s?\{{\s?)?(?:\(\s?)?"
    rf"(?:(?:in\s)?base[\s-]?{_WHICH}|(?:in\s)?(binary|octal|decimal|hex|hexadecimal))(?:\s?\))?(?:\s?\}})?\s*"
)
_INDEX = re.compile(
    rf"(?<![\w.\\])(?:\(\s?{_DIGITS}\s?\)|{_DIGITS})\s?_\s?"
    rf"(?:\{{\s?(?:\\text\s?\{{)?\s?(?:base)?\s?\}}?\s?{_WHICH}\s?\}}?\s?\}}|{_WHICH})(?![\w.])"
)


def others(text: str) -> list[str]:
    """Return other spellings of an answer, none where there are none."""
    found = []
    spelt = text
    for pattern, put in _COUNTED:
        spelt = pattern.sub(put, spelt)
    if spelt != text:
        found.append(spelt)
    said = _SAID.fullmatch(text)
    based = f"{said[1].upper()}_{{{_base(said[2] or said[3])}}}" if said else _INDEX.sub(_indexed, text)
    if based != text:
        found.append(based)
    return found


def _written(letter: str, n: str, k: str) -> str:
    return rf"\binom{{{n}}}{{{k}}}" if letter == "C" else rf"\frac{{({n})!}}{{({n}-({k}))!}}"


def _call(match: re.Match[str]) -> str:
    return _written("C" if match["c"] else "P", match[3], match[4])


def _called(match: re.Match[str]) -> str:
    return _written(match[1] or match[2], match[3], match[4])


def _before(match: re.Match[str]) -> str:
    return _written(match[2] or match[3], match[1], match[4])


def _behind(match: re.Match[str]) -> str:
    n, k = match[3] or match[6], match[4] or match[5]
    if n.isdigit() and k.isdigit() and int(n) < int(k):  # some write the larger one above
        n, k = k, n
    return _written(match[1] or match[2], n, k)


def _between(match: re.Match[str]) -> str:
    return _written(match[2], match[1], match[3])


_COUNTED: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (_NAMED, _call), (_CALL, _called), (_BEFORE, _before), (_BEHIND, _behind), (_BETWEEN, _between),
    (_CHOOSE, lambda match: _written("C", match[1], match[2])),
)  # fmt: skip


def _base(name: str) -> int:
    return _WORDS[name] if name in _WORDS else int(name)


def _indexed(match: re.Match[str]) -> str:
    return f"{(match[1] or match[2]).upper()}_{{{_base(match[3] or match[4])}}}"
