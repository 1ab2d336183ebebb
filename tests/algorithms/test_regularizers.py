"""The KL estimators' numbers and exact expected gradients, the entropy bonus, and the adapted coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from areal_agents.algorithms.regularizers import (
    KlEstimator,
    Regularizers,
    RegularizerStats,
    adapted,
    kl_estimate,
)

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
SAMPLER = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
LOGITS = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64)


def divergence(logits: Tensor) -> Tensor:
    logs = torch.log_softmax(logits, 0)
    return (logs.exp() * (logs - REFERENCE)).sum()


def expected(kind: KlEstimator, sampler: Tensor) -> tuple[float, Tensor]:
    """The estimator's exact mean over all tokens that the sampler may draw, and the mean of its gradient."""
    logits = LOGITS.clone().requires_grad_()
    terms = kl_estimate(kind, torch.log_softmax(logits, 0), REFERENCE, sampler)
    value = (sampler.exp() * terms).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


def exact() -> tuple[float, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    value = divergence(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


def test_numbers_by_hand() -> None:
    half, quarter = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    # l = log(0.5/0.25) = log 2; ref/π = 0.5; u = 0.5/0.2 = 2.5
    sampler = torch.tensor([math.log(0.2)])
    found = {k: float(kl_estimate(k, half, quarter, sampler)) for k in ("k1", "k2", "k3", "k3_unbiased")}
    assert found == pytest.approx(
        {"k1": 0.693147, "k2": 0.240227, "k3": 0.193147, "k3_unbiased": 2.5 * 0.193147}, abs=1e-5
    )


def test_on_policy_values_and_gradients_by_enumeration() -> None:
    on_policy = torch.log_softmax(LOGITS, 0)
    value, gradient = exact()
    for kind in ("k1", "k3", "k3_unbiased"):
        assert expected(kind, on_policy)[0] == pytest.approx(value, abs=1e-12), kind
    assert expected("k2", on_policy)[0] != pytest.approx(value, abs=1e-3)
    assert torch.allclose(expected("k2", on_policy)[1], gradient)
    assert torch.allclose(expected("k3_unbiased", on_policy)[1], gradient)
    assert torch.allclose(expected("k1", on_policy)[1], torch.zeros(3, dtype=torch.float64), atol=1e-12)
    other = torch.log_softmax(LOGITS.clone().requires_grad_(), 0)
    forward = (REFERENCE.exp() * (REFERENCE - other)).sum()
    assert forward.requires_grad
    logits = LOGITS.clone().requires_grad_()
    (right,) = torch.autograd.grad((REFERENCE.exp() * (REFERENCE - torch.log_softmax(logits, 0))).sum(), logits)
    assert torch.allclose(expected("k3", on_policy)[1], right), "k3's gradient is that of KL(ref‖π)"


def test_only_the_unbiased_estimator_is_right_off_policy() -> None:
    value, gradient = exact()
    found, slope = expected("k3_unbiased", SAMPLER)
    assert found == pytest.approx(value, abs=1e-12)
    assert torch.allclose(slope, gradient)
    for kind in ("k2", "k3"):
        assert not torch.allclose(expected(kind, SAMPLER)[1], gradient, atol=1e-2), kind


def test_the_terms_of_a_token_and_their_means() -> None:
    logprobs = torch.tensor([-0.5, -1.0], requires_grad=True)
    entropy = torch.tensor([0.7, 0.3], requires_grad=True)
    stats = RegularizerStats()
    terms = Regularizers(kl=0.1, estimator="k2", entropy=0.01)
    total = terms(logprobs, entropy, torch.tensor([-0.5, -0.5]), torch.tensor([-0.7, -0.5]), stats)
    # ½·0.2² = 0.02 and ½·0.5² = 0.125
    assert total.tolist() == pytest.approx([0.002 - 0.007, 0.0125 - 0.003], abs=1e-7)
    to_logprobs, to_entropy = torch.autograd.grad(total.sum(), (logprobs, entropy))
    assert to_logprobs.tolist() == pytest.approx([0.02, -0.05])
    assert to_entropy.tolist() == pytest.approx([-0.01, -0.01])
    found = stats.result()
    assert found["entropy"] == pytest.approx(0.5)
    assert found["kl_reference"] == pytest.approx((0.2 - 0.5) / 2)
    k3 = ((math.exp(-0.2) - 1 + 0.2) + (math.exp(0.5) - 1 - 0.5)) / 2
    assert found["kl_reference_k3"] == pytest.approx(k3)
    assert RegularizerStats().result() == {}


@pytest.mark.parametrize(
    ("kl", "right"),
    [(0.02, 1.0), (0.022, 1.0 + 0.1 * 0.05), (0.2, 1.0 + 0.2 * 0.05), (0.0, 1.0 - 0.2 * 0.05), (-1.0, 0.99)],
)
def test_the_coefficient_follows_the_divergence(kl: float, right: float) -> None:
    assert adapted(2.0, kl, target=0.02, episodes=50, horizon=1000) == pytest.approx(2.0 * right)


@pytest.mark.parametrize(("kl", "right"), [(0.0, 0.8), (1.0, 1.2)])
def test_the_coefficient_changes_by_a_fifth_a_step_at_most(kl: float, right: float) -> None:
    # 48 episodes are ten horizons: 1 − 0.2·9.6 would be −0.92, a reward for leaving the reference.
    assert adapted(1.0, kl, target=0.1, episodes=48, horizon=5) == pytest.approx(right)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown estimator"):
        kl_estimate("k4", LOGITS, REFERENCE, SAMPLER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one length"):
        kl_estimate("k1", LOGITS, REFERENCE[:2], SAMPLER)
    with pytest.raises(ValueError, match="must be positive"):
        adapted(1.0, 0.1, target=0.0, episodes=1, horizon=1)


def test_the_pull_to_the_sampler_by_hand() -> None:
    # τ = 0.5, u = 2 and 0.5: 0.5·(log 2)² = 0.2402 both; gradient 2·0.5·log u = ±0.6931: back from above and below.
    behaviour_T = torch.tensor([0.2, 0.4], dtype=torch.float64).log()
    logprobs_T = torch.tensor([0.4, 0.2], dtype=torch.float64).log().requires_grad_()
    terms = Regularizers(sampler=0.5)
    assert terms.any
    value_T = terms(logprobs_T, None, behaviour_T, None, RegularizerStats())
    assert value_T.tolist() == pytest.approx([0.240227, 0.240227], abs=1e-6)
    (gradient,) = torch.autograd.grad(value_T.sum(), logprobs_T)
    assert gradient.tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
