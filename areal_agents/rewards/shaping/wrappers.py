"""Rewards round another reward: its numbers are cut off at bounds, or brought to another range."""

from __future__ import annotations

from areal_agents.errors import ConfigError, RewardError
from areal_agents.reward import Episode, RewardLike, Verdict, judge
from areal_agents.rewards.shaping.turns import number
from areal_agents.utils.short_text import short
from areal_agents.utils.tolerance import TOLERANCE


class _Wrapper:
    """A reward round ``reward``, with two bounds. Components and status stay those of the reward inside."""

    def __init__(self, reward: RewardLike, low: float, high: float) -> None:
        if not callable(reward) or isinstance(reward, type):
            raise ConfigError(f"{type(self).__name__} takes a reward, not {short(reward)}")
        if hasattr(reward, "reads_others"):
            raise ConfigError(f"{type(self).__name__} takes the reward of one episode, not of a group: {short(reward)}")
        self.reward, self.inner_rewards = reward, (reward,)
        self.low, self.high = number(low, "low"), number(high, "high")
        if not self.low < self.high:
            raise ConfigError(f"low = {self.low:g} must be under high = {self.high:g}")
        self.__name__ = str(getattr(reward, "__name__", type(reward).__name__))


class Clip(_Wrapper):
    """A reward whose score is cut off at ``low`` and ``high``.

        Clip(WeightedSum({"calls": tool_cost(per_call=0.01), "length": overlong(2048, cache=512)}), low=-1.0, high=0.0)

    Where the reward gives one number a turn, S_k is the sum of the first k of them, and turn k gets
    clip(S_k) − clip(S_{k−1}), with clip(S_0) = 0 for the first turn. So the turns still add up to the clipped score,
    and a turn that goes on beyond a bound gains nothing. ``each_turn=True`` cuts off each turn's number instead, which
    bounds no sum.
    """

    def __init__(self, reward: RewardLike, *, low: float, high: float, each_turn: bool = False) -> None:
        super().__init__(reward, low, high)
        self.each_turn = each_turn

    async def __call__(self, episode: Episode) -> Verdict:
        inner = await judge(self.reward, episode)
        if not inner.turn_rewards:
            return Verdict(self._clip(inner.score), inner.components, inner.turn_rewards, inner.status)
        if self.each_turn:
            turns = [self._clip(x) for x in inner.turn_rewards]
            return Verdict(float(sum(turns)), inner.components, tuple(turns), inner.status)
        turns, total, paid = [], 0.0, 0.0
        for x in inner.turn_rewards:
            total += x
            turns.append(self._clip(total) - paid)
            paid = self._clip(total)
        return Verdict(float(sum(turns)), inner.components, tuple(turns), inner.status)

    def _clip(self, x: float) -> float:
        return min(max(x, self.low), self.high)


class Normalize(_Wrapper):
    """A reward brought from its declared range to [0, 1], or to ``to``.

        R' = a + (b − a) · (R − low) / (high − low)          to = (a, b)

        Normalize(judge_from_1_to_10, low=1, high=10)

    The range is declared and fixed. It is not measured as the run goes: a running mean and deviation would be state
    that rollout workers do not share, that makes one answer worth more today than tomorrow, and that ``rescore`` could
    not compute again. What is comparable within a group is the advantage's affair (``algorithm.advantage``), which
    takes a mean and, with ``grpo``, a deviation off.

    A score outside of the range raises RewardError, because the declaration is wrong: put ``Clip`` inside where it may
    happen. Where the reward gives one number a turn, each is multiplied by (b − a)/(high − low), and what is added to
    the sum is added on the last turn.
    """

    def __init__(self, reward: RewardLike, *, low: float, high: float, to: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__(reward, low, high)
        if not isinstance(to, tuple | list) or len(to) != 2:
            raise ConfigError(f"to = {short(to)}: give two numbers")
        self.to = (number(to[0], "to[0]"), number(to[1], "to[1]"))
        if not self.to[0] < self.to[1]:
            raise ConfigError(f"to = {self.to}: the first number must be under the second")

    async def __call__(self, episode: Episode) -> Verdict:
        inner = await judge(self.reward, episode)
        turns = inner.turn_rewards
        score = float(sum(turns)) if turns else inner.score
        slack = TOLERANCE * max(1.0, abs(self.low), abs(self.high))
        if not self.low - slack <= score <= self.high + slack:
            raise RewardError(
                f"reward {self.__name__!r} scored {score:g} on task {episode.task.id!r}, outside of the range from "
                f"{self.low:g} to {self.high:g} that Normalize was given: mend the range, or wrap it in Clip first"
            )
        start, end = self.to
        scale = (end - start) / (self.high - self.low)
        if not turns:
            return Verdict(start + scale * (score - self.low), inner.components, turns, inner.status)
        scaled = [scale * x for x in turns]
        scaled[-1] += start - scale * self.low
        return Verdict(float(sum(scaled)), inner.components, tuple(scaled), inner.status)
