"""Which rows train, what they are divided by, and how a batch is cut into minibatches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.algorithms.objective import (
    Denominators,
    Tokens,
    batch_counts,
    has_gradient,
    live_rows,
    sources,
    split_episodes,
)


def row(advantages: list[float], versions: list[int], *, episode: int = 0) -> Row:
    """A prompt of two tokens, then one sampled token an entry with log μ = -1, -2, …"""
    n = len(advantages)
    return Row(
        ids=np.arange(2 + n),
        mask=np.asarray([False, False] + [True] * n),
        logprobs=np.asarray([0, 0, *(-1.0 - i for i in range(n))], np.float32),
        versions=np.asarray([-1, -1, *versions]),
        turns=np.asarray([-1, -1] + [0] * n),
        advantages=np.asarray([0, 0, *advantages], np.float32),
        episode=episode,
    )


def test_a_row_trains_if_a_young_token_has_an_advantage() -> None:
    mixed = row([0.0, 0.5], [5, 3])
    assert has_gradient(mixed, version=5, max_staleness=None)
    assert has_gradient(mixed, version=5, max_staleness=2)
    assert not has_gradient(mixed, version=5, max_staleness=1)
    assert not has_gradient(row([0.0, 0.0], [5, 5]), version=5, max_staleness=None)


# Of episode 0: no advantage but young, and over age; of 1: an advantage, but over age; of 2: no advantage, over age.
ROWS = (row([0.0], [5]), row([0.0], [1]), row([1.0], [1], episode=1), row([0.0], [1], episode=2))


def test_a_term_beside_the_loss_needs_a_young_token_and_no_advantage() -> None:
    batch = Batch(ROWS, 3, 5, 1.0)
    assert live_rows(batch, max_staleness=2, scope="token") == []
    assert live_rows(batch, max_staleness=2, scope="token", always=True) == [0]
    assert live_rows(batch, max_staleness=4, scope="token", always=True) == [0, 1, 2, 3]
    assert live_rows(batch, max_staleness=None, scope="token", always=True) == [0, 1, 2, 3]
    for scope in ("episode", "minibatch"):  # a row of masked tokens weighs in what is seen at once
        assert set(live_rows(batch, max_staleness=2, scope=scope, always=True)) >= {0, 1}
        assert live_rows(Batch(ROWS[1:], 3, 5, 1.0), max_staleness=2, scope=scope, always=True) == []


def test_what_sees_more_than_a_token_needs_the_rows_beside_it() -> None:
    batch = Batch((*ROWS, row([0.0], [5], episode=1)), 3, 5, 1.0)
    assert live_rows(batch, max_staleness=None, scope="token") == [2]
    assert live_rows(batch, max_staleness=None, scope="episode") == [2, 4]
    assert live_rows(batch, max_staleness=None, scope="minibatch") == [0, 1, 2, 3, 4]
    assert live_rows(batch, max_staleness=2, scope="minibatch") == []


def test_tokens_are_the_sampled_ones_in_row_order() -> None:
    tokens = Tokens.of([row([1.0], [0], episode=3), row([2.0, 3.0], [1, 2])], None)
    assert len(tokens) == 3
    assert tokens.ids.tolist() == [2, 2, 3]
    assert tokens.behaviour.tolist() == [-1.0, -1.0, -2.0]
    assert tokens.advantages.tolist() == [1.0, 2.0, 3.0]
    assert tokens.episodes.tolist() == [3, 0, 0]
    assert tokens[slice(1, 3)].versions.tolist() == [1, 2]
    proximal = [np.asarray([9, 9, -0.5], np.float32), np.asarray([9, 9, -0.25, -4], np.float32)]
    assert Tokens.of([row([1.0], [0]), row([2.0, 3.0], [1, 2])], proximal).proximal.tolist() == [-0.5, -0.25, -4.0]


def test_denominators_count_rows_without_a_gradient_and_all_rows_of_an_episode() -> None:
    rows = [row([0.0], [0], episode=1), row([1.0, 1.0], [0, 0], episode=1), row([1.0], [0], episode=3)]
    counts = Denominators.of(rows, total_episodes=5, episodes=4)
    assert (counts.tokens, counts.episodes) == (4, 4)
    assert torch.equal(counts.tokens_E, torch.tensor([0, 3, 0, 1, 0]))


def test_hidden_states_are_read_one_token_before_the_sampled_ones() -> None:
    assert sources([row([1.0, 1.0], [0, 0])], [np.asarray([10, 11, 40, 41])]).tolist() == [11, 40]
    with pytest.raises(ValueError, match="no context"):
        sources([replace(row([1.0], [0]), mask=np.asarray([True, False, True]))], [np.arange(3)])


def test_batch_counts() -> None:
    rows = (row([0.0, 0.0], [4, 5]), row([1.0, 1.0], [2, 5], episode=1))
    counts = batch_counts(Batch(rows, 3, 5, 1.0), [1], max_staleness=2)
    assert counts == {"tokens": 4.0, "rows": 2.0, "rows_skipped": 1.0, "episodes": 3.0, "over_age_share": 0.25}
    assert batch_counts(Batch((), 3, 5, 1.0), [], None)["tokens"] == 0.0


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 3), st.integers(0, 3))
def test_minibatches_partition_the_episodes_evenly(episodes: int, parts: int, seed: int, version: int) -> None:
    found = split_episodes(episodes, parts, seed=seed, version=version)
    assert sorted(np.concatenate(found).tolist()) == list(range(episodes))
    sizes = [len(p) for p in found]
    assert len(found) == min(parts, episodes)
    assert max(sizes) - min(sizes) <= 1
    again = split_episodes(episodes, parts, seed=seed, version=version)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_each_version_is_shuffled_anew() -> None:
    first, second = (np.concatenate(split_episodes(40, 2, seed=0, version=v)).tolist() for v in (0, 1))
    assert first != second
