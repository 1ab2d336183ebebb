"""Off-policy corrections for tokens that another policy sampled, and figures that say how far off they are.

μ is the policy that sampled (behaviour), p the proximal policy, π the current one; ρ = p/μ, r = π/p, u = π/μ. A
correction returns a detached weight a token, which multiplies the loss of ``losses``. The weight is 0 where the token
is masked. The masked token still counts in the loss's denominator (``losses`` says why).

All log ratios are clamped to ±``LOG_RATIO_BOUND`` before they are exponentiated, so no ratio is infinite and none is
NaN for log-probabilities that are not NaN themselves. Weights carry no gradient, so the bound has no part in one here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""e^±20 (4.9e8, 2.1e-9): squares stay finite in float32, and every clip and mask in use lies far inside."""


def log_ratio(numerator_T: Tensor, denominator_T: Tensor) -> Tensor:
    """Compute the log ratio a/b of two probabilities, bounded to ±LOG_RATIO_BOUND.

        clamp(log a − log b, ±LOG_RATIO_BOUND),  float [T]

    Inside the bound the gradient passes. Past it the gradient is 0.
    """
    return torch.clamp(numerator_T - denominator_T, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are 1-D and equally long."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(s) != 1 for s in shapes.values()):
        raise ValueError(f"expected 1-D tensors of one length, got {shapes}")


class Correction(NamedTuple):
    """The outcome of a correction, one entry a token."""

    weight_T: Tensor
    """float [T], detached; multiplies the loss; 0 where masked."""
    kept_T: Tensor
    """bool [T], False where masked."""
    old_T: Tensor | None = None
    """float [T], log of the policy that the loss takes its ratio to. None: p where the correction takes it, else μ."""


def _around_one(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= bounds[0] < 1.0 < bounds[1]:
        raise ValueError(f"the bounds {list(bounds)} must enclose 1, for example [0.5, 5.0]")
    return bounds


Bounds = Annotated[tuple[float, float], AfterValidator(_around_one)]
"""Of a ratio: [lo, hi] with 0 ≤ lo < 1 < hi."""


def bypass(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    *,
    token_mask: Annotated[Bounds | None, Field(description="Tokens whose π/μ lies outside get no gradient.")] = (
        0.5,
        5.0,
    ),
) -> Correction:
    """Mask the tokens whose ratio to the sampler is far from 1.

        weight = 1[lo ≤ u ≤ hi],  u = π/μ

    There is no proximal policy. The loss takes its ratio to the sampler, r = u, and its clip bounds the distance to the
    sampler. The mask on u follows IcePop (bounds 0.5 and 5), with the ratio left to the loss.

    Bias: towards the sampler, by the clip and by the masked tokens.

    Args:
        logprobs_T: log π, float [T]; detached here.
        behaviour_T: log μ, float [T].
        token_mask: [lo, hi]; None masks nothing.

    Raises:
        ValueError: for unequal shapes or bounds not around 1.
    """
    u_T = _ratio(logprobs_T, behaviour_T)
    kept_T = _inside(u_T, token_mask)
    return Correction(kept_T.to(u_T.dtype), kept_T)


def decoupled(
    proximal_T: Tensor,
    behaviour_T: Tensor,
    *,
    truncate: Annotated[
        float | None,
        Field(gt=0.0, description="Truncated importance sampling: the weight p/μ is capped at this (2 is usual)."),
    ] = None,
    token_mask: Annotated[Bounds | None, Field(description="Tokens whose p/μ lies outside get no gradient.")] = (
        0.5,
        5.0,
    ),
) -> Correction:
    """Weight each token by the ratio of the proximal policy to the sampler.

        weight = min(ρ, C)·1[lo ≤ ρ ≤ hi],  ρ = p/μ

    With PPO on r = π/p the loss is L = −E[ρ·min(r·A, clip(r)·A)]. This is decoupled PPO (2110.00641; AReaL,
    2505.24298). C makes it truncated importance sampling. The mask is IcePop's (0.5 and 5).

    Bias: none from ρ alone, at a variance that grows with the distance. C and the mask trade that variance for bias.

    Args:
        proximal_T: log p, float [T]; detached here.
        behaviour_T: log μ, float [T].
        truncate: C (2 is usual); None leaves ρ as it is.
        token_mask: [lo, hi]; None masks nothing.

    Raises:
        ValueError: for unequal shapes, C ≤ 0, or bounds not around 1.
    """
    if truncate is not None and not truncate > 0:
        raise ValueError(f"truncate = {truncate} must be positive, or None for no truncation")
    rho_T = _ratio(proximal_T, behaviour_T)
    kept_T = _inside(rho_T, token_mask)
    weight_T = rho_T if truncate is None else rho_T.clamp(max=truncate)
    return Correction(torch.where(kept_T, weight_T, 0.0), kept_T)


def age_mask(versions_T: Tensor, *, version: int, max_staleness: int) -> Tensor:
    """Mark the tokens that are young enough to train on (``on_exceed = "mask"``).

        1[0 ≤ v and version − v ≤ η],  bool [T]

    Args:
        versions_T: v, int [T]: the version that sampled each token; −1 on tokens that were not sampled (False here).
        version: the learner's.
        max_staleness: η.

    Raises:
        ValueError: for a token from a version after ``version``, or η < 0.
    """
    check_same_shape(versions_T=versions_T)
    if max_staleness < 0:
        raise ValueError(f"max_staleness = {max_staleness} must not be negative")
    _no_future(versions_T, version)
    return (versions_T >= 0) & (version - versions_T <= max_staleness)


@dataclass
class OffPolicyStats:
    """Figures that say how far off the policy the tokens were.

    Call ``add`` for each micro-batch, then ``result``. Everything is a mean over sampled tokens (``mask_T``), masked
    ones included, so any split into micro-batches gives the same result. Holds Python numbers only: no tensor, no
    graph.
    """

    tokens: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _by_turn: dict[int, tuple[int, float]] = field(default_factory=dict)
    _by_age: dict[int, int] = field(default_factory=dict)
    _by_length: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(
        self,
        logprobs_T: Tensor,
        behaviour_T: Tensor,
        mask_T: Tensor,
        kept_T: Tensor,
        clipped_T: Tensor,
        turns_T: Tensor,
        versions_T: Tensor,
        *,
        version: int,
        episode_tokens_T: Tensor | None = None,
    ) -> None:
        """Count the sampled tokens of one micro-batch.

        Args:
            logprobs_T: log π, float [T].
            behaviour_T: log μ, float [T].
            mask_T: bool [T], True on sampled tokens.
            kept_T: bool [T], False where the correction or the age masks the token.
            clipped_T: bool [T], True where the loss clips the token.
            turns_T: int [T], turn index.
            versions_T: int [T], version that sampled the token.
            version: the learner's.
            episode_tokens_T: int [T], sampled tokens of the token's episode, for the masked share by episode length;
                None leaves that share out.

        Raises:
            ValueError: for unequal shapes, or a token from a version after ``version``.
        """
        given = {"logprobs_T": logprobs_T, "behaviour_T": behaviour_T, "mask_T": mask_T, "kept_T": kept_T}
        given |= {"clipped_T": clipped_T, "turns_T": turns_T, "versions_T": versions_T}
        check_same_shape(**given, **({} if episode_tokens_T is None else {"episode_tokens_T": episode_tokens_T}))
        mask_T = mask_T.bool()
        _no_future(versions_T[mask_T], version)
        log_u_N = log_ratio(logprobs_T.detach()[mask_T].double(), behaviour_T.detach()[mask_T].double())
        u_N, masked_N = log_u_N.exp(), ~kept_T[mask_T].bool()
        self.tokens += log_u_N.numel()
        sums = {
            "u": u_N,
            "u2": u_N.square(),
            "k1": -log_u_N,
            "k3": u_N - 1.0 - log_u_N,
            "abs": log_u_N.abs(),
            "clipped": clipped_T[mask_T],
            "masked": masked_N,
        }
        totals = torch.stack([x.double().sum() for x in sums.values()]).tolist()
        for name, total in zip(sums, totals, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + total
        for turn, n, total in _grouped(turns_T[mask_T], log_u_N.abs()):
            count, old = self._by_turn.get(turn, (0, 0.0))
            self._by_turn[turn] = count + n, old + total
        for age, n, _ in _grouped(version - versions_T[mask_T], log_u_N):
            self._by_age[age] = self._by_age.get(age, 0) + n
        if episode_tokens_T is not None:
            for length, n, total in _grouped(episode_tokens_T[mask_T], masked_N.double()):
                low = 1 << (length.bit_length() - 1)  # buckets are powers of two: 1, 2-3, 4-7, …
                count, masked = self._by_length.get(low, (0, 0))
                self._by_length[low] = count + n, masked + round(total)

    def result(self) -> dict[str, float]:
        """Return the metrics by name.

        Where no token was added, they are just ``{"tokens": 0.0}``.

        ess             (Σu)² / (N·Σu²), in (0, 1]; 1 on policy
        kl_k1, kl_k3    KL(μ‖π) from μ's samples: mean(−log u), and mean(u − 1 − log u) ≥ 0 (Schulman, "Approximating
                        KL divergence", 2020); log u is bounded as everywhere here
        abs_dlogp       mean |log π − log μ|; ``abs_dlogp/turn_K`` the same for turn index K
        clip_fraction   share of tokens clipped by the loss
        masked_share    share of tokens masked; ``masked_share/length_A_B`` for episodes of A to B sampled tokens
        age_mean, age_max, age_share/AGE     learner's version minus the token's
        """
        n = self.tokens
        if n == 0:
            return {"tokens": 0.0}
        s = self._sums
        out = {
            "tokens": float(n),
            "ess": min(1.0, s["u"] ** 2 / (n * s["u2"])),  # rounding
            "kl_k1": s["k1"] / n,
            "kl_k3": s["k3"] / n,
            "abs_dlogp": s["abs"] / n,
            "clip_fraction": s["clipped"] / n,
            "masked_share": s["masked"] / n,
            "age_mean": sum(age * count for age, count in self._by_age.items()) / n,
            "age_max": float(max(self._by_age)),
        }
        out |= {f"age_share/{age}": count / n for age, count in sorted(self._by_age.items())}
        out |= {f"abs_dlogp/turn_{k}": total / count for k, (count, total) in sorted(self._by_turn.items())}
        out |= {f"masked_share/length_{b}_{2 * b - 1}": m / count for b, (count, m) in sorted(self._by_length.items())}
        return out


def _grouped(keys_N: Tensor, values_N: Tensor) -> list[tuple[int, int, float]]:
    """Return (key, count, sum of values) for each distinct key."""
    unique_M, index_N, count_M = torch.unique(keys_N, return_inverse=True, return_counts=True)
    total_M = torch.zeros(len(unique_M), dtype=torch.float64, device=values_N.device).index_add_(0, index_N, values_N)
    return list(zip(unique_M.tolist(), count_M.tolist(), total_M.tolist(), strict=True))


def _ratio(numerator_T: Tensor, denominator_T: Tensor) -> Tensor:
    """Compute exp of the bounded log ratio, detached."""
    check_same_shape(numerator_T=numerator_T, denominator_T=denominator_T)
    return torch.exp(log_ratio(numerator_T.detach(), denominator_T.detach()))


def _inside(ratio_T: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Mark the ratios that lie in [lo, hi], or all of them without bounds."""
    if bounds is None:
        return torch.ones_like(ratio_T, dtype=torch.bool)
    low, high = _around_one(bounds)
    return (ratio_T >= low) & (ratio_T <= high)


def _no_future(versions_N: Tensor, version: int) -> None:
    newest = int(versions_N.max()) if versions_N.numel() else version
    if newest > version:
        raise ValueError(f"a token of version {newest} reached a learner at version {version}: versions are mixed up")
