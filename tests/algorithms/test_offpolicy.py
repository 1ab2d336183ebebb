"""Hand-worked numbers, plain loops and micro-batch additivity of ``areal_agents.algorithms.offpolicy``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.losses import ppo
from areal_agents.algorithms.offpolicy import age_mask, bypass, decoupled, log_ratio
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats

ICEPOP = (0.5, 5.0)


def gradient_of(loss: Tensor, wrt: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, wrt)
    return [float(x) for x in gradient]


def pair(ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    """log a and log b with a/b as given."""
    b_T = torch.linspace(-3.0, -0.5, len(ratios), dtype=torch.float64)
    return b_T + torch.tensor(ratios, dtype=torch.float64).log(), b_T


# --- log_ratio ------------------------------------------------------------------------------------------------------


def test_log_ratio_is_bounded_and_loses_its_gradient_past_the_bound() -> None:
    a_T = torch.tensor([-1.0, 30.0, -30.0, -math.inf]).requires_grad_()
    value_T = log_ratio(a_T, torch.tensor([-1.5, 0.0, 0.0, 0.0]))
    assert value_T.tolist() == [0.5, 20.0, -20.0, -20.0]
    assert gradient_of(value_T.sum(), a_T) == [1.0, 0.0, 0.0, 0.0]


# --- bypass ---------------------------------------------------------------------------------------------------------


def test_bypass_by_hand() -> None:
    # u = 0.4 and 6 lie outside [0.5, 5]; the weight of the others is 1, not u.
    logprobs_T, behaviour_T = pair([0.4, 0.6, 1.0, 4.9, 6.0])
    weight_T, kept_T, _ = bypass(logprobs_T, behaviour_T, token_mask=ICEPOP)
    assert weight_T.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert kept_T.tolist() == [False, True, True, True, False]


def test_bypass_without_a_mask_keeps_everything() -> None:
    weight_T, kept_T, _ = bypass(*pair([1e-6, 1.0, 1e6]), token_mask=None)
    assert weight_T.tolist() == [1.0, 1.0, 1.0]
    assert kept_T.tolist() == [True, True, True]


def test_the_bounds_themselves_are_kept() -> None:
    # u = 2, 1, 0.5 (as computed, to the last bit) with bounds at exactly these.
    logprobs_T = torch.zeros(3, dtype=torch.float64)
    behaviour_T = torch.tensor([-math.log(2.0), 0.0, math.log(2.0)], dtype=torch.float64)
    ratios = torch.exp(logprobs_T - behaviour_T).tolist()
    assert bypass(logprobs_T, behaviour_T, token_mask=(ratios[2], ratios[0])).kept_T.tolist() == [True, True, True]


# --- decoupled ------------------------------------------------------------------------------------------------------


def test_decoupled_by_hand() -> None:
    # ρ = 0.4 masked, 0.6 and 1.5 as they are, 4 truncated to 2, 6 masked.
    proximal_T, behaviour_T = pair([0.4, 0.6, 1.5, 4.0, 6.0])
    weight_T, kept_T, _ = decoupled(proximal_T, behaviour_T, truncate=2.0, token_mask=ICEPOP)
    assert weight_T.tolist() == pytest.approx([0.0, 0.6, 1.5, 2.0, 0.0])
    assert kept_T.tolist() == [False, True, True, True, False]


def test_decoupled_without_truncation_or_mask_is_the_ratio() -> None:
    weight_T, kept_T, _ = decoupled(*pair([0.1, 1.0, 30.0]), truncate=None, token_mask=None)
    assert weight_T.tolist() == pytest.approx([0.1, 1.0, 30.0])
    assert kept_T.tolist() == [True, True, True]


def test_truncation_alone_masks_nothing() -> None:
    weight_T, kept_T, _ = decoupled(*pair([0.1, 30.0]), truncate=2.0, token_mask=None)
    assert weight_T.tolist() == pytest.approx([0.1, 2.0])
    assert kept_T.tolist() == [True, True]


def test_decoupled_ppo_by_hand() -> None:
    # μ = 0.2, p = 0.3, π = 0.36, A = 2: ρ = 1.5, r = 1.2 (inside the clip). L = −1.5 · 1.2 · 2 = −3.6 = dL/dlogπ.
    # With no clip active this is −u·A, u = 0.36 / 0.2 = 1.8.
    logprobs_T = torch.tensor([0.36], dtype=torch.float64).log().requires_grad_()
    proximal_T, behaviour_T = torch.tensor([0.3]).double().log(), torch.tensor([0.2]).double().log()
    terms = ppo(logprobs_T, proximal_T, torch.tensor([2.0]).double(), clip_low=0.3, clip_high=0.3, dual_clip=3.0)
    loss = (terms.loss_T * decoupled(proximal_T, behaviour_T, truncate=None, token_mask=None).weight_T).sum()
    assert loss.item() == pytest.approx(-3.6, abs=1e-6)
    assert gradient_of(loss, logprobs_T) == pytest.approx([-3.6], abs=1e-6)


# --- both -----------------------------------------------------------------------------------------------------------


def test_weights_carry_no_gradient() -> None:
    # Even where the current policy itself is given as p: a weight with a gradient would change the objective.
    logprobs_T = torch.tensor([-1.0, -2.0]).requires_grad_()
    behaviour_T = torch.tensor([-1.2, -2.2]).requires_grad_()
    assert not bypass(logprobs_T, behaviour_T, token_mask=ICEPOP).weight_T.requires_grad
    assert not decoupled(logprobs_T, behaviour_T, truncate=2.0, token_mask=None).weight_T.requires_grad


def test_a_masked_token_has_no_gradient() -> None:
    # u = 0.4, A = 1: PPO alone would pull it up by 0.4.
    logprobs_T, behaviour_T = pair([0.4, 1.0])
    logprobs_T.requires_grad_()
    terms = ppo(logprobs_T, behaviour_T, torch.ones(2).double(), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    loss = (terms.loss_T * bypass(logprobs_T, behaviour_T, token_mask=ICEPOP).weight_T).sum()
    assert gradient_of(loss, logprobs_T) == pytest.approx([0.0, -1.0])


def test_extreme_log_probabilities_stay_finite() -> None:
    a_T, b_T = torch.tensor([0.0, -500.0, -math.inf, -1.0]), torch.tensor([-500.0, 0.0, -1.0, -1.0])
    weight_T, kept_T, _ = decoupled(a_T, b_T, truncate=None, token_mask=None)
    assert weight_T.tolist() == pytest.approx([math.exp(20), math.exp(-20), math.exp(-20), 1.0], rel=1e-5)
    assert decoupled(a_T, b_T, truncate=2.0, token_mask=ICEPOP).weight_T.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert bypass(a_T, b_T, token_mask=ICEPOP).weight_T.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert kept_T.all()


def test_bad_arguments_are_refused() -> None:
    one = torch.zeros(1)
    for bounds in ((1.0, 5.0), (0.5, 1.0), (-0.1, 5.0), (5.0, 0.5), (math.nan, 5.0)):
        with pytest.raises(ValueError, match="must enclose 1"):
            bypass(one, one, token_mask=bounds)
        with pytest.raises(ValueError, match="must enclose 1"):
            decoupled(one, one, truncate=None, token_mask=bounds)
    for cap in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="truncate"):
            decoupled(one, one, truncate=cap, token_mask=None)
    with pytest.raises(ValueError, match="1-D"):
        bypass(torch.zeros(2), one, token_mask=None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-30.0, 30.0), min_size=1, max_size=8),
    st.none() | st.floats(0.5, 10.0),
    st.none() | st.tuples(st.floats(0.0, 0.99), st.floats(1.01, 100.0)),
)
def test_corrections_equal_the_loop(
    logs: list[float], truncate: float | None, token_mask: tuple[float, float] | None
) -> None:
    a_T, b_T = torch.tensor(logs, dtype=torch.float64), torch.zeros(len(logs), dtype=torch.float64)
    ratios = [math.exp(max(-20.0, min(20.0, x))) for x in logs]
    kept = [token_mask is None or token_mask[0] <= r <= token_mask[1] for r in ratios]
    weights = [(r if truncate is None else min(r, truncate)) if k else 0.0 for r, k in zip(ratios, kept, strict=True)]
    weight_T, kept_T, _ = decoupled(a_T, b_T, truncate=truncate, token_mask=token_mask)
    assert kept_T.tolist() == kept
    assert weight_T.tolist() == pytest.approx(weights)
    assert bypass(a_T, b_T, token_mask=token_mask).weight_T.tolist() == [float(k) for k in kept]


# --- age ------------------------------------------------------------------------------------------------------------


def test_age_mask_by_hand() -> None:
    # Version 7, η = 2: ages 0, 2 are young enough, 3 is not; −1 was not sampled.
    versions_T = torch.tensor([7, 5, 4, -1])
    assert age_mask(versions_T, version=7, max_staleness=2).tolist() == [True, True, False, False]
    assert age_mask(versions_T, version=7, max_staleness=0).tolist() == [True, False, False, False]
    assert age_mask(torch.tensor([0, -1]), version=0, max_staleness=5).tolist() == [True, False]


def test_age_mask_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="version 8 reached a learner at version 7"):
        age_mask(torch.tensor([8]), version=7, max_staleness=1)
    with pytest.raises(ValueError, match="max_staleness"):
        age_mask(torch.tensor([7]), version=7, max_staleness=-1)


# --- metrics --------------------------------------------------------------------------------------------------------


class Tokens(TypedDict):
    logprobs_T: Tensor
    behaviour_T: Tensor
    mask_T: Tensor
    kept_T: Tensor
    clipped_T: Tensor
    turns_T: Tensor
    versions_T: Tensor
    episode_tokens_T: Tensor


def tokens(
    ratios: Sequence[float],
    mask: Sequence[bool],
    kept: Sequence[bool],
    clipped: Sequence[bool],
    turns: Sequence[int],
    versions: Sequence[int],
    lengths: Sequence[int],
) -> Tokens:
    logprobs_T, behaviour_T = pair(ratios)
    return {
        "logprobs_T": logprobs_T,
        "behaviour_T": behaviour_T,
        "mask_T": torch.tensor(mask),
        "kept_T": torch.tensor(kept),
        "clipped_T": torch.tensor(clipped),
        "turns_T": torch.tensor(turns),
        "versions_T": torch.tensor(versions),
        "episode_tokens_T": torch.tensor(lengths),
    }


def test_stats_by_hand() -> None:
    # Sampled: u = 1, 2, 0.5, 1. The third column was not sampled: nothing of it may show.
    # ESS = (1 + 2 + 0.5 + 1)² / (4 · (1 + 4 + 0.25 + 1)) = 20.25 / 25 = 0.81.
    # −log u = 0, −ln 2, ln 2, 0: k1 = 0.   k3: (0 + (1 − ln 2) + (−0.5 + ln 2) + 0) / 4 = 0.125.
    # |Δ| = 0, ln 2, ln 2, 0: mean ln 2 / 2; turn 0: (0 + ln 2) / 2; turn 1: (ln 2 + 0) / 2.
    # Ages at version 5: 0, 0, 2, 1: mean 0.75.  One clipped of 4, two masked of 4.
    # Episodes of 3 tokens (bucket 2-3): one masked of 3; of 4 tokens (bucket 4-7): one of 1.
    stats = OffPolicyStats()
    stats.add(
        **tokens(
            ratios=[1.0, 2.0, 9.0, 0.5, 1.0],
            mask=[True, True, False, True, True],
            kept=[True, True, True, False, False],
            clipped=[False, True, True, False, False],
            turns=[0, 0, -1, 1, 1],
            versions=[5, 5, -1, 3, 4],
            lengths=[3, 3, 3, 3, 4],
        ),
        version=5,
    )
    assert stats.result() == pytest.approx(
        {
            "tokens": 4.0,
            "ess": 0.81,
            "kl_k1": 0.0,
            "kl_k3": 0.125,
            "abs_dlogp": math.log(2) / 2,
            "abs_dlogp/turn_0": math.log(2) / 2,
            "abs_dlogp/turn_1": math.log(2) / 2,
            "clip_fraction": 0.25,
            "masked_share": 0.5,
            "masked_share/length_2_3": 1 / 3,
            "masked_share/length_4_7": 1.0,
            "age_mean": 0.75,
            "age_max": 2.0,
            "age_share/0": 0.5,
            "age_share/1": 0.25,
            "age_share/2": 0.25,
        },
        abs=1e-9,
    )


def test_kl_has_the_direction_and_size_of_kl_from_the_sampler() -> None:
    # μ = (3/4, 1/4), π = (1/2, 1/2). Sampling μ exactly: three tokens with u = 2/3, one with u = 2.
    # KL(μ‖π) = 0.75 ln 1.5 + 0.25 ln 0.5 = 0.13081; KL(π‖μ) would be 0.14384. k3 agrees, since mean(u) = 1.
    n = 4
    stats = OffPolicyStats()
    stats.add(**tokens([2 / 3] * 3 + [2.0], [True] * n, [True] * n, [False] * n, [0] * n, [0] * n, [n] * n), version=0)
    assert stats.result()["kl_k1"] == pytest.approx(0.13081, abs=1e-5)
    assert stats.result()["kl_k3"] == pytest.approx(0.13081, abs=1e-5)


def test_stats_on_policy_and_far_off() -> None:
    n = 5
    rest = ([True] * n, [True] * n, [False] * n, [0] * n, [3] * n, [n] * n)
    on = OffPolicyStats()
    on.add(**tokens([1.0] * n, *rest), version=3)
    assert (on.result()["ess"], on.result()["kl_k3"], on.result()["abs_dlogp"]) == (1.0, 0.0, 0.0)
    # One token carries all the weight: ESS is 1/5 of a token a token. Nothing overflows.
    far = OffPolicyStats()
    far.add(**tokens([1e300, 1e-300, 1e-300, 1e-300, 1e-300], *rest), version=3)
    assert far.result()["ess"] == pytest.approx(0.2)
    assert all(math.isfinite(x) for x in far.result().values())


def test_stats_without_tokens() -> None:
    stats = OffPolicyStats()
    assert stats.result() == {"tokens": 0.0}
    stats.add(**tokens([1.0], [False], [True], [False], [-1], [-1], [1]), version=0)
    assert stats.result() == {"tokens": 0.0}


def test_stats_refuse_a_token_from_the_future() -> None:
    with pytest.raises(ValueError, match="version 4 reached a learner at version 3"):
        OffPolicyStats().add(**tokens([1.0], [True], [True], [False], [0], [4], [1]), version=3)


token_rows = st.lists(
    st.tuples(
        st.floats(0.01, 100.0),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.integers(0, 3),
        st.integers(0, 6),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(token_rows, st.integers(0, 16), st.integers(0, 16))
def test_stats_equal_the_loop_in_any_split(
    rows: list[tuple[float, bool, bool, bool, int, int, int]], cut: int, other: int
) -> None:
    stats = OffPolicyStats()
    for a, b in pairwise([0, *sorted((min(cut, len(rows)), min(other, len(rows)))), len(rows)]):
        if a < b:
            stats.add(**tokens(*zip(*rows[a:b], strict=True)), version=6)
    result = stats.result()
    sampled = [row for row in rows if row[1]]
    n = len(sampled)
    assert result["tokens"] == n
    if n == 0:
        return
    u = [row[0] for row in sampled]
    assert result["ess"] == pytest.approx(sum(u) ** 2 / (n * sum(x * x for x in u)))
    assert result["kl_k1"] == pytest.approx(-sum(map(math.log, u)) / n, abs=1e-9)
    assert result["kl_k3"] == pytest.approx(sum(x - 1 - math.log(x) for x in u) / n, abs=1e-9)
    assert result["masked_share"] == pytest.approx(sum(not row[2] for row in sampled) / n)
    assert result["clip_fraction"] == pytest.approx(sum(row[3] for row in sampled) / n)
    assert result["age_max"] == max(6 - row[5] for row in sampled)
    ages = Counter(6 - row[5] for row in sampled)
    assert {k: v for k, v in result.items() if k.startswith("age_share/")} == pytest.approx(
        {f"age_share/{age}": count / n for age, count in ages.items()}
    )
    for turn in {row[4] for row in sampled}:
        own = [abs(math.log(row[0])) for row in sampled if row[4] == turn]
        assert result[f"abs_dlogp/turn_{turn}"] == pytest.approx(sum(own) / len(own), abs=1e-9)
    for low in (1, 2, 4, 8, 16, 32):
        own_masked = [not row[2] for row in sampled if low <= row[6] < 2 * low]
        key = f"masked_share/length_{low}_{2 * low - 1}"
        assert (key in result) == bool(own_masked)
        if own_masked:
            assert result[key] == pytest.approx(sum(own_masked) / len(own_masked))
