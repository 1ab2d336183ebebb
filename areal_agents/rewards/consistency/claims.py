"""A reward for statements that a model declares, where they do not contradict each other, or the task's facts.

<claim> alice < bob </claim>
<claim> rain implies wet
"""

from __future__ import annotations

import re
from collections.abc import Callable

from areal_agents.errors import ConfigError, RewardError, TaskError
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.consistency.decide import ClaimVerdict, decide
from areal_agents.utils.short_text import short

MAX_CLAIMS = 200
_OPEN, _CLOSED = "<claim>", "</claim>"
_LINE = re.compile(r"[^\n]*")


def claims_of(text: str) -> list[str]:
    """Find what the ``<claim>`` lines of a text say: lines that begin with it, closed or not, in their order."""
    found = []
    for match in _LINE.finditer(text):
        line = match.group().strip()
        if line.startswith(_OPEN):
            found.append(line.removeprefix(_OPEN).removesuffix(_CLOSED).strip())
    return found


def _answer(episode: Episode) -> str | None:
    return episode.answer


class consistent_claims:
    """A reward of 1 where the answer's claims can all be true at once, else 0.

    What cannot be read, or not be decided within bounds, has 0 and the status ``unverifiable``, which is counted. So
    has an answer with fewer than ``at_least`` claims 0. A claim that is always true contradicts nothing: use the reward
    in a ``Gate``, or with facts that a claim may contradict.
    """

    def __init__(
        self, *, at_least: int = 1, facts: str | None = None, read: Callable[[Episode], str | None] = _answer
    ) -> None:
        """Choose what is required.

        Args:
            at_least: the fewest claims that earn anything.
            facts: the key of the task's payload with a list of statements, which hold besides the claims.
            read: returns the text that the claims stand in. The answer by default.

        Raises:
            ConfigError: ``at_least`` is no number of claims.
        """
        if not 0 <= at_least <= MAX_CLAIMS:
            raise ConfigError(f"at_least = {at_least} must be between 0 and {MAX_CLAIMS} claims")
        self._at_least, self._facts, self._read = at_least, facts, read
        self.__name__ = "consistent_claims"

    def __call__(self, episode: Episode) -> Verdict:
        facts = self._given(episode)
        text: object = self._read(episode)
        if not isinstance(text, str | None):
            raise RewardError(f"task {episode.task.id!r}: read returned {short(text)}, which is no text nor None")
        claims = claims_of(text or "")
        enough = len(claims) >= self._at_least
        found = ClaimVerdict("too_large", f"more than {MAX_CLAIMS} claims")
        if len(claims) <= MAX_CLAIMS:
            found = decide([*facts, *claims]) if claims else ClaimVerdict("consistent")
        score = float(enough and found.status == "consistent")
        components = {
            "consistent_claims": score, "claims": float(len(claims)),
            "contradictory": float(found.status == "contradictory"),
        }  # fmt: skip
        decided = found.status in ("consistent", "contradictory")
        return Verdict(score, components, status="ok" if decided else "unverifiable")

    def _given(self, episode: Episode) -> list[str]:
        """Return the task's facts. Raises TaskError for facts that are no statements, or contradict each other."""
        if self._facts is None:
            return []
        given: object = episode.task.payload.get(self._facts)
        if not isinstance(given, list | tuple) or not all(isinstance(fact, str) for fact in given):
            where = f"task {episode.task.id!r}: payload[{self._facts!r}]"
            raise TaskError(f"{where} is {short(given)}, which is no list of statements")
        facts = [str(fact) for fact in given]
        found = decide(facts)
        if found.status != "consistent":
            why = f"{found.status}{f', {found.detail}' if found.detail else ''}"
            raise TaskError(f"task {episode.task.id!r}: the facts in payload[{self._facts!r}] are {why}")
        return facts
