"""Weights over tokens, turns and trajectories, and the log-linear proximal policy, of ``algorithms.offpolicy``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.losses import cispo, ppo, reinforce
from areal_agents.algorithms.offpolicy import bypass, decoupled, importance, kept, log_linear
from areal_agents.algorithms.offpolicy_stats import EffectiveSize, OffPolicyStats
from areal_agents.algorithms.spans import Span

# Episode 0: turn 0 has tokens 2 and 0.5, turn 1 has 1.5. Episode 1: one token, 0.8. They are mixed.
RATIOS = [2.0, 0.8, 0.5, 1.5]
EPISODES, TURNS = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 0, 1])


def gradient_of(loss: Tensor, wrt: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, wrt)
    return [float(x) for x in gradient]


def pair(ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    b_T = torch.linspace(-3.0, -0.5, len(ratios), dtype=torch.float64)
    return b_T + torch.tensor(ratios, dtype=torch.float64).log(), b_T


@pytest.mark.parametrize(
    ("scope", "weights"),
    [("token", [2.0, 0.8, 0.5, 1.5]), ("turn", [1.0, 0.8, 1.0, 1.5]), ("trajectory", [1.5, 0.8, 1.5, 1.5])],
)
def test_the_weight_of_a_span_is_the_product_of_its_ratios(scope: Span, weights: list[float]) -> None:
    a_T, b_T = pair(RATIOS)
    for found in (
        importance(a_T, b_T, EPISODES, TURNS, scope=scope, truncate=None, token_mask=None),
        decoupled(a_T, b_T, EPISODES, TURNS, scope=scope, token_mask=None),
        kept(a_T, b_T, EPISODES, TURNS, scope=scope, token_mask=None),
    ):
        assert found.weight_T.tolist() == pytest.approx(weights)
        assert found.kept_T.all()


def test_truncation_is_of_the_span_and_the_mask_of_the_token() -> None:
    # Trajectory 0 weighs 1.5, cut to 1.2. Its token of 0.5 is outside [0.6, 3] and masked; the others keep the weight.
    a_T, b_T = pair(RATIOS)
    found = importance(a_T, b_T, EPISODES, TURNS, scope="trajectory", truncate=1.2, token_mask=(0.6, 3.0))
    assert found.weight_T.tolist() == pytest.approx([1.2, 0.8, 0.0, 1.2])
    assert found.kept_T.tolist() == [True, True, False, True]


def test_decoupled_without_a_weight_masks_alone() -> None:
    a_T, b_T = pair([0.4, 0.7, 3.0])
    found = decoupled(a_T, b_T, scope=None, token_mask=(0.5, 5.0))
    assert found.weight_T.tolist() == [0.0, 1.0, 1.0]


def test_a_kept_policy_weighs_as_a_recomputed_one() -> None:
    # p/μ of 0.4 is masked, 0.7 stays, 3 is cut to 2; which policy p is, the learner decides.
    a_T, b_T = pair([0.4, 0.7, 3.0])
    found = kept(a_T, b_T, decay=0.5, truncate=2.0)
    assert found.weight_T.tolist() == pytest.approx([0.0, 0.7, 2.0])
    assert found.kept_T.tolist() == [False, True, True]
    assert found.old_T is None
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            kept(a_T, b_T, decay=decay)


def test_reinforce_with_importance_is_cispo_that_bypasses() -> None:
    # Both weigh −A·∇log π by min(u, 2).
    logprobs_T, b_T = pair([0.1, 0.7, 1.0, 1.9, 4.0])
    logprobs_T.requires_grad_()
    a_T = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0], dtype=torch.float64)
    weight_T = importance(logprobs_T, b_T, truncate=2.0, token_mask=None).weight_T
    weighted = gradient_of((reinforce(logprobs_T, a_T).loss_T * weight_T).sum(), logprobs_T)
    kept_T = bypass(logprobs_T, b_T, token_mask=None).weight_T
    assert weighted == pytest.approx(gradient_of((cispo(logprobs_T, b_T, a_T).loss_T * kept_T).sum(), logprobs_T))


def test_the_weight_of_a_trajectory_is_exact() -> None:
    # Two tokens, each 0 or 1. μ plays 1 with 0.5; π with 0.8, then with 0.9 after a 1 and 0.3 after a 0. The return is
    # the number of ones. Enumerating μ's four trajectories: E_μ[∏u · R] = E_π[R] = 0.8 + 0.8·0.9 + 0.2·0.3 = 1.58.
    total = 0.0
    for x in (0, 1):
        for y in (0, 1):
            first, second = (0.8 if x else 0.2), ((0.9 if x else 0.3) if y else (0.1 if x else 0.7))
            logs_T = torch.tensor([first, second], dtype=torch.float64).log()
            b_T = torch.full((2,), math.log(0.5), dtype=torch.float64)
            index_T = torch.zeros(2, dtype=torch.long)
            w = importance(logs_T, b_T, index_T, index_T, scope="trajectory", truncate=None, token_mask=None)
            total += 0.25 * float(w.weight_T[0]) * (x + y)
    assert total == pytest.approx(1.58)


def test_extreme_spans_stay_finite() -> None:
    a_T, b_T = torch.full((3,), -1.0), torch.full((3,), -19.0)
    index_T = torch.zeros(3, dtype=torch.long)
    found = importance(a_T, b_T, index_T, index_T, scope="trajectory", truncate=None, token_mask=None)
    assert found.weight_T.tolist() == pytest.approx([math.exp(20)] * 3, rel=1e-5)
    assert importance(a_T, b_T, index_T, index_T, scope="turn", token_mask=None).weight_T.tolist() == [2.0] * 3


# --- log-linear -----------------------------------------------------------------------------------------------------


def test_log_linear_by_hand() -> None:
    # u = 4. Age 0 and 1: α = 0, p = μ, weight 1. Age 2: α = 1/2, p/μ = 2. Age 4: α = 3/4, p/μ = 4^0.75 = 2.8284.
    logprobs_T, b_T = pair([4.0] * 4)
    found = log_linear(logprobs_T, b_T, torch.tensor([0, 1, 2, 4]))
    assert found.weight_T.tolist() == pytest.approx([1.0, 1.0, 2.0, 4**0.75])
    assert found.old_T is not None
    assert torch.exp(found.old_T - b_T).tolist() == pytest.approx([1.0, 1.0, 2.0, 4**0.75])
    assert found.kept_T.all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0.3, 3.0), st.integers(0, 9)), min_size=1, max_size=8))
def test_log_linear_splits_the_ratio_in_two(tokens: list[tuple[float, int]]) -> None:
    # r·ρ = u for every age, and so without a clip decoupled PPO has the gradient of the plain ratio.
    logprobs_T, b_T = pair([u for u, _ in tokens])
    logprobs_T.requires_grad_()
    found = log_linear(logprobs_T, b_T, torch.tensor([age for _, age in tokens]), token_mask=None)
    assert found.old_T is not None
    ratio_T = torch.exp(logprobs_T.detach() - found.old_T)
    assert (ratio_T * found.weight_T).tolist() == pytest.approx([u for u, _ in tokens])
    a_T = torch.ones_like(b_T)
    terms = ppo(logprobs_T, found.old_T, a_T, clip_low=9.0, clip_high=9.0, dual_clip=None)
    assert gradient_of((terms.loss_T * found.weight_T).sum(), logprobs_T) == pytest.approx([-u for u, _ in tokens])
    for (u, age), weight in zip(tokens, found.weight_T.tolist(), strict=True):
        alpha = 0.0 if age == 0 else (age - 1) / age
        assert weight == pytest.approx(u**alpha)


def test_log_linear_of_young_tokens_is_bypass() -> None:
    logprobs_T, b_T = pair([0.7, 1.0, 1.6])
    found = log_linear(logprobs_T, b_T, torch.tensor([0, 1, 1]))
    assert found.weight_T.tolist() == bypass(logprobs_T, b_T).weight_T.tolist()
    assert found.old_T is not None
    assert found.old_T.tolist() == b_T.tolist()


# --- refusals and figures -------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    one, index = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="truncate"):
        importance(one, one, truncate=0.0)
    with pytest.raises(ValueError, match="truncate"):
        log_linear(one, one, index, truncate=-1.0)
    with pytest.raises(ValueError, match="must enclose 1"):
        importance(one, one, token_mask=(1.5, 2.0))
    with pytest.raises(ValueError, match="episodes_T must say"):
        decoupled(one, one, scope="trajectory")
    with pytest.raises(ValueError, match="1-D"):
        log_linear(one, one, torch.zeros(2, dtype=torch.long))


def test_the_figures_say_what_masked_and_what_weighed() -> None:
    # Four tokens: the correction masks one, the mask two, one of them the same. The weights of the kept: 1.5 and 0.5.
    stats, zeros_T, no_T = OffPolicyStats(), torch.zeros(4), torch.zeros(4, dtype=torch.long)
    stats.add(
        zeros_T, zeros_T, ~no_T.bool(), torch.tensor([True, False, True, False]), no_T.bool(), no_T, no_T, version=0,
        weight_T=torch.tensor([1.5, 0.0, 0.5, 0.0]),
        masked_by={
            "correction": torch.tensor([False, True, False, False]), "mask": torch.tensor([False, True, False, True]),
        },
    )  # fmt: skip
    found = stats.result()
    assert found["masked_share"] == 0.5
    assert found["masked_share/by_correction"] == 0.25
    assert found["masked_share/by_mask"] == 0.5
    assert found["weight_mean"] == 0.5


def test_the_effective_size_of_tokens_turns_and_trajectories() -> None:
    # Tokens 2, 0.8, 0.5, 1.5: (4.8)² / (4 · (4 + 0.64 + 0.25 + 2.25)) = 23.04 / 28.56.
    # Turns 1, 0.8, 1.5: (3.3)² / (3 · (1 + 0.64 + 2.25)) = 10.89 / 11.67.
    # Trajectories 1.5, 0.8: (2.3)² / (2 · (2.25 + 0.64)) = 5.29 / 5.78. In any split.
    a_T, b_T = pair(RATIOS)
    scopes: list[tuple[Span, float]] = [
        ("token", 23.04 / 28.56), ("turn", 10.89 / 11.67), ("trajectory", 5.29 / 5.78),
    ]  # fmt: skip
    for scope, expected in scopes:
        for cuts in ([0, 4], [0, 1, 4], [0, 2, 3, 4]):
            size = EffectiveSize(scope)
            for i, j in pairwise(cuts):
                size.add(a_T[i:j], b_T[i:j], EPISODES[i:j], TURNS[i:j])
            assert size.share() == pytest.approx(expected), (scope, cuts)
    assert EffectiveSize("turn").share() == 1.0
    on = EffectiveSize("trajectory")
    on.add(b_T, b_T, EPISODES, TURNS)
    assert on.share() == 1.0
    far = EffectiveSize("trajectory")
    far.add(b_T + 900.0, b_T, EPISODES, TURNS)
    assert far.share() == 1.0  # both at the bound, and nothing overflows
