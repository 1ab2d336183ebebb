"""Multiple choice: a letter, or a letter with its text. (B) 12 is B, and is 12, but is not (B) 13."""

from __future__ import annotations

import re

from areal_agents.rewards.mathematics.lexer import MAX_CHARS

_STYLE = r"(?:\\(?:text|textbf|textrm|textit|mathrm|mathbf|bf)\s*\{?\s*)?"
_CHOICE = re.compile(
    rf"\s*(?:(?:the\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s*)?{_STYLE}"
    rf"(?:\(\s*{_STYLE}([A-J])\s*\}}?\s*\)|([A-J])(?:[).]|:(?!\s*[A-Z]\b)))(?=[\s~\\}}$]|$)"
    r"[\s~}$]*(?:\\[ ,;quad]{1,5}[\s~]*)?(.*)",
    re.DOTALL,
)
_LETTER = re.compile(rf"\s*(?:(?:the\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s*)?{_STYLE}\(?([A-J])\)?\s*\}}?\s*")
_ANOTHER = re.compile(
    rf"\(\s*{_STYLE}[A-J]\s*\}}?\s*\)|(?<![A-Za-z\\])[A-J][).:]|^[\s\\tex{{]*(?:or|and)\b|^\s*[,;/|&]"
)
"""Of a second choice: (A) 5 or (B) 6 is none."""


def choice(text: str) -> tuple[str, str] | None:
    """Return the letter and the text of a choice. The text is "" for a letter alone. None where it is no choice."""
    if len(text) > MAX_CHARS:
        return None
    alone = _LETTER.fullmatch(text)
    if alone is not None:
        return alone[1], ""
    found = _CHOICE.fullmatch(text)
    if found is None or _ANOTHER.search(found[3]):
        return None
    said = found[3].strip()
    if said.count("}") > said.count("{"):  # \textbf{(B) 12}
        said = said.removesuffix("}")
    return found[1] or found[2], said
