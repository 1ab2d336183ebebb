"""Hand-worked numbers, a textbook reference and gradients of ``areal_agents.algorithms.losses``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.losses import (
    LossTerms,
    cispo,
    cross_entropy,
    dppo_tv,
    ppo,
    reinforce,
    sapo,
    token_mean,
)
from areal_agents.algorithms.offpolicy import LOG_RATIO_BOUND

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


def gradient_of(loss: Tensor, wrt: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, wrt)
    return [float(x) for x in gradient]


def ppo_at(ratios: Sequence[float], advantages: Sequence[float]) -> tuple[list[float], list[float], list[bool]]:
    """Loss, dL/dlogπ and clipped of tokens whose π/p is given, with CLIP."""
    old_T = torch.full((len(ratios),), -1.5, dtype=torch.float64)
    logprobs_T = (old_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    terms = ppo(logprobs_T, old_T, torch.tensor(advantages, dtype=torch.float64), **CLIP)
    return terms.loss_T.tolist(), gradient_of(terms.loss_T.sum(), logprobs_T), terms.clipped_T.tolist()


# --- ppo ------------------------------------------------------------------------------------------------------------


def test_ppo_by_hand() -> None:
    # Clip to [0.8, 1.3], c = 3. dL/dlogπ = −A·r where not clipped.
    # A = 2:  r = 1: −2.            r = 1.25: −2.5, inside.    r = 1.5: clipped at 1.3: −2.6, gradient 0.
    #         r = 0.5: min(1.0, 0.8 · 2) = 1.0, so −1.0 and gradient −1.0: a good token that became rarer is pulled up.
    # A = −2: r = 1: 2.             r = 0.5: max(1.0, 1.6) = 1.6, clipped.
    #         r = 1.5: max(3.0, 2.6) = 3.0, gradient 3.0.      r = 4: max(8, 2.6) = 8, dual clip 3 · 2 = 6.
    loss, gradient, clipped = ppo_at([1.0, 1.25, 1.5, 0.5, 1.0, 0.5, 1.5, 4.0], [2.0] * 4 + [-2.0] * 4)
    assert loss == pytest.approx([-2.0, -2.5, -2.6, -1.0, 2.0, 1.6, 3.0, 6.0])
    assert gradient == pytest.approx([-2.0, -2.5, 0.0, -1.0, 2.0, 0.0, 3.0, 0.0])
    assert clipped == [False, False, True, False, False, True, False, True]


def test_ppo_on_policy_is_the_policy_gradient() -> None:
    # r = 1: descending L raises log π of good tokens, lowers it of bad ones, by exactly A.
    _, gradient, clipped = ppo_at([1.0, 1.0, 1.0], [0.7, -0.4, 0.0])
    assert gradient == pytest.approx([-0.7, 0.4, 0.0])
    assert clipped == [False] * 3


def test_a_token_without_advantage_is_never_clipped() -> None:
    loss, gradient, clipped = ppo_at([0.1, 10.0], [0.0, 0.0])
    assert loss == [0.0, 0.0]
    assert gradient == [0.0, 0.0]
    assert clipped == [False, False]


def test_dual_clip_bounds_the_loss_and_infinity_turns_it_off() -> None:
    # r = 100, A = −1: 100 without the dual clip, 3 with it.
    logprobs_T, old_T, advantages_T = torch.tensor([math.log(100.0)]), torch.zeros(1), torch.tensor([-1.0])
    bounded = ppo(logprobs_T, old_T, advantages_T, **CLIP)
    free = ppo(logprobs_T, old_T, advantages_T, clip_low=0.2, clip_high=0.3, dual_clip=math.inf)
    assert bounded.loss_T.item() == pytest.approx(3.0)
    assert free.loss_T.item() == pytest.approx(100.0, rel=1e-5)
    assert (bounded.clipped_T.item(), free.clipped_T.item()) == (True, False)


def test_extreme_ratios_stay_finite_without_gradient() -> None:
    # Without a dual clip the bound of the log ratio itself stops the gradient: e^20 = 4.85e8.
    logprobs_T = torch.tensor([200.0, -200.0, -math.inf]).requires_grad_()
    terms = ppo(
        logprobs_T, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), clip_low=0.2, clip_high=0.3, dual_clip=math.inf
    )
    assert terms.loss_T.tolist() == pytest.approx([math.exp(LOG_RATIO_BOUND), -math.exp(-20), -math.exp(-20)], rel=1e-5)
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == [0.0, 0.0, 0.0]


def test_no_gradient_reaches_the_old_policy_or_the_advantages() -> None:
    logprobs_T = torch.tensor([-1.0]).requires_grad_()
    old_T, advantages_T = torch.tensor([-1.1]).requires_grad_(), torch.tensor([1.0]).requires_grad_()
    loss = ppo(logprobs_T, old_T, advantages_T, **CLIP).loss_T.sum()
    current, *others = torch.autograd.grad(loss, (logprobs_T, old_T, advantages_T), allow_unused=True)
    assert current is not None
    assert others == [None, None]


def test_ppo_with_the_current_policy_as_old_has_a_gradient() -> None:
    # A caller may pass the same tensor twice: r ≡ 1, and the gradient must not cancel.
    logprobs_T = torch.tensor([-1.0, -2.0]).requires_grad_()
    loss = ppo(logprobs_T, logprobs_T, torch.tensor([1.0, -1.0]), **CLIP).loss_T.sum()
    assert gradient_of(loss, logprobs_T) == [-1.0, 1.0]


def textbook_ppo(r: float, a: float) -> float:
    """max(−rA, −clip(r)A), and min(c|A|, that) for A < 0."""
    loss = max(-r * a, -min(max(r, 0.8), 1.3) * a)
    return min(3.0 * abs(a), loss) if a < 0 else loss


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-3.0, 3.0), st.floats(-5.0, 5.0)), min_size=1, max_size=8))
def test_ppo_equals_the_textbook_form(tokens: list[tuple[float, float]]) -> None:
    ratios, advantages = [math.exp(x) for x, _ in tokens], [a for _, a in tokens]
    loss, gradient, clipped = ppo_at(ratios, advantages)
    assert loss == pytest.approx([textbook_ppo(r, a) for r, a in zip(ratios, advantages, strict=True)], abs=1e-9)
    expected = [0.0 if c else -a * r for r, a, c in zip(ratios, advantages, clipped, strict=True)]
    assert gradient == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": math.nan}, "dual_clip"),
    ],
)
def test_ppo_refuses_bad_bounds(changed: dict[str, float], message: str) -> None:
    bounds = CLIP | changed
    with pytest.raises(ValueError, match=message):
        ppo(torch.zeros(1), torch.zeros(1), torch.zeros(1), **bounds)


def test_shapes_are_checked() -> None:
    # Broadcasting [2] with [2, 1] would silently give [2, 2].
    with pytest.raises(ValueError, match="1-D"):
        ppo(torch.zeros(2), torch.zeros(2), torch.zeros(1), **CLIP)
    with pytest.raises(ValueError, match="1-D"):
        ppo(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1), **CLIP)
    with pytest.raises(ValueError, match="1-D"):
        token_mean(torch.zeros(2), torch.ones(1, dtype=torch.bool), tokens=1)


# --- the other losses of single tokens ------------------------------------------------------------------------------


def at(ratios: Sequence[float], old: float = 0.2) -> tuple[Tensor, Tensor]:
    """log π with gradient and log p = log ``old`` of tokens whose π/p is given."""
    old_T = torch.full((len(ratios),), old, dtype=torch.float64).log()
    return (old_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_(), old_T


def told(terms: LossTerms, logprobs_T: Tensor) -> tuple[list[float], list[float], list[bool]]:
    return terms.loss_T.tolist(), gradient_of(terms.loss_T.sum(), logprobs_T), terms.clipped_T.tolist()


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_reinforce_by_hand() -> None:
    # −A·log π: A = 2, π = 0.5: 2·0.693 = 1.386, gradient −2. A = −1, π = 0.25: −1.386, gradient 1.
    logprobs_T = f64(0.5, 0.25).log().requires_grad_()
    loss, gradient, clipped = told(reinforce(logprobs_T, f64(2.0, -1.0)), logprobs_T)
    assert loss == pytest.approx([1.3863, -1.3863], abs=1e-4)
    assert (gradient, clipped) == ([-2.0, 1.0], [False, False])


def test_cispo_by_hand() -> None:
    # p = 0.2, bound 2. r = 3 weighs 2 and keeps its gradient −2·A; r = 0.1 weighs 0.1, since there is no lower bound.
    # loss = −w·A·log π: −2·1·log 0.6 = 1.0217;  −0.1·1·log 0.02 = 0.3912;  r = 1.5, A = −2: 3·log 0.3 = −3.6119.
    logprobs_T, old_T = at([3.0, 0.1, 1.5])
    loss, gradient, clipped = told(cispo(logprobs_T, old_T, f64(1.0, 1.0, -2.0)), logprobs_T)
    assert loss == pytest.approx([1.0217, 0.3912, -3.6119], abs=1e-4)
    assert gradient == pytest.approx([-2.0, -0.1, 3.0])
    assert clipped == [True, False, False]
    _, gradient, clipped = told(cispo(logprobs_T, old_T, f64(1.0, 1.0, -2.0), clip_low=0.2), logprobs_T)
    assert gradient == pytest.approx([-2.0, -0.8, 3.0])
    assert clipped == [True, True, False]


def test_sapo_by_hand() -> None:
    # A = 1, τ = 1, r = 3: −4·σ(2) = −4·0.8808 = −3.5232; gradient −4·σ(2)·(1−σ(2))·3 = −4·0.1050·3 = −1.2599.
    # A = −1, τ = 2, r = 1: (4/2)·σ(0) = 1; gradient 4·0.25·1 = 1.
    logprobs_T, old_T = at([3.0, 1.0])
    terms = sapo(logprobs_T, old_T, f64(1.0, -1.0), tau_positive=1.0, tau_negative=2.0)
    loss, gradient, clipped = told(terms, logprobs_T)
    assert loss == pytest.approx([-3.5232, 1.0], abs=1e-4)
    assert gradient == pytest.approx([-1.2599, 1.0], abs=1e-4)
    assert clipped == [False, False]


def test_sapo_fades_on_both_sides() -> None:
    logprobs_T, old_T = at([0.01, 0.5, 1.0, 2.0, 4.0, 1e8])
    _, gradient, _ = told(sapo(logprobs_T, old_T, torch.ones(6, dtype=torch.float64)), logprobs_T)
    assert gradient[2] == pytest.approx(-1.0)
    assert gradient[0] > gradient[1] > -1.0  # 0.01: −4·σ(−0.99)·σ(0.99)·0.01
    assert gradient[4] > -4 * 0.19 * 4
    assert gradient[5] == 0.0


def test_dppo_by_hand() -> None:
    # μ = p = 0.2, δ = 0.1. π = 0.25: moved 0.05, kept: gradient −1.25. π = 0.35: moved 0.15, A > 0: stopped, and A < 0:
    # kept, 1.75. π = 0.05, A < 0: moved −0.15, stopped; A > 0: kept, −0.25.
    logprobs_T, old_T = at([1.25, 1.75, 1.75, 0.25, 0.25])
    advantages_T = f64(1.0, 1.0, -1.0, -1.0, 1.0)
    terms = dppo_tv(logprobs_T, old_T, old_T, advantages_T, threshold=0.1)
    loss, gradient, clipped = told(terms, logprobs_T)
    assert gradient == pytest.approx([-1.25, 0.0, 1.75, 0.0, -0.25])
    assert loss[0] == pytest.approx(-1.25 * math.log(0.25))
    assert clipped == [False, True, False, True, False]


def test_dppo_measures_its_distance_to_the_sampler_and_its_ratio_to_the_old_policy() -> None:
    # π = 0.4, p = 0.2 (r = 2), μ = 0.39: hardly moved, so kept. A rare token may triple: 0.001 to 0.003.
    logprobs_T = f64(0.4, 0.003).log().requires_grad_()
    terms = dppo_tv(logprobs_T, f64(0.2, 0.001).log(), f64(0.39, 0.001).log(), f64(1.0, 1.0), threshold=0.1)
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx([-2.0, -3.0])
    short = dppo_tv(logprobs_T, f64(0.2, 0.001).log(), f64(0.39, 0.001).log(), f64(1.0, 1.0), truncate=2.5)
    assert gradient_of(short.loss_T.sum(), logprobs_T) == pytest.approx([-2.0, -2.5])
    assert short.clipped_T.tolist() == [False, True]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-3.0, 3.0), st.floats(-5.0, 5.0)), min_size=1, max_size=8))
def test_losses_equal_the_loops(tokens: list[tuple[float, float]]) -> None:
    ratios, advantages = [math.exp(x) for x, _ in tokens], [a for _, a in tokens]
    logprobs_T, old_T = at(ratios, old=0.04)  # π stays under 1
    a_T = torch.tensor(advantages, dtype=torch.float64)
    logs = [math.log(0.04 * r) for r in ratios]
    pairs = list(zip(ratios, advantages, logs, strict=True))
    assert reinforce(logprobs_T, a_T).loss_T.tolist() == pytest.approx([-a * x for _, a, x in pairs], abs=1e-9)
    expected = [-min(r, 2.0) * a * x for r, a, x in pairs]
    assert cispo(logprobs_T, old_T, a_T).loss_T.tolist() == pytest.approx(expected, abs=1e-9)
    expected = []
    for r, a, _ in pairs:
        tau = 1.0 if a > 0 else 1.05
        expected.append(-a * 4 / tau / (1 + math.exp(-tau * (r - 1))))
    assert sapo(logprobs_T, old_T, a_T).loss_T.tolist() == pytest.approx(expected, abs=1e-9)
    expected = []
    for r, a, x in pairs:
        moved = 0.04 * r - 0.04
        expected.append(0.0 if (moved > 0.2 if a > 0 else moved < -0.2) else -min(r, 20.0) * a * x)
    assert dppo_tv(logprobs_T, old_T, old_T, a_T).loss_T.tolist() == pytest.approx(expected, abs=1e-9)


def test_every_loss_of_a_token_has_the_policy_gradient_on_policy() -> None:
    logprobs_T, old_T = at([1.0, 1.0, 1.0])
    a_T = f64(0.7, -0.4, 0.0)
    every = [
        ppo(logprobs_T, old_T, a_T),
        reinforce(logprobs_T, a_T),
        cispo(logprobs_T, old_T, a_T),
        sapo(logprobs_T, old_T, a_T),
        dppo_tv(logprobs_T, old_T, old_T, a_T),
    ]
    for terms in every:
        assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx([-0.7, 0.4, 0.0])
        assert not terms.clipped_T.any()


def test_cispo_inside_its_bound_has_the_gradient_of_the_unclipped_ratio() -> None:
    logprobs_T, old_T = at([0.1, 0.7, 1.9])
    a_T = f64(1.0, -1.0, 0.5)
    free = -(a_T * torch.exp(logprobs_T - old_T)).sum()
    expected = gradient_of(free, logprobs_T)
    assert gradient_of(cispo(logprobs_T, old_T, a_T).loss_T.sum(), logprobs_T) == pytest.approx(expected)


def test_extreme_ratios_stay_finite_in_every_loss() -> None:
    logprobs_T = torch.tensor([0.0, -200.0]).requires_grad_()
    old_T, a_T = torch.tensor([-200.0, 0.0]), torch.tensor([-1.0, 1.0])
    for terms in (
        cispo(logprobs_T, old_T, a_T),
        sapo(logprobs_T, old_T, a_T),
        dppo_tv(logprobs_T, old_T, old_T, a_T),
    ):
        assert terms.loss_T.isfinite().all()
        assert all(math.isfinite(g) for g in gradient_of(terms.loss_T.sum(), logprobs_T))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cispo(x, x, x, clip_high=0.0), "clip_high"),
        (lambda x: cispo(x, x, x, clip_low=1.0), "clip_low"),
        (lambda x: sapo(x, x, x, tau_negative=0.0), "tau_negative"),
        (lambda x: dppo_tv(x, x, x, x, threshold=1.0), "threshold"),
        (lambda x: dppo_tv(x, x, x, x, truncate=1.0), "truncate"),
        (lambda x: dppo_tv(x, x, torch.zeros(2), x), "1-D"),
        (lambda x: reinforce(x, torch.zeros(2)), "1-D"),
    ],
)
def test_losses_refuse_bad_bounds_and_shapes(call: Callable[[Tensor], LossTerms], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1))


# --- cross entropy --------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    # −log 0.5 = 0.6931, −log 0.25 = 1.3863; gradient −1 each.
    logprobs_T = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss_T = cross_entropy(logprobs_T)
    assert loss_T.tolist() == pytest.approx([0.6931, 1.3863], abs=1e-4)
    assert gradient_of(loss_T.sum(), logprobs_T) == [-1.0, -1.0]
