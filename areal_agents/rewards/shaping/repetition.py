"""A punishment for text that repeats itself, by n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.shaping.turns import of_episode, of_turns, require_unit, turns_of, whole, written


def repeated(units: Sequence[Any], n: int) -> list[bool]:
    """Mark the units that lie in an n-gram which occurred before (2502.03373, algorithm 1).

    The first occurrence is not marked. Two occurrences may overlap.
    """
    marked, reach, seen = [False] * len(units), 0, set()
    for start, gram in enumerate(_gram_ids(units, n)):
        if gram in seen:
            for k in range(max(start, reach), start + n):
                marked[k] = True
            reach = start + n
        seen.add(gram)
    return marked


class repetition:
    """Minus the share of what the model wrote that repeats an n-gram from before, in [−1, 0].

        R = −|{t : unit t lies in an n-gram that occurred before}| / |units|

    It is the mean over the text of the token-wise penalty of 2502.03373, over words in place of tokens. N-grams do not
    span two turns, but a turn that says what an earlier one said repeats it. Thoughts and calls count as text. With
    ``per_turn=True`` each turn bears its own part of the sum.
    """

    __name__ = "repetition"

    def __init__(self, n: int = 20, *, unit: Literal["words", "characters"] = "words", per_turn: bool = False) -> None:
        """Choose what repeats.

        Args:
            n: units in an n-gram, at least 2.
            unit: words lie between spaces. Use characters where a script has none.
            per_turn: give each turn its own part.

        Raises:
            ConfigError: an option is out of range.
        """
        require_unit(unit, ("words", "characters"))
        self.n, self.unit, self.per_turn = whole(n, "n", least=2), unit, per_turn

    def __call__(self, episode: Episode) -> Verdict:
        texts = [written(m) for m in turns_of(episode)]
        turns: list[Sequence[str]] = [text.split() if self.unit == "words" else text for text in texts]
        units: list[Any] = []
        for k, turn in enumerate(turns):
            units += [*turn, k]  # an int between turns, each of which occurs once: no n-gram over it is repeated
        marked, total, place = repeated(units, self.n), sum(map(len, turns)), 0
        shares: list[float] = []
        for turn in turns:
            shares.append(0.0 - sum(marked[place : place + len(turn)]) / max(total, 1))
            place += len(turn) + 1
        return of_turns(self.__name__, shares) if self.per_turn else of_episode(self.__name__, float(sum(shares)))


def _gram_ids(units: Sequence[Any], n: int) -> list[int]:
    """Return a number for each n-gram, equal where the n-grams are, in O(L log n): a long text must not cost a turn."""
    ids, size = _dense(units), 1
    while size < n:
        step = min(size, n - size)  # two overlapping grams of a known size make one that is larger
        ids, size = _dense([*zip(ids, ids[step:], strict=False)]), size + step
    return ids


def _dense(values: Sequence[Any]) -> list[int]:
    known: dict[Any, int] = {}
    return [known.setdefault(value, len(known)) for value in values]
