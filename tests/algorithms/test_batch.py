"""rows_of: every sampled token trains exactly once (T5), carries its own labels (T3), and weighs per episode (T6)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.algorithms import losses
from areal_agents.algorithms.batch import Row, rows_of
from areal_agents.algorithms.objective import Denominators, Tokens
from areal_agents.types import AssistantMessage, Completion, Task, Trajectory, Turn

TASK = Task.make("t", split="train", seed=0, payload={})


def turn(
    prompt: tuple[int, ...],
    sampled: tuple[int, ...],
    *,
    parent: int | None = None,
    first: float = 0.0,
    version: int = 0,
) -> Turn:
    """Token i of the completion has log-probability ``-(first + i)``, so that each is told apart."""
    completion = Completion(
        sampled, tuple(-(first + i) for i in range(len(sampled))), (version,) * len(sampled), "stop"
    )
    return Turn(prompt, completion, AssistantMessage(()), parent=parent)


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory("e", TASK, "g", turns, terminated=True, truncated=False, stop_reason="answer")


@st.composite
def trees(draw: st.DrawFn) -> Trajectory:
    """Episodes whose turns extend any earlier turn, or start a new context."""
    turns: list[Turn] = []
    token = st.integers(0, 9)
    for k in range(draw(st.integers(1, 6))):
        parent = draw(st.none() | st.integers(0, k - 1)) if k else None
        prompt = draw(st.lists(token, min_size=1, max_size=4))
        sampled = draw(st.lists(token, max_size=4))
        turns.append(turn(tuple(prompt), tuple(sampled), parent=parent, first=10.0 * k, version=k))
    return trajectory(*turns)


def test_a_conversation_is_one_row_with_labels_at_the_exact_tokens() -> None:
    mixed = Completion((7, 8, 9), (-0.5, -0.25, -2.0), (3, 3, 4), "stop")
    first = Turn((1, 2), mixed, AssistantMessage(()))
    rows = rows_of(trajectory(first, turn((5,), (6,), parent=0, first=1.5, version=4)), [0.5, -1.0], episode=11)
    assert len(rows) == 1
    row = rows[0]
    assert row.episode == 11
    assert len(row) == 7
    np.testing.assert_array_equal(row.ids, [1, 2, 7, 8, 9, 5, 6])
    np.testing.assert_array_equal(row.mask, [False, False, True, True, True, False, True])
    np.testing.assert_array_equal(row.logprobs, np.asarray([0, 0, -0.5, -0.25, -2, 0, -1.5], np.float32))
    np.testing.assert_array_equal(row.versions, [-1, -1, 3, 3, 4, -1, 4])
    np.testing.assert_array_equal(row.turns, [-1, -1, 0, 0, 0, -1, 1])
    np.testing.assert_array_equal(row.advantages, np.asarray([0, 0, 0.5, 0.5, 0.5, 0, -1], np.float32))


def test_a_fork_is_two_rows_and_its_shared_turn_trains_in_the_first() -> None:
    episode = trajectory(turn((1,), (2, 3)), turn((4,), (5,), parent=0), turn((6,), (7,), parent=0))
    left, right = rows_of(episode, [1.0, 2.0, 3.0], episode=0)
    np.testing.assert_array_equal(left.ids, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(left.mask, [False, True, True, False, True])
    np.testing.assert_array_equal(right.ids, [1, 2, 3, 6, 7])
    np.testing.assert_array_equal(right.mask, [False, False, False, False, True])
    np.testing.assert_array_equal(right.advantages, np.asarray([0, 0, 0, 0, 3], np.float32))


def test_nothing_sampled_gives_no_row() -> None:
    assert rows_of(trajectory(), [], episode=0) == []
    assert rows_of(trajectory(turn((1,), ())), [1.0], episode=0) == []


@pytest.mark.parametrize("parent", [1, 2, -1])
def test_a_parent_that_is_no_earlier_turn_is_refused(parent: int) -> None:
    with pytest.raises(ValueError, match="a parent is an earlier turn"):
        rows_of(trajectory(turn((1,), (2,)), turn((1,), (2,), parent=parent)), [0.0, 0.0], episode=0)


def test_one_advantage_a_turn() -> None:
    with pytest.raises(ValueError, match="2 advantages for 1 turns"):
        rows_of(trajectory(turn((1,), (2,))), [0.0, 0.0], episode=0)


@given(trees())
def test_each_sampled_token_trains_exactly_once_with_its_own_labels(episode: Trajectory) -> None:
    rows = rows_of(episode, [float(k + 1) for k in range(len(episode.turns))], episode=0)
    found = Counter(
        (int(t), float(lp), int(v), int(i), float(a))
        for row in rows
        for t, lp, v, i, a in zip(
            row.turns[row.mask], row.logprobs[row.mask], row.versions[row.mask], row.ids[row.mask],
            row.advantages[row.mask], strict=True,
        )
    )  # fmt: skip
    expected = Counter(
        (k, lp, v, i, float(k + 1))
        for k, t in enumerate(episode.turns)
        for i, lp, v in zip(t.completion.ids, t.completion.logprobs, t.completion.versions, strict=True)
    )
    assert found == expected
    for row in rows:
        rest = ~row.mask
        assert not row.logprobs[rest].any()
        assert not row.advantages[rest].any()
        assert (row.versions[rest] == -1).all()
        assert (row.turns[rest] == -1).all()


@given(trees())
def test_a_token_is_trained_in_the_context_that_it_was_sampled_in(episode: Trajectory) -> None:
    def context(k: int | None) -> tuple[int, ...]:
        if k is None:
            return ()
        t = episode.turns[k]
        return (*context(t.parent), *t.prompt_suffix, *t.completion.ids)

    for row in rows_of(episode, [0.0] * len(episode.turns), episode=0):
        for k in set(row.turns[row.mask].tolist()):
            stop = int(np.flatnonzero(row.turns == k)[-1]) + 1
            assert tuple(row.ids[:stop].tolist()) == context(k)


def weight(rows: list[Row], *, aggregation: str) -> float:
    """The sum of the loss weights of an episode beside another one of three tokens."""
    other = rows_of(trajectory(turn((1,), (1, 2, 3))), [1.0], episode=1)
    counts = Denominators.of([*rows, *other], total_episodes=2, episodes=2)
    tokens = Tokens.of(rows, None)
    ones, mask = torch.ones(len(tokens)), torch.ones(len(tokens), dtype=torch.bool)
    if aggregation == "token":
        return float(losses.token_mean(ones, mask, tokens=counts.tokens))
    return float(losses.episode_mean(ones, mask, tokens.episodes, counts.tokens_E, episodes=counts.episodes))


@given(trees().filter(lambda e: e.sampled_tokens > 0))
def test_an_episodes_weight_does_not_depend_on_its_number_of_rows(episode: Trajectory) -> None:
    rows = rows_of(episode, [1.0] * len(episode.turns), episode=0)
    n = episode.sampled_tokens
    assert weight(rows, aggregation="episode") == pytest.approx(0.5)
    assert weight(rows, aggregation="token") == pytest.approx(n / (n + 3))
