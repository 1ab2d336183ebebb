"""Rewards for the length of what the model wrote.

Lengths are sampled tokens, or characters where that is said. Tokens are known in training, and in evaluations of models
whose server counts them. Where they are not, as in the scripted episodes of ``areal-agents check``, the verdict is 0
with the status ``unverifiable``, which is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, RewardLike, Verdict, judge, judging_seconds
from areal_agents.rewards.shaping.turns import Unit, lengths_of, number, of_episode, of_turns, require_unit, whole
from areal_agents.utils.tolerance import reaches

_UNITS = ("tokens", "characters")


def soft_overlong(length: float, *, max_length: int, cache: int) -> float:
    """Compute DAPO's soft overlong punishment, in [−1, 0] (2503.14476, eq. 13).

    R(y) = 0                                   where |y| ≤ L_max − L_cache
           ((L_max − L_cache) − |y|) / L_cache     where L_max − L_cache < |y| ≤ L_max
           −1                                  where L_max < |y|
    """
    free = max_length - cache
    if length <= free:
        return 0.0
    return -1.0 if length > max_length else (free - length) / cache


class overlong:
    """DAPO's soft overlong punishment: 0 up to ``max_length − cache``, then falling to −1 at ``max_length``.

        overlong(16384 + 4096, cache=4096)          # as in the paper, in tokens of the episode

    The length is that of all the model's turns. With ``per_turn=True`` each turn has the limit to itself, and the
    punishments of turns add up. Set ``max_length`` to no more than what the run lets the model write: beyond it,
    messages are cut.
    """

    __name__ = "overlong"

    def __init__(self, max_length: int, *, cache: int, unit: Unit = "tokens", per_turn: bool = False) -> None:
        """Choose the limit.

        Args:
            max_length: L_max, from which on the punishment is −1.
            cache: L_cache, over which it grows, in 1 … ``max_length``.
            unit: what lengths are counted in.
            per_turn: punish each turn for its own length.

        Raises:
            ConfigError: an option is out of range.
        """
        require_unit(unit, _UNITS)
        self.max_length, self.cache = whole(max_length, "max_length", least=1), whole(cache, "cache", least=1)
        if cache > max_length:
            raise ConfigError(f"cache = {cache} is over max_length = {max_length}")
        self.unit, self.per_turn = unit, per_turn

    def __call__(self, episode: Episode) -> Verdict:
        lengths = lengths_of(episode, self.unit)
        if lengths is None:
            return Verdict(0.0, {self.__name__: 0.0}, status="unverifiable")
        if self.per_turn and lengths:
            return of_turns(self.__name__, [self._of(n) for n in lengths])
        return of_episode(self.__name__, self._of(sum(lengths)))

    def _of(self, length: int) -> float:
        return soft_overlong(length, max_length=self.max_length, cache=self.cache)


def kimi_length_rewards(lengths_G: Sequence[float], correct_G: Sequence[bool]) -> list[float]:
    """Compute Kimi k1.5's length rewards of one group, each in [−0.5, 0.5] (2501.12599, section 2.3.3).

    λ_i = 0.5 − (len_i − min_len) / (max_len − min_len)
    R_i = λ_i where answer i is right, min(0, λ_i) where it is wrong; 0 for all where max_len = min_len
    """
    shortest, longest = min(lengths_G), max(lengths_G)
    if shortest == longest:
        return [0.0] * len(lengths_G)
    lambdas = [0.5 - (n - shortest) / (longest - shortest) for n in lengths_G]
    return [x if right else min(0.0, x) for x, right in zip(lambdas, correct_G, strict=True)]


class kimi_length:
    """Kimi k1.5's length reward, which compares the episodes of a group: the shortest right answer earns most.

        group_rubric = kimi_length(boxed_number(), weight=0.2)

    It is a group reward. It is added to what the episodes earned, and each verdict depends on the others, so it is part
    of the baseline that it is compared with. Where ``correct`` cannot say what is right, its status is the verdict's.
    """

    __name__ = "kimi_length"
    adds = True
    reads_others = True

    def __init__(
        self, correct: RewardLike, *, weight: float = 1.0, unit: Unit = "tokens", threshold: float = 1.0
    ) -> None:
        """Choose what counts as right.

        Args:
            correct: the reward that says which answers are right. It is asked once more for each episode.
            weight: what the length reward is multiplied by.
            unit: what lengths are counted in, over all the model's turns.
            threshold: the score from which on an answer is right.

        Raises:
            ConfigError: an option is out of range.
        """
        require_unit(unit, _UNITS)
        self.correct, self.inner_rewards, self.unit = correct, (correct,), unit
        self.seconds = judging_seconds(correct)
        self.weight, self.threshold = number(weight, "weight"), number(threshold, "threshold")

    async def __call__(self, episodes: Sequence[Episode]) -> Sequence[Verdict]:
        if not episodes:
            return []
        lengths = [lengths_of(e, self.unit) for e in episodes]
        if any(n is None for n in lengths):  # one unknown length leaves nothing to compare the others with
            return [Verdict(0.0, {self.__name__: 0.0}, status="unverifiable") for _ in episodes]
        found = await self._judged(episodes)
        totals = [float(sum(n or ())) for n in lengths]
        shaped = kimi_length_rewards(totals, [reaches(v.score, self.threshold) for v in found])
        verdicts = [of_episode(self.__name__, self.weight * x) for x in shaped]
        return [replace(mine, status=v.status) for mine, v in zip(verdicts, found, strict=True)]

    async def _judged(self, episodes: Sequence[Episode]) -> list[Verdict]:
        """Ask which answers are right, all at once: a group has no more time than the slowest needs."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(judge(self.correct, e, name="correct")) for e in episodes]
        except ExceptionGroup as errors:  # the rest were cancelled
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        return [task.result() for task in tasks]
