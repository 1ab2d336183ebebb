"""Multiple choice: a letter, or a letter with the text of its choice, such as (B), B. 12 cm and \\text{(B) } 12 cm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from areal_agents.rewards.mathematics.lexer import MAX_CHARS

Equal = Callable[[str, str], bool]
Choices = tuple[tuple[str, str], ...]
"""Letters with their texts."""

_WORDS_IN = re.compile(r"\\(?:text(?:bf|rm|it|normal)?|math(?:rm|bf|it)|mbox|bf|rm)\s*\{([^{}]*)\}")
_TYPESETTING = re.compile(r"\\[ ,;:!]|\\q?quad(?![A-Za-z])|(?<!\\)\$|~|\*\*")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is)?\s*:?\s*)?"
    r"(?:\(\s*([A-Za-z])\s*\)[.:]?|([A-Za-z])\s*[.):]|([A-Za-z])(?=\s*$))\s*(.{0,2000})",
    re.IGNORECASE | re.DOTALL,
)
_SEVERAL = re.compile(r"(?:\(?[A-Z]\)?(?:\s*[,;&]\s*|\s+and\s+|\s*)){2,26}")
_OTHERS = re.compile(r"(?:^|[^A-Za-z])[A-J](?![A-Za-z'])|^\s*(?:or|and)\b")
"""A further letter behind the first, where nothing says what its text is: "A or B", "(A) (B)"."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    letters: frozenset[str]
    text: str = ""
    """What stands behind a single letter."""


def as_choices(given: Any) -> Choices:
    """Read choices: {"A": "10 cm", …}, or a list of texts, which are called A, B, … in their order.

    Raises ValueError where they are none.
    """
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list | tuple):
        pairs = [tuple(x) if isinstance(x, list | tuple) else (chr(65 + i), x) for i, x in enumerate(given)]
    else:
        raise ValueError(f"choices = {given!r:.80} are neither a table of letters nor a list of texts")
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(x, str) for x in pair) or not re.fullmatch("[A-Z]", pair[0]):
            raise ValueError(f"choices: {pair!r:.80} is no capital letter with a text")
    if len({letter for letter, _ in pairs}) != len(pairs):
        raise ValueError("choices name a letter twice")
    return tuple(pairs)


def equal_choices(gold: str, answer: str, choices: Choices, equal: Equal) -> bool | None:
    """Say whether two answers are the same choice, or None where they are no multiple choice.

    Args:
        gold: the right answer.
        answer: of the model.
        choices: that the task declares. Empty: a gold answer with a text says what its letter means.
        equal: compares two texts.
    """
    if choices:
        meant = _declared(gold, choices, equal)
        return None if meant is None else meant == _declared(answer, choices, equal)
    right, said = _labelled(gold), _labelled(answer)
    if right is None:
        return True if said is not None and said.text and equal(gold, said.text) else None
    if said is None:
        return equal(right.text, answer) if right.text else None
    if right.letters != said.letters:
        return False
    return not right.text or not said.text or equal(right.text, said.text)


def is_choice(gold: str, choices: Choices) -> bool:
    """Say whether a gold answer is a letter, or a letter with a text."""
    found = _labelled(gold)
    return found is not None and found.letters <= ({letter for letter, _ in choices} or found.letters)


def _declared(text: str, choices: Choices, equal: Equal) -> frozenset[str] | None:
    """Return the letters of the choices that a text names: by letter, by letter with the right text, or by a text."""
    texts = dict(choices)
    plain = _plain(text)
    if _SEVERAL.fullmatch(plain):
        letters = re.findall("[A-Z]", plain)
        if set(letters) <= set(texts):
            return frozenset(letters)
    meant = [letter for letter, means in choices if equal(means, text)]
    found = _letter(plain)
    if found is not None and found[0].upper() in texts and len(meant) != 1:
        letter, rest = found[0].upper(), found[1]
        return frozenset(letter) if not rest or equal(texts[letter], rest) else None
    return frozenset(meant) if len(meant) == 1 else None


def _labelled(text: str) -> _Chosen | None:
    """Read a capital letter, with or without a text, where no choices are declared."""
    found = _letter(_plain(text))
    if found is None or not found[0].isupper() or _OTHERS.search(found[1]):
        return None
    return _Chosen(frozenset(found[0]), found[1])


def _letter(plain: str) -> tuple[str, str] | None:
    match = _LETTER.fullmatch(plain)
    if match is None:
        return None
    return match[1] or match[2] or match[3], match[4].strip(" .")


def _plain(text: str) -> str:
    if len(text) > MAX_CHARS:
        return ""
    return " ".join(_TYPESETTING.sub(" ", _WORDS_IN.sub(r" \1 ", text)).split())
