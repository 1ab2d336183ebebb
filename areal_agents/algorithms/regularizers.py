"""The terms beside the policy loss: a KL divergence to a reference policy, a pull to the sampler, an entropy bonus.

π is the current policy, ref the reference, μ the sampler; l = log π − log ref of a sampled token, u = π/μ.

    k1           l                      unbiased as a number; its gradient is 0 on average, so it is no loss
    k2           ½·l²                   its gradient is that of KL(π‖ref) on policy
    k3           ref/π − 1 + l          GRPO's; never negative; its gradient is that of another divergence, KL(ref‖π)
    k3_unbiased  u·(ref/π − 1 + l)      number and gradient are those of KL(π‖ref), off policy too

Sources: Schulman, "Approximating KL divergence" (2020), for k1 to k3; 2402.03300, eq. 4, for k3 in GRPO's loss;
2506.09477 and 2510.01555 on which gradients they have; 2512.02556, eq. 7, for k3_unbiased. The gradients of all four
are enumerated in ``tests/algorithms/test_regularizers.py``.

The pull is τ·(log u)², the regulariser of Kimi K2.5 (2602.02276, τ = 1e-3): its gradient 2τ·log u·∇log π brings each
sampled token's probability back to what it was sampled with, from above and from below.

A token that the correction, the mask or its age masks has none of these terms, nor has one of an episode that
``algorithm.overlong`` leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from areal_agents.algorithms.offpolicy import check_same_shape, log_ratio

KlEstimator = Literal["k1", "k2", "k3", "k3_unbiased"]


def kl_estimate(kind: KlEstimator, logprobs_T: Tensor, reference_T: Tensor, behaviour_T: Tensor) -> Tensor:
    """Estimate KL(π‖ref) from each sampled token, with the gradient that the module's text says.

    Args:
        kind: the estimator.
        logprobs_T: log π, float [T].
        reference_T: log ref, float [T].
        behaviour_T: log μ, float [T]; read by ``k3_unbiased`` alone.

    Returns:
        float [T], in nats.

    Raises:
        ValueError: for unequal shapes or an unknown estimator.
    """
    check_same_shape(logprobs_T=logprobs_T, reference_T=reference_T, behaviour_T=behaviour_T)
    log_T = log_ratio(logprobs_T, reference_T.detach())
    match kind:
        case "k1":
            return log_T
        case "k2":
            return 0.5 * log_T.square()
        case "k3":
            return torch.exp(-log_T) - 1.0 + log_T
        case "k3_unbiased":
            return torch.exp(log_ratio(logprobs_T, behaviour_T.detach())) * (torch.exp(-log_T) - 1.0 + log_T)
    raise ValueError(f"unknown estimator of a KL divergence: {kind!r}")


def adapted(coef: float, kl: float, *, target: float, episodes: int, horizon: int) -> float:
    """Return the next coefficient of a KL term, which keeps the divergence near ``target``.

        β ← β · (1 + clip(KL/target − 1, ±0.2) · min(episodes/horizon, 1))

    The proportional controller of 1909.08593 (section 2.2). One step changes β by a fifth at most, however short the
    horizon is: β stays positive.

    Args:
        coef: β.
        kl: the batch's mean divergence, nats a token.
        target: the divergence to keep to, nats a token.
        episodes: episodes of the batch.
        horizon: episodes over which β may change by a fifth.

    Raises:
        ValueError: where target or horizon is not positive.
    """
    if not target > 0 or not horizon > 0:
        raise ValueError(f"target = {target} and horizon = {horizon} must be positive")
    return coef * (1.0 + min(0.2, max(-0.2, kl / target - 1.0)) * min(episodes / horizon, 1.0))


@dataclass
class RegularizerStats:
    """Means over the sampled tokens of a batch, masked ones included."""

    tokens: int = 0
    _sums: dict[str, float] = field(default_factory=dict)

    def add(self, **values_T: Tensor) -> None:
        """Count the tokens of one call. Every value is [T]."""
        self.tokens += len(next(iter(values_T.values())))
        for name, value_T in values_T.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value_T.detach().double().sum())

    def result(self) -> dict[str, float]:
        """Return the means by name, none of them where no token was added."""
        return {name: total / self.tokens for name, total in self._sums.items()} if self.tokens else {}


@dataclass(frozen=True, slots=True)
class Regularizers:
    """The terms that the settings choose.

    β · kl_estimate + τ · (log u)² − c · H,  a token
    """

    kl: float = 0.0
    """β as it is now; 0: no divergence is computed."""
    estimator: KlEstimator = "k3"
    entropy: float = 0.0
    """c."""
    sampler: float = 0.0
    """τ."""

    @property
    def any(self) -> bool:
        return bool(self.kl or self.entropy or self.sampler)

    def __call__(
        self,
        logprobs_T: Tensor,
        entropy_T: Tensor | None,
        behaviour_T: Tensor,
        reference_T: Tensor | None,
        stats: RegularizerStats,
    ) -> Tensor:
        """Return what the terms add to the loss of each token, float [T], with gradient.

        Args:
            logprobs_T: log π, float [T].
            entropy_T: H of the distribution that each token was sampled from, float [T]. None where c is 0.
            behaviour_T: log μ, float [T].
            reference_T: log ref, float [T]. None where β is 0.
            stats: gets ``entropy``, ``kl_reference`` (k1) and ``kl_reference_k3``.
        """
        total_T, seen = torch.zeros_like(logprobs_T), {}
        if self.kl:
            assert reference_T is not None, "a KL term without a reference"
            total_T = total_T + self.kl * kl_estimate(self.estimator, logprobs_T, reference_T, behaviour_T)
            for name, kind in (("kl_reference", "k1"), ("kl_reference_k3", "k3")):
                seen[name] = kl_estimate(kind, logprobs_T.detach(), reference_T, behaviour_T)  # type: ignore[arg-type]
        if self.sampler:
            total_T = total_T + self.sampler * log_ratio(logprobs_T, behaviour_T.detach()).square()
        if self.entropy:
            assert entropy_T is not None, "an entropy bonus without entropies"
            total_T = total_T - self.entropy * entropy_T
            seen["entropy"] = entropy_T
        if seen:
            stats.add(**seen)
        return total_T
