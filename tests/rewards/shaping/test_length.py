from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest

from areal_agents.errors import ConfigError
from areal_agents.group_reward import declaration
from areal_agents.reward import Episode, Verdict, judge, judging_seconds, task_checks
from areal_agents.rewards import code
from areal_agents.rewards.shaping import kimi_length, overlong
from areal_agents.rewards.shaping.length import kimi_length_rewards, soft_overlong
from tests.rewards.shaping.episodes import episode, say


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0)]
)
def test_soft_overlong(length: int, reward: float) -> None:
    assert soft_overlong(length, max_length=100, cache=20) == pytest.approx(reward)  # (80 − length) / 20


def test_the_whole_range_may_be_cache() -> None:
    assert [soft_overlong(n, max_length=4, cache=4) for n in range(6)] == [0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


def test_lengths_are_those_of_all_turns_or_of_each() -> None:
    talk = episode(say("a", tokens=50), say("b", tokens=40), say("c", tokens=95))
    assert overlong(200, cache=40)(talk).score == -(185 - 160) / 40
    found = overlong(100, cache=20, per_turn=True)(talk)
    assert (found.score, found.turn_rewards) == (-0.75, (0.0, 0.0, -0.75))
    assert overlong(100, cache=20)(episode()).score == 0.0


def test_characters_are_counted_where_that_is_said() -> None:
    assert overlong(10, cache=10, unit="characters")(episode("12345", "67")).score == -0.7


def test_unknown_tokens_are_never_taken_for_none() -> None:
    unknown = episode(say("a", tokens=5000), say("b"))
    assert unknown.tokens is None
    assert episode(say("a", tokens=5000), say("b", tokens=0)).tokens == 5000
    found = overlong(100, cache=20)(unknown)
    assert (found.score, found.status, found.turn_rewards) == (0.0, "unverifiable", None)


def test_kimi_compares_within_the_group() -> None:
    # λ = 0.5 − (len − 100) / 200: 0.5, 0.25, 0, −0.5
    lengths = [100, 150, 200, 300]
    assert kimi_length_rewards(lengths, [True] * 4) == [0.5, 0.25, 0.0, -0.5]
    assert kimi_length_rewards(lengths, [False] * 4) == [0.0, 0.0, 0.0, -0.5]
    assert kimi_length_rewards(lengths, [False, True, True, True]) == [0.0, 0.25, 0.0, -0.5]
    assert kimi_length_rewards([7, 7], [True, False]) == [0.0, 0.0]
    assert kimi_length_rewards([7], [True]) == [0.0]


def right(episode: Episode) -> bool:
    return episode.answer == "12"


def test_kimi_is_a_group_reward() -> None:
    reward = pickle.loads(pickle.dumps(kimi_length(right, weight=0.5)))
    assert (reward.adds, reward.reads_others) == (True, True)
    group = [episode(say("12", tokens=10)), episode(say("12", tokens=30)), episode(say("3", tokens=10))]
    assert [v.score for v in asyncio.run(reward(group))] == [0.25, -0.25, 0.0]
    letters = kimi_length(right, unit="characters")
    assert [v.score for v in asyncio.run(letters([episode("12"), episode("1212")]))] == [0.5, -0.5]
    unknown = asyncio.run(reward([*group, episode("12")]))
    assert [(v.score, v.status) for v in unknown] == [(0.0, "unverifiable")] * 4
    assert asyncio.run(reward([])) == []


def test_a_score_that_is_1_but_for_rounding_is_right() -> None:
    group = [episode(say("1", tokens=10)), episode(say("2", tokens=30))]
    assert sum([0.1] * 10) < 1.0
    assert [v.score for v in asyncio.run(kimi_length(lambda e: sum([0.1] * 10))(group))] == [0.5, -0.5]


def test_what_kimi_asks_for_right_answers_keeps_its_time_its_checks_and_its_doubts() -> None:
    held = asyncio.Event()

    async def doubtful(episode: Episode) -> Verdict:
        """Returns once both episodes are asked about."""
        if episode.answer == "1":
            await held.wait()
        held.set()
        return Verdict(1.0) if episode.answer == "1" else Verdict(0.0, status="timeout")

    group = [episode(say("1", tokens=10)), episode(say("2", tokens=30))]
    found = asyncio.run(asyncio.wait_for(kimi_length(doubtful)(group), 60))
    assert [(v.score, v.status) for v in found] == [(0.5, "ok"), (-0.5, "timeout")]
    program = code()
    solved = kimi_length(program)
    assert declaration(solved, "it").seconds == judging_seconds(program) == 1800.0
    assert task_checks(solved) == (program.require_scorable,)

    def breaks(episode: Episode) -> float:
        raise KeyError("gold")

    with pytest.raises(KeyError, match="gold"):
        asyncio.run(kimi_length(breaks)(group))


def test_it_can_be_judged_like_any_reward() -> None:
    found = asyncio.run(judge(overlong(10, cache=5), episode(say("a", tokens=9))))
    assert dict(found.components) == {"overlong": -0.8}


@pytest.mark.parametrize(
    "make",
    [
        lambda: overlong(0, cache=1), lambda: overlong(10, cache=0), lambda: overlong(10, cache=11),
        lambda: overlong(10.5, cache=1), lambda: overlong(10, cache=2, unit="words"),  # type: ignore[arg-type]
        lambda: kimi_length(right, unit="words"), lambda: kimi_length(right, weight=float("nan")),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_options_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
