"""Hand-worked numbers, loops and additivity of the aggregations in ``areal_agents.algorithms.losses``."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.losses import constant_mean, episode_mean, sequence_mean, token_mean


def test_token_mean_by_hand() -> None:
    # (1 + 4) / 2 sampled tokens; over the whole batch's 10 it is 0.5. The unsampled 100 does not count.
    loss_T, mask_T = torch.tensor([1.0, 100.0, 4.0]), torch.tensor([True, False, True])
    assert token_mean(loss_T, mask_T, tokens=2).item() == 2.5
    assert token_mean(loss_T, mask_T, tokens=10).item() == 0.5


def test_episode_mean_by_hand() -> None:
    # Episode 0: tokens 1, 3 -> 2. Episode 1: tokens 8 -> 8. Mean (2 + 8) / 2 = 5; over 4 episodes 2.5.
    loss_T, mask_T = torch.tensor([1.0, 3.0, 8.0, 100.0]), torch.tensor([True, True, True, False])
    episode_T, tokens_E = torch.tensor([0, 0, 1, -1]), torch.tensor([2, 1])
    assert episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=2).item() == 5.0
    assert episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=4).item() == 2.5


def test_sequence_and_constant_mean_by_hand() -> None:
    # Episode 0: 1 + 3 = 4, episode 1: 8. Mean of the sums over 2 episodes: 6, over 4: 3. By C = 10: 0.6.
    loss_T, mask_T = torch.tensor([1.0, 3.0, 8.0, 100.0]), torch.tensor([True, True, True, False])
    assert sequence_mean(loss_T, mask_T, episodes=2).item() == 6.0
    assert sequence_mean(loss_T, mask_T, episodes=4).item() == 3.0
    assert constant_mean(loss_T, mask_T, episodes=2, constant=10).item() == pytest.approx(0.6)
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="episodes"):
            sequence_mean(loss_T, mask_T, episodes=bad)
        with pytest.raises(ValueError, match="constant"):
            constant_mean(loss_T, mask_T, episodes=1, constant=bad)


def test_all_aggregations_agree_where_episodes_are_equally_long() -> None:
    # Two episodes of 3 tokens: token = episode = constant with C = 3, and sequence is 3 times that.
    loss_T, mask_T = torch.arange(6.0), torch.ones(6, dtype=torch.bool)
    episode_T, tokens_E = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([3, 3])
    expected = token_mean(loss_T, mask_T, tokens=6).item()
    assert episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=2).item() == pytest.approx(expected)
    assert constant_mean(loss_T, mask_T, episodes=2, constant=3).item() == pytest.approx(expected)
    assert sequence_mean(loss_T, mask_T, episodes=2).item() == pytest.approx(3 * expected)


def test_tokens_that_were_not_sampled_cannot_spoil_the_sum() -> None:
    loss_T, mask_T = torch.tensor([1.0, math.nan]), torch.tensor([True, False])
    assert token_mean(loss_T, mask_T, tokens=1).item() == 1.0
    assert episode_mean(loss_T, mask_T, torch.tensor([0, 0]), torch.tensor([1]), episodes=1).item() == 1.0


def test_empty_denominators_are_refused() -> None:
    loss_T, mask_T, episode_T = torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    for none in (0, -1, math.nan):
        with pytest.raises(ValueError, match="tokens"):
            token_mean(loss_T, mask_T, tokens=none)
        with pytest.raises(ValueError, match="episodes"):
            episode_mean(loss_T, mask_T, episode_T, torch.ones(1), episodes=none)
    with pytest.raises(ValueError, match="tokens_E"):
        episode_mean(loss_T, mask_T, episode_T, torch.zeros(1), episodes=1)


def test_a_micro_batch_without_sampled_tokens_adds_zero() -> None:
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert token_mean(nothing, none, tokens=5).item() == 0.0
    assert episode_mean(nothing, none, torch.zeros(0, dtype=torch.long), torch.ones(1), episodes=1).item() == 0.0


tokens_strategy = st.lists(
    st.tuples(st.floats(-5.0, 5.0), st.booleans(), st.integers(0, 3)), min_size=1, max_size=24
).filter(lambda rows: any(mask for _, mask, _ in rows))


def tensors(tokens: list[tuple[float, bool, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss_T = torch.tensor([x for x, _, _ in tokens], dtype=torch.float64).requires_grad_()
    mask_T = torch.tensor([m for _, m, _ in tokens])
    episode_T = torch.tensor([e for _, _, e in tokens])
    return loss_T, mask_T, episode_T, torch.bincount(episode_T[mask_T], minlength=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens_strategy)
def test_aggregations_equal_the_loops(tokens: list[tuple[float, bool, int]]) -> None:
    loss_T, mask_T, episode_T, tokens_E = tensors(tokens)
    sampled = [x for x, m, _ in tokens if m]
    expected = sum(sampled) / len(sampled)
    assert token_mean(loss_T, mask_T, tokens=len(sampled)).item() == pytest.approx(expected, abs=1e-9)
    means = []
    for e in range(4):
        own = [x for x, m, who in tokens if m and who == e]
        means.append(sum(own) / len(own) if own else 0.0)
    value = episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=4).item()
    assert value == pytest.approx(sum(means) / 4, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens_strategy, st.lists(st.integers(0, 24), max_size=4))
def test_micro_batches_add_up(tokens: list[tuple[float, bool, int]], cuts: list[int]) -> None:
    # The same losses in any split: the sum of the parts and its gradient equal the whole's.
    loss_T, mask_T, episode_T, tokens_E = tensors(tokens)
    n = float(mask_T.sum())
    edges = [0, *sorted(min(c, len(tokens)) for c in cuts), len(tokens)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    pairs = [
        (
            token_mean(loss_T, mask_T, tokens=n),
            sum((token_mean(loss_T[p], mask_T[p], tokens=n) for p in parts), torch.zeros(())),
        ),
        (
            episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=4),
            sum(
                (episode_mean(loss_T[p], mask_T[p], episode_T[p], tokens_E, episodes=4) for p in parts),
                torch.zeros(()),
            ),
        ),
        (
            constant_mean(loss_T, mask_T, episodes=4, constant=7),
            sum((constant_mean(loss_T[p], mask_T[p], episodes=4, constant=7) for p in parts), torch.zeros(())),
        ),
    ]
    for whole, split in pairs:
        assert split.item() == pytest.approx(whole.item(), abs=1e-9)
        (g_whole,) = torch.autograd.grad(whole, loss_T)
        (g_split,) = torch.autograd.grad(split, loss_T)
        assert torch.allclose(g_whole, g_split, atol=1e-12)


def test_an_episode_weighs_the_same_in_one_row_or_in_three() -> None:
    # T6. Episode 0 has tokens 1, 2, 3, 6 (mean 3), episode 1 has one token 5: (3 + 5) / 2 = 4.
    # As three rows (1 | 2, 3 | 6) in two micro-batches, with tokens_E counted over all rows: still 4.
    # A mean per row would give ((1 + 2.5 + 6 + 5) / 4) = 3.625.
    tokens_E = torch.tensor([4, 1])

    def value(losses: list[float], who: list[int]) -> float:
        ones_T = torch.ones(len(losses), dtype=torch.bool)
        return episode_mean(torch.tensor(losses), ones_T, torch.tensor(who), tokens_E, episodes=2).item()

    assert value([1.0, 2.0, 3.0, 6.0, 5.0], [0, 0, 0, 0, 1]) == pytest.approx(4.0)
    assert value([1.0, 5.0], [0, 1]) + value([2.0, 3.0, 6.0], [0, 0, 0]) == pytest.approx(4.0)


def test_a_masked_token_still_counts_in_the_denominator() -> None:
    # Losses 2 and 4, the second masked by a correction (weight 0): 2 / 2 = 1, not 2 / 1.
    loss_T, weight_T, mask_T = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([True, True])
    assert token_mean(loss_T * weight_T, mask_T, tokens=2).item() == 1.0
    episode_T, tokens_E = torch.tensor([0, 0]), torch.tensor([2])
    assert episode_mean(loss_T * weight_T, mask_T, episode_T, tokens_E, episodes=1).item() == 1.0
