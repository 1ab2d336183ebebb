"""The contract of a group reward: what it declares, what it returns, and what becomes of the group's rewards."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from areal_agents.errors import ConfigError, RewardError
from areal_agents.group_reward import (
    Declaration,
    declaration,
    group_reward,
    is_group_reward,
    judge_group,
    with_group_verdict,
)
from areal_agents.reward import Episode, Verdict
from areal_agents.types import AssistantMessage, Completion, Task, Text, Trajectory, Turn, user

TASK = Task.make("t", split="train", seed=0, payload={})


def episode(answer: str | None, turns: int = 1) -> Episode:
    said = [AssistantMessage((Text(answer or ""),))] * turns
    return Episode(TASK, (user("?"), *said), answer, (), "answer")


def trajectory(*rewards: float, **components: float) -> Trajectory:
    turns = [
        Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), AssistantMessage((Text("x"),)), r, components)
        for r in rewards
    ]
    return Trajectory("g0/0", TASK, "g0", tuple(turns), True, False, "answer")


def test_what_is_declared() -> None:
    @group_reward(reads_others=True, adds=True, leave_one_out=True, seconds=3)
    def decorated(episodes: Sequence[Episode]) -> list[float]:
        return [0.0] * len(episodes)

    class Ranked:
        adds: ClassVar[bool] = False
        reads_others: ClassVar[bool] = False

        async def __call__(self, episodes: Sequence[Episode]) -> Sequence[Verdict]:
            return [Verdict(1.0) for _ in episodes]

    assert declaration(decorated, "it") == Declaration(True, True, True, 3.0)
    assert declaration(Ranked(), "it") == Declaration(False, False, False, 0.0)
    assert is_group_reward(decorated)
    assert is_group_reward(Ranked())
    assert not is_group_reward(Ranked)
    assert not is_group_reward(lambda episode: 1.0)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda episodes: [], "does not declare `adds` and `reads_others`.*@group_reward"),
        (3, "it is 3, which does not declare"),
        (type("A", (), {"adds": False, "reads_others": True}), "it is the class A: name an instance"),
        (group_reward(reads_others="yes")(lambda e: []), "reads_others is 'yes': it must be True or False"),  # type: ignore[arg-type]
        (group_reward(reads_others=True, seconds=-1)(lambda e: []), "seconds is -1, which is no number of seconds"),
        (group_reward(reads_others=True, seconds=None)(lambda e: []), "seconds is None"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_declaration_says_what_to_do(found: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        declaration(found, "it")


def test_numbers_verdicts_and_awaitables_are_all_taken() -> None:
    episodes = [episode("a"), episode("b")]

    async def later(given: Sequence[Episode]) -> list[Any]:
        assert given == tuple(episodes)
        return [Verdict(0.5, {"x": 1}, status="timeout"), True]

    verdicts = asyncio.run(judge_group(later, episodes, name="late"))
    assert verdicts == (Verdict(0.5, {"x": 1.0}, status="timeout"), Verdict(1.0, {"late": 1.0}))
    array = asyncio.run(judge_group(lambda e: np.array([1, 2]), episodes))  # type: ignore[arg-type,return-value]
    assert [v.score for v in array] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "group reward 'bad' returned 1 verdicts for 2 episodes on task 't'"),
        (1.0, "group reward 'bad' returned 1.0 on task 't': return a list"),
        (None, "returned None on task 't'"),
        ("ab", "returned 'ab' on task 't'"),
        ({"a": 1, "b": 2}, "return a list"),
        ([1.0, float("nan")], "reward 'bad' returned nan on task 't'"),
        ([1.0, "1"], "reward 'bad' returned '1' on task 't'"),
        ([1.0, Verdict(0.0, turn_rewards=(1.0, 2.0))], "2 turn rewards for 1 turns on task 't'"),
        ([1.0, Verdict(0.0, status="good")], "returned the status 'good' on task 't'"),  # type: ignore[arg-type]
        ([1.0, Verdict(0.0, {"c": float("inf")})], "bad.c"),
    ],
)
def test_everything_else_is_an_error_that_names_task_and_reward(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        asyncio.run(judge_group(lambda e: returned, [episode("a"), episode("b")], name="bad"))


def test_a_verdict_replaces_the_reward_and_what_was_earned_before_is_kept() -> None:
    judged = with_group_verdict(trajectory(0.25, 0.5, correct=1.0), Verdict(2.0, {"rank": 0.75}), adds=False)
    assert [t.reward for t in judged.turns] == [0.0, 2.0]
    assert [t.own_reward for t in judged.turns] == [0.25, 0.5]
    assert [dict(t.components) for t in judged.turns] == [{"correct": 1.0}, {"correct": 1.0, "group.rank": 0.75}]
    assert [t.own for t in judged.turns] == [(0.25, {"correct": 1.0}), (0.5, {"correct": 1.0})]
    assert pickle.loads(pickle.dumps(judged)) == judged


def test_a_verdict_is_added_turn_by_turn() -> None:
    judged = with_group_verdict(trajectory(0.25, 0.5), Verdict(3.0, turn_rewards=(1.0, 2.0)), adds=True)
    assert [t.reward for t in judged.turns] == [1.25, 2.5]
    assert judged.reward == 3.75


def test_a_second_verdict_takes_the_place_of_the_first() -> None:
    first = with_group_verdict(trajectory(0.5), Verdict(3.0, {"old": 1.0}), adds=True)
    second = with_group_verdict(first, Verdict(1.0, {"new": 1.0}), adds=True)
    assert second == with_group_verdict(trajectory(0.5), Verdict(1.0, {"new": 1.0}), adds=True)
    assert second.reward == 1.5
