"""DPO's loss: hand-worked numbers, its gradient, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from areal_agents.algorithms.preference import dpo


def test_hand_worked_numbers() -> None:
    # Pair 0: Δπ = -3 - (-5) = 2, Δref = -4 - (-5) = 1, m = 0.1·(2 - 1) = 0.1.  Pair 1: Δπ = -6, Δref = -1, m = -0.5.
    chosen, rejected = torch.tensor([-3.0, -8.0]), torch.tensor([-5.0, -2.0])
    found = dpo(chosen, rejected, torch.tensor([-4.0, -3.0]), torch.tensor([-5.0, -2.0]), beta=0.1)
    # log(1 + e^-0.1) = 0.644397, log(1 + e^0.5) = 0.974077
    assert found.loss_P.tolist() == pytest.approx([0.644397, 0.974077], abs=1e-6)
    assert found.chosen_P.tolist() == pytest.approx([0.1, -0.5])
    assert found.rejected_P.tolist() == pytest.approx([0.0, 0.0])
    smooth = dpo(
        chosen, rejected, torch.tensor([-4.0, -3.0]), torch.tensor([-5.0, -2.0]), beta=0.1, label_smoothing=0.25
    )
    # 0.75·0.644397 + 0.25·log(1 + e^0.1) = 0.75·0.644397 + 0.25·0.744397; 0.75·0.974077 + 0.25·0.474077
    assert smooth.loss_P.tolist() == pytest.approx([0.669397, 0.849077], abs=1e-6)


def test_the_gradient_is_the_papers() -> None:
    # ∇L = -β·σ(-m)·(∇log π(y_w) - ∇log π(y_l)), eq. 7's gradient
    chosen, rejected = torch.tensor([-3.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    dpo(chosen, rejected, torch.tensor([-4.0]), torch.tensor([-5.0]), beta=0.1).loss_P.sum().backward()  # type: ignore[no-untyped-call]
    weight = 0.1 / (1.0 + math.exp(0.1))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert [float(chosen.grad), float(rejected.grad)] == pytest.approx([-weight, weight])


def test_a_policy_that_is_the_reference_has_the_loss_log_2() -> None:
    same = torch.tensor([-7.0, -1.0])
    assert dpo(same, same - 1, same, same - 1, beta=0.5).loss_P.tolist() == pytest.approx([math.log(2)] * 2)


def test_far_margins_stay_finite() -> None:
    found = dpo(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), torch.zeros(2), torch.zeros(2), beta=1.0)
    assert found.loss_P.tolist() == pytest.approx([0.0, 1e4])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"beta": 0.0}, "beta = 0.0"), ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing = 0.5")],
)
def test_what_is_refused(changes: dict[str, float], said: str) -> None:
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=said):
        dpo(one, one, one, one, **changes)
    with pytest.raises(ValueError, match="one length"):
        dpo(one, torch.zeros(2), one, one, beta=0.1)
