"""Hand-worked numbers of what a critic is fitted to, of its loss."""

from __future__ import annotations

import pytest
import torch

from areal_agents.algorithms.critic_targets import explained_variance, target_columns, value_loss


def test_an_advantage_a_token_fits_every_token() -> None:
    found = target_columns((torch.tensor([0.5, -1.0]), torch.tensor([2.0])), [[1.0, 3.0], [0.25]])
    assert found == {"values": [[1.0, 3.0], [0.25]], "returns": [[1.5, 2.0], [2.25]], "fitted": [[1.0, 1.0], [1.0]]}


def test_an_advantage_a_turn_fits_the_turns_first_token() -> None:
    found = target_columns(torch.tensor([0.5, 9.0, 2.0]), [[1.0, 3.0], [], [0.25]])
    assert found["returns"] == [[1.5, 3.0], [], [2.25]]  # of the second token it is no target
    assert found["fitted"] == [[1.0, 0.0], [], [1.0]]


def test_the_loss_by_hand() -> None:
    # V = 1, 3, 3, −1 was 0 each; R = 2, 2, −2, 2. ½(V − R)²: 0.5, 0.5, 12.5, 4.5. Clipped at ±1 V is 1, 1, 1, −1:
    # 0.5, 0.5, 4.5, 4.5. The larger of both counts, and V has gone too far nowhere.
    values, old, returns = torch.tensor([1.0, 3.0, 3.0, -1.0]), torch.zeros(4), torch.tensor([2.0, 2.0, -2.0, 2.0])
    plain, clipped = value_loss(values, old, returns), value_loss(values, old, returns, clip=1.0)
    assert plain.loss_T.tolist() == clipped.loss_T.tolist() == [0.5, 0.5, 12.5, 4.5]
    assert not plain.clipped_T.any()
    assert not clipped.clipped_T.any()


def test_the_clip_stops_the_way_to_the_target_and_none_away_from_it() -> None:
    # R = 2. V moved from 0 to 1.5, more than ε = 1: V_c = 1, ½·1 > ½·0.25, and its gradient is 0.
    # V moved from 0 to −1.5, away from R: ½·3.5² > ½·3², and the gradient is V − R = −3.5.
    values = torch.tensor([1.5, -1.5, 0.5], requires_grad=True)
    terms = value_loss(values, torch.zeros(3), torch.full((3,), 2.0), clip=1.0)
    assert terms.loss_T.tolist() == [0.5, 6.125, 1.125]
    assert terms.clipped_T.tolist() == [True, False, False]
    torch.autograd.backward(terms.loss_T.sum())
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, -3.5, -1.5]


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 2.0, 4.0])  # variance 8/3
    assert explained_variance(returns + 5, returns) == pytest.approx(1.0)  # a constant error is no variance
    assert explained_variance(torch.zeros(3), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0]), returns) == pytest.approx(0.75)
    assert explained_variance(torch.zeros(3), torch.full((3,), 0.7)) is None
    assert explained_variance(torch.zeros(0), torch.zeros(0)) is None
