"""A reward for the script that the model writes in, by Unicode's names of letters."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.shaping.turns import mean_of_turns, of_episode, turns_of, written
from areal_agents.utils.short_text import short

SCRIPTS = {
    "arabic": ("ARABIC",), "armenian": ("ARMENIAN",), "bengali": ("BENGALI",), "cyrillic": ("CYRILLIC",),
    "devanagari": ("DEVANAGARI",), "ethiopic": ("ETHIOPIC",), "georgian": ("GEORGIAN",), "greek": ("GREEK",),
    "gujarati": ("GUJARATI",), "gurmukhi": ("GURMUKHI",), "han": ("CJK", "IDEOGRAPHIC"), "hangul": ("HANGUL",),
    "hebrew": ("HEBREW",), "hiragana": ("HIRAGANA",), "kannada": ("KANNADA",), "katakana": ("KATAKANA",),
    "khmer": ("KHMER",), "lao": ("LAO",), "latin": ("LATIN",), "malayalam": ("MALAYALAM",), "myanmar": ("MYANMAR",),
    "sinhala": ("SINHALA",), "tamil": ("TAMIL",), "telugu": ("TELUGU",), "thai": ("THAI",), "tibetan": ("TIBETAN",),
}  # fmt: skip
"""By name: how Unicode's names of their letters begin."""
_OF_WORD = {word: script for script, words in SCRIPTS.items() for word in words}


class script:
    """The share of letters that are of the declared scripts, in [0, 1].

        script("latin")                          # English, German, Vietnamese, …
        script("han", "hiragana", "katakana")    # Japanese
        R = |letters of these scripts| / |letters, without those of ``allowed`` scripts|

    It tells scripts apart, not languages: English and German are both Latin. A letter is what Unicode calls one
    (category L), each in its compatibility form, so that a fullwidth A is an A. Digits, signs, marks and spaces are
    none. A text without letters has none of another script and scores 1. Thoughts and calls count as text. LaTeX
    commands and code are Latin: ``allowed=["latin"]`` leaves such letters out. With ``per_turn=True`` each of K turns
    earns a K-th of its own share, else all letters count alike.
    """

    def __init__(self, *scripts: str, allowed: Iterable[str] = (), per_turn: bool = False) -> None:
        beside = (allowed,) if isinstance(allowed, str) else tuple(allowed)
        if not scripts:
            raise ConfigError(f"script: name at least one of {', '.join(SCRIPTS)}")
        for name in (*scripts, *beside):
            if not isinstance(name, str) or name not in SCRIPTS:
                raise ConfigError(f"script: there is no {short(name)}: use {', '.join(SCRIPTS)}")
        self.scripts, self.allowed = frozenset(scripts), frozenset(beside)
        if both := self.scripts & self.allowed:
            raise ConfigError(f"script: {min(both)!r} is asked for and allowed beside: choose one")
        self.per_turn = per_turn
        self.__name__ = f"script({','.join(scripts)})"

    def __call__(self, episode: Episode) -> Verdict:
        counts = [self._count(written(m)) for m in turns_of(episode)]
        if self.per_turn and counts:
            return mean_of_turns(self.__name__, [_share(own, others) for own, others in counts])
        own, others = sum(own for own, _ in counts), sum(others for _, others in counts)
        return of_episode(self.__name__, _share(own, others))

    def _count(self, text: str) -> tuple[int, int]:
        """Return the letters of the declared scripts, and those of others that are not allowed."""
        own = others = 0
        for character, times in Counter(text).items():  # a long text has few different characters
            for part in unicodedata.normalize("NFKC", character):
                found = script_of(part)
                if found in self.scripts:
                    own += times
                elif found is not None and found not in self.allowed:
                    others += times
        return own, others


def script_of(character: str) -> str | None:
    """Return the script of a letter, ``other`` for one of no script above, or None for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return None
    name = unicodedata.name(character, "")
    if name.startswith("MODIFIER LETTER"):  # it belongs to the letter beside it
        return None
    return _OF_WORD.get(name.replace("-", " ").partition(" ")[0], "other")


def _share(own: int, others: int) -> float:
    return own / (own + others) if own + others else 1.0
