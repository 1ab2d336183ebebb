from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

from areal_agents.errors import ConfigError, RewardError
from areal_agents.reward import Episode, Gate, Verdict, WeightedSum, judge
from areal_agents.rewards.shaping import Clip, Normalize, kimi_length, one_box, overlong
from tests.rewards.shaping.episodes import episode, say


class fixed:
    """A reward that always gives the same verdict."""

    def __init__(self, score: float, *turns: float, status: Any = "ok") -> None:
        self.verdict = Verdict(score, {"raw": score}, turns or None, status)

    def __call__(self, episode: Episode) -> Verdict:
        return self.verdict


def of(reward: Any, *turns: Any) -> Verdict:
    return asyncio.run(judge(reward, episode(*(turns or ("12",)))))


def test_clip_of_a_score() -> None:
    assert [of(Clip(fixed(x), low=-1, high=1)).score for x in (-3.0, -1.0, 0.5, 7.0)] == [-1.0, -1.0, 0.5, 1.0]
    assert of(Clip(fixed(3.0, status="timeout"), low=0, high=1)) == Verdict(1.0, {"raw": 3.0}, status="timeout")


def test_clipped_turns_add_up_to_the_clipped_score() -> None:
    # sums 0.75, 1.5, 1.25, 0.25 are cut off to 0.75, 1, 1, 0.25
    found = of(Clip(fixed(0.25, 0.75, 0.75, -0.25, -1.0), low=-1, high=1), "a", "b", "c", "d")
    assert (found.score, found.turn_rewards) == (0.25, (0.75, 0.25, 0.0, -0.75))
    base = of(Clip(fixed(0.0, 0.0, 0.0), low=0.5, high=1), "a", "b")
    assert (base.score, base.turn_rewards) == (0.5, (0.5, 0.0))


def test_each_turn_may_be_clipped_by_itself() -> None:
    found = of(Clip(fixed(4.0, 3.0, 3.0, -2.0), low=-1, high=1, each_turn=True), "a", "b", "c")
    assert (found.score, found.turn_rewards) == (1.0, (1.0, 1.0, -1.0))


def test_normalize() -> None:
    assert [of(Normalize(fixed(x), low=1, high=5)).score for x in (1.0, 2.0, 5.0)] == [0.0, 0.25, 1.0]
    assert of(Normalize(fixed(2.0), low=1, high=5, to=(-1, 1))).score == -0.5
    found = of(Normalize(fixed(2.0, 2.0, 0.0), low=-2, high=6), "a", "b")
    assert (found.score, found.turn_rewards) == (0.5, (0.25, 0.25))  # 2/8, and 0/8 + 2/8 on the last turn


@pytest.mark.parametrize("x", [0.99, 5.01])
def test_a_score_outside_of_the_declared_range_is_an_error(x: float) -> None:
    with pytest.raises(RewardError, match="outside of the range from 1 to 5"):
        of(Normalize(fixed(x), low=1, high=5))
    assert 0.0 <= of(Normalize(Clip(fixed(x), low=1, high=5), low=1, high=5)).score <= 1.0


def test_they_compose_with_rubrics() -> None:
    def correct(episode: Episode) -> bool:
        return episode.answer == r"\boxed{12}"

    inner = WeightedSum({"length": (overlong(10, cache=10), 3.0), "box": one_box()})
    rubric = Gate({"correct": correct, "style": (Clip(inner, low=-1, high=1), 0.5)})
    right = of(rubric, say(r"\boxed{12}", tokens=5))  # 3 · (−0.5) + 1 = −0.5
    assert (right.score, right.components["style"], right.components["style.length"]) == (0.75, -0.5, -0.5)
    long = of(rubric, say(r"\boxed{12}", tokens=100))  # 3 · (−1) + 1 = −2, cut off to −1
    assert (long.score, long.components["style"]) == (0.5, -1.0)
    assert of(rubric, say("no", tokens=100)).score == 0.0
    gate = of(Clip(Gate({"correct": correct, "box": one_box()}), low=0, high=1), say(r"\boxed{12}", tokens=1))
    assert (gate.score, gate.components["correct"]) == (1.0, 1.0)  # 1 + 1, cut off
    assert pickle.loads(pickle.dumps(Clip(one_box(), low=0, high=1))).high == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clip(fixed(0), low=1, high=1), lambda: Clip(fixed(0), low=1, high=0),
        lambda: Clip(fixed(0), low=float("-inf"), high=0), lambda: Normalize(fixed(0), low=2, high=1),
        lambda: Normalize(fixed(0), low=0, high=1, to=(1, 0)), lambda: Normalize(fixed(0), low=0, high=1, to=(1,)),  # type: ignore[arg-type]
        lambda: Clip("x", low=0, high=1), lambda: Clip(fixed, low=0, high=1),  # type: ignore[arg-type]
        lambda: Clip(kimi_length(one_box()), low=0, high=1),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_options_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
