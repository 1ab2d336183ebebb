"""Policy losses per token, and how tokens add up to one number.

μ is the policy that sampled (behaviour), p the proximal policy, π the current one. Element-wise functions return
``loss_T``. The caller multiplies it with the weight of ``offpolicy`` and sums it with an aggregation. The aggregations
take their denominators from outside, for the whole batch. So the losses (and gradients) of any split into micro-batches
add up exactly to the undivided batch's.

A token that a correction masks adds 0 to the numerator and still counts in the denominator. Dividing by the kept tokens
instead would raise the weight of the rest whenever tokens are masked, tie the step size to the mask, and make the
denominator unknown until the last forward pass.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.offpolicy import check_same_shape, log_ratio


class LossTerms(NamedTuple):
    """The outcome of a loss, one entry a token."""

    loss_T: Tensor
    """float [T], to be minimised; carries the gradient."""
    clipped_T: Tensor
    """bool [T], True where clipping took the gradient away."""


def ppo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: Annotated[float, Field(gt=0.0, description="Lower clip range of the ratio.")] = 0.2,
    clip_high: Annotated[
        float, Field(gt=0.0, description="Upper clip range of the ratio (clip-higher: larger than ``clip_low``).")
    ] = 0.2,
    dual_clip: Annotated[
        float, Field(gt=1.0, description="Bound on the loss of negative advantages, as a multiple of |A|.")
    ] = 3.0,
) -> LossTerms:
    """Compute the clipped PPO loss of each token.

        L = max(−r·A, −clip(r, 1−ε_low, 1+ε_high)·A),  r = π/p
        L = min(c·|A|, that)  for A < 0

    PPO (1707.06347, eq. 7), clip-higher (DAPO, 2503.14476), dual clip (1912.09729). It is computed as −A·r̃, which is
    the same number:

        r̃ = min(r, 1+ε_high) for A ≥ 0,  clamp(r, 1−ε_low, c) for A < 0

    The gradient is −A·r·∇log π, and 0 where clipped: A > 0 and r > 1+ε_high; A < 0 and r < 1−ε_low or r > c. log r is
    clamped to ±``LOG_RATIO_BOUND``. Past the bound the gradient is 0.

    Args:
        logprobs_T: log π with gradient, float [T].
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        clip_low: ε_low.
        clip_high: ε_high.
        dual_clip: c (3 is usual); infinity turns it off.

    Raises:
        ValueError: for unequal shapes, ε_low or ε_high ≤ 0, c ≤ 1.
    """
    check_same_shape(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    if clip_low <= 0.0 or clip_high <= 0.0:
        raise ValueError(f"clip_low = {clip_low} and clip_high = {clip_high} must be positive")
    if not dual_clip > 1.0:
        raise ValueError(f"dual_clip = {dual_clip} must be over 1 (infinity turns it off)")
    advantages_T = advantages_T.detach()
    ratio_T = torch.exp(log_ratio(logprobs_T, old_logprobs_T.detach()))
    positive_T = torch.clamp(ratio_T, max=1.0 + clip_high)
    negative_T = torch.clamp(ratio_T, min=1.0 - clip_low, max=dual_clip)
    loss_T = -advantages_T * torch.where(advantages_T < 0, negative_T, positive_T)
    with torch.no_grad():
        clipped_T = torch.where(
            advantages_T < 0, (ratio_T < 1.0 - clip_low) | (ratio_T > dual_clip), ratio_T > 1.0 + clip_high
        ) & (advantages_T != 0)
    return LossTerms(loss_T, clipped_T)


def cross_entropy(logprobs_T: Tensor) -> Tensor:
    """Compute L = −log π, float [T], to imitate the given tokens (the warm start).

    Raises ValueError unless 1-D.
    """
    check_same_shape(logprobs_T=logprobs_T)
    return -logprobs_T


def token_mean(loss_T: Tensor, mask_T: Tensor, *, tokens: float) -> Tensor:
    """Sum these tokens' part of the mean over the batch's sampled tokens.

        Σ_t mask·loss / N,  a scalar

    Every sampled token of the batch weighs the same (DAPO, 2503.14476). Long episodes weigh more than short ones.

    Args:
        loss_T: float [T].
        mask_T: bool [T], True on sampled tokens.
        tokens: N, the sampled tokens of the *whole batch*, tokens masked by a correction included.

    Raises:
        ValueError: for N ≤ 0 or unequal shapes.
    """
    check_same_shape(loss_T=loss_T, mask_T=mask_T)
    if not tokens > 0:
        raise ValueError(f"tokens = {tokens} must be positive: a batch without sampled tokens has no loss")
    return torch.where(mask_T, loss_T, 0.0).sum() / tokens


def episode_mean(loss_T: Tensor, mask_T: Tensor, episode_T: Tensor, tokens_E: Tensor, *, episodes: float) -> Tensor:
    """Sum these tokens' part of the mean over episodes, each the mean over its own tokens.

        (1/E) Σ_e (1/N_e) Σ_{t in e} mask·loss,  a scalar

    Every episode weighs the same (GRPO, 2402.03300). A token of a long episode weighs less: a failure is punished less
    per token the longer it is.

    Args:
        loss_T: float [T].
        mask_T: bool [T], True on sampled tokens.
        episode_T: int [T], each token's episode, an index of ``tokens_E``.
        tokens_E: N_e, int [E'], the sampled tokens of each episode over *all its rows* and all micro-batches, so that
            an episode's weight does not depend on how many rows it became.
        episodes: E, the whole batch's, the ones without a gradient included.

    Raises:
        ValueError: for E ≤ 0, unequal shapes, or a sampled token whose episode counts no tokens.
    """
    check_same_shape(loss_T=loss_T, mask_T=mask_T, episode_T=episode_T)
    check_same_shape(tokens_E=tokens_E)
    if not episodes > 0:
        raise ValueError(f"episodes = {episodes} must be positive: an empty batch has no loss")
    tokens_T = torch.where(mask_T, tokens_E[torch.where(mask_T, episode_T, 0)].to(loss_T.dtype), 1.0)
    if bool((tokens_T < 1).any()):
        raise ValueError("tokens_E counts no token for an episode that has sampled tokens: count all its rows")
    return torch.where(mask_T, loss_T / tokens_T, 0.0).sum() / episodes
