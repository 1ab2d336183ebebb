r"""``boxed_text``: a reward for short answers in words, which compares names and phrases as readers do.

Case, punctuation, accents' composition, spaces and English articles make no difference, as in SQuAD's exact match
(1606.05250), nor does LaTeX that dresses words (``\text{…}``). Everything else does: -5 is not 5, nor 10² 102.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from areal_agents.errors import TaskError
from areal_agents.reward import Episode, sole_boxed
from areal_agents.types import Task
from areal_agents.utils.short_text import cut, short

MAX_CHARS = 1000
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DRESS = re.compile(r"\\(?:text[a-z]{0,6}|math(?:rm|bf|it|sf|tt)|mbox|emph)\s*(?=\{)")
_RAISED = re.compile(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2080-\u2089\u2150-\u215f])")
"""Where a small digit or a fraction follows a number, which would become its next digits."""
_MINUS = re.compile(r"(?<![\w-])[-\u2010\u2012-\u2014\u2212](\s*)(?=(?:\\[a-z]+\s*)?[^\w\s]{0,2}\d)")
"""What may be the sign of the number after it, -\\frac{1}{2} included."""


def plain_words(text: str) -> str:
    """Return the words of a text, without what makes no difference."""
    folded = unicodedata.normalize("NFKC", _RAISED.sub(" ", _DRESS.sub("", text))).casefold()
    minus = {found.start() for found in _MINUS.finditer(folded) if _is_sign(folded, found)}
    kept = ("-" if i in minus else c if unicodedata.category(c)[0] not in "PS" else " " for i, c in enumerate(folded))
    words = " ".join("".join(kept).split()).replace("- ", "-")  # -$5 is $-5
    return " ".join(_ARTICLES.sub(" ", words).split()) or words


def _is_sign(text: str, found: re.Match[str]) -> bool:
    """Say whether it is no dash, as between two numbers (1990 - 1995), and behind a word with a space on each side."""
    before = text[: found.start()].rstrip()[-1:]
    return not before.isdigit() and not (found[1] and before.isalnum())


class _BoxedText:
    __name__ = "correct"

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, episode: Episode) -> float:
        golds = self._golds(episode.task)
        said = sole_boxed(episode.answer or "")
        return float(said is not None and len(said) <= MAX_CHARS and plain_words(said) in map(plain_words, golds))

    def require_scorable(self, task: Task) -> None:
        """Raise TaskError where the task has no gold answer with a word in it."""
        self._golds(task)

    def _golds(self, task: Task) -> list[str]:
        found = task.payload.get(self._key)
        listed: list[object] = list(found) if isinstance(found, list | tuple) else [found]
        golds = [g for g in listed if isinstance(g, str) and plain_words(g)]
        if not golds or len(golds) < len(listed):
            raise TaskError(
                f"task {cut(task.id, 120)!r}: payload[{self._key!r}] = {short(found)} is no text, nor a list of them"
            )
        return golds


def boxed_text(key: str = "answer") -> Callable[[Episode], float]:
    r"""Make a reward that compares the answer's only ``\boxed{…}`` with the texts in ``task.payload[key]``.

    It is 1 where it is one of them, else 0.
    """
    return _BoxedText(key)
