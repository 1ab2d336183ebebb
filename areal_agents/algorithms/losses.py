"""Policy losses of single tokens, and how tokens add up to one number.

Losses whose ratio is an episode's or a turn's are in ``sequence_losses``.

μ is the policy that sampled (behaviour), p the proximal policy, π the current one. Element-wise functions return
``loss_T``. The caller multiplies it with the weight of ``offpolicy`` and sums it with an aggregation. The aggregations
take their denominators from outside, for the whole batch. So the losses (and gradients) of any split into micro-batches
add up exactly to the undivided batch's.

A token that a correction masks adds 0 to the numerator and still counts in the denominator. Dividing by the kept tokens
instead would raise the weight of the rest whenever tokens are masked, tie the step size to the mask, and make the
denominator unknown until the last forward pass.
"""

from __future__ import annotations

import math
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
    """bool [T], True where a bound took the gradient away, or made it smaller."""


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
        float | None,
        Field(gt=1.0, description="Bound on the loss of negative advantages, as a multiple of |A|; none: no bound."),
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

    Bias: towards the old policy, by the clip.

    Use it: by default.

    Args:
        logprobs_T: log π with gradient, float [T].
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        clip_low: ε_low.
        clip_high: ε_high.
        dual_clip: c (3 is usual); None or infinity turns it off.

    Raises:
        ValueError: for unequal shapes, ε_low or ε_high ≤ 0, c ≤ 1.
    """
    check_same_shape(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    ratio_T = torch.exp(log_ratio(logprobs_T, old_logprobs_T.detach()))
    return clipped(ratio_T, advantages_T, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)


def clipped(
    ratio_T: Tensor, advantages_T: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> LossTerms:
    """Clip a ratio as ``ppo`` does, whatever it is a ratio of.

    Args:
        ratio_T: r with gradient, float [T].
        advantages_T: A, float [T]; detached here.
        clip_low: ε_low.
        clip_high: ε_high.
        dual_clip: c; None or infinity turns it off.

    Raises:
        ValueError: for ε_low or ε_high ≤ 0, or c ≤ 1.
    """
    if clip_low <= 0.0 or clip_high <= 0.0:
        raise ValueError(f"clip_low = {clip_low} and clip_high = {clip_high} must be positive")
    bound = math.inf if dual_clip is None else dual_clip
    if not bound > 1.0:
        raise ValueError(f"dual_clip = {dual_clip} must be over 1 (None turns it off)")
    advantages_T = advantages_T.detach()
    positive_T = torch.clamp(ratio_T, max=1.0 + clip_high)
    negative_T = torch.clamp(ratio_T, min=1.0 - clip_low, max=bound)
    loss_T = -advantages_T * torch.where(advantages_T < 0, negative_T, positive_T)
    with torch.no_grad():
        clipped_T = torch.where(
            advantages_T < 0, (ratio_T < 1.0 - clip_low) | (ratio_T > bound), ratio_T > 1.0 + clip_high
        ) & (advantages_T != 0)
    return LossTerms(loss_T, clipped_T)


def reinforce(logprobs_T: Tensor, advantages_T: Tensor) -> LossTerms:
    """Compute the plain policy-gradient loss of each token.

        L = −A·log π

    REINFORCE (Williams, 1992). It has no ratio and no clip, and its gradient is −A·∇log π wherever π stands.

    Bias: that of tokens which another policy sampled, unless the correction is ``importance``.

    Use it: on policy (``rollout.mode = "sync"``, one minibatch), or with ``importance``, and as the plainest baseline.

    Raises ValueError for unequal shapes.
    """
    check_same_shape(logprobs_T=logprobs_T, advantages_T=advantages_T)
    loss_T = -advantages_T.detach() * logprobs_T
    return LossTerms(loss_T, torch.zeros_like(loss_T, dtype=torch.bool))


def cispo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_high: Annotated[float, Field(gt=0.0, description="The ratio weighs at most 1 + this.")] = 1.0,
    clip_low: Annotated[
        float | None, Field(gt=0.0, lt=1.0, description="The ratio weighs at least 1 − this; none: no lower bound.")
    ] = None,
) -> LossTerms:
    """Compute the CISPO loss of each token: a bounded ratio weighs it, and no token loses its gradient.

        L = −sg(clip(r, 1−ε_low, 1+ε_high))·A·log π,  r = π/p

    CISPO (MiniMax-M1, 2506.13585), without the lower bound, as there. The paper tunes ε_high and names none. The
    default is the usual bound of truncated importance sampling, 2. ScaleRL (2510.13786) uses 5 (ε_high = 4).

    Bias: towards the old policy, where the bound shortens a weight.

    Use it: where rare tokens that turn an answer around must keep their gradient, which ``ppo`` clips away first.

    Args:
        logprobs_T: log π with gradient, float [T].
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        clip_high: ε_high.
        clip_low: ε_low, or None.

    Raises:
        ValueError: for unequal shapes, ε_high ≤ 0, or ε_low outside (0, 1).
    """
    check_same_shape(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    if clip_high <= 0.0 or (clip_low is not None and not 0.0 < clip_low < 1.0):
        raise ValueError(f"clip_high = {clip_high} must be positive, and clip_low = {clip_low} in (0, 1) or None")
    ratio_T = torch.exp(log_ratio(logprobs_T, old_logprobs_T)).detach()
    weight_T = ratio_T.clamp(min=None if clip_low is None else 1.0 - clip_low, max=1.0 + clip_high)
    loss_T = -weight_T * advantages_T.detach() * logprobs_T
    return LossTerms(loss_T, (weight_T != ratio_T) & (advantages_T != 0))


def sapo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    *,
    tau_positive: Annotated[float, Field(gt=0.0, description="How fast the gradient of good tokens fades.")] = 1.0,
    tau_negative: Annotated[float, Field(gt=0.0, description="How fast the gradient of bad tokens fades.")] = 1.05,
) -> LossTerms:
    """Compute the SAPO loss of each token, in which a smooth gate takes the clip's place.

        L = −(4/τ)·σ(τ·(r − 1))·A,  r = π/p,  τ = τ_positive for A > 0, else τ_negative

    SAPO (2511.20347; the gate and both defaults as in public code, the paper was not read). The gradient is
    −4·σ·(1−σ)·r·A·∇log π: that of ``reinforce`` at r = 1, and fading to 0 away from it on both sides.

    Bias: towards the old policy, smoothly.

    Use it: where ``ppo``'s clip throws away too many tokens at once.

    Args:
        logprobs_T: log π with gradient, float [T].
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        tau_positive: τ where A > 0.
        tau_negative: τ where A ≤ 0; larger, so that bad tokens fade faster.

    Raises:
        ValueError: for unequal shapes, or τ ≤ 0.
    """
    check_same_shape(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    if tau_positive <= 0.0 or tau_negative <= 0.0:
        raise ValueError(f"tau_positive = {tau_positive} and tau_negative = {tau_negative} must be positive")
    advantages_T = advantages_T.detach()
    ratio_T = torch.exp(log_ratio(logprobs_T, old_logprobs_T.detach()))
    tau_T = torch.full_like(ratio_T.detach(), tau_negative).masked_fill(advantages_T > 0, tau_positive)
    loss_T = -advantages_T * torch.sigmoid(tau_T * (ratio_T - 1.0)) * (4.0 / tau_T)
    return LossTerms(loss_T, torch.zeros_like(loss_T, dtype=torch.bool))


def dppo_tv(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    behaviour_T: Tensor,
    advantages_T: Tensor,
    *,
    threshold: Annotated[
        float, Field(gt=0.0, lt=1.0, description="Largest change of a sampled token's probability.")
    ] = 0.2,
    truncate: Annotated[float, Field(gt=1.0, description="The ratio weighs at most this.")] = 20.0,
) -> LossTerms:
    """Compute the DPPO loss of each token, which stops where a probability has moved far, not a ratio.

        L = −1[inside]·sg(min(r, C))·A·log π,  r = π/p
        inside: π − μ ≤ δ for A > 0,  π − μ ≥ −δ for A ≤ 0

    DPPO with the binary total variation (2602.04879; C and the detached ratio as in public code, the paper was not
    read). A rare token may change its ratio much, and a frequent one little, before either is stopped.

    Bias: towards the sampler, by the bound on the change.

    Use it: where ``ppo`` clips rare tokens whose probability hardly moved.

    Args:
        logprobs_T: log π with gradient, float [T].
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        behaviour_T: log μ, float [T].
        advantages_T: A, float [T].
        threshold: δ.
        truncate: C.

    Raises:
        ValueError: for unequal shapes, δ outside (0, 1), or C ≤ 1.
    """
    given = {"logprobs_T": logprobs_T, "old_logprobs_T": old_logprobs_T}
    check_same_shape(**given, behaviour_T=behaviour_T, advantages_T=advantages_T)
    if not 0.0 < threshold < 1.0 or not truncate > 1.0:
        raise ValueError(f"threshold = {threshold} must lie in (0, 1), and truncate = {truncate} over 1")
    advantages_T = advantages_T.detach()
    moved_T = torch.exp(logprobs_T.detach()) - torch.exp(behaviour_T)
    inside_T = torch.where(advantages_T > 0, moved_T <= threshold, moved_T >= -threshold)
    ratio_T = torch.exp(log_ratio(logprobs_T, old_logprobs_T)).detach()
    loss_T = -torch.where(inside_T, ratio_T.clamp(max=truncate), 0.0) * advantages_T * logprobs_T
    return LossTerms(loss_T, (~inside_T | (ratio_T > truncate)) & (advantages_T != 0))


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


def sequence_mean(loss_T: Tensor, mask_T: Tensor, *, episodes: float) -> Tensor:
    """Sum these tokens' part of the mean over episodes, each the sum over its own tokens.

        (1/E) Σ_e Σ_{t in e} mask·loss,  a scalar

    It is the gradient of the expected return of an episode, without any division by lengths. So it grows with them.

    Args:
        loss_T: float [T].
        mask_T: bool [T], True on sampled tokens.
        episodes: E, the whole batch's, the ones without a gradient included.

    Raises:
        ValueError: for E ≤ 0 or unequal shapes.
    """
    return constant_mean(loss_T, mask_T, episodes=episodes, constant=1.0)


def constant_mean(loss_T: Tensor, mask_T: Tensor, *, episodes: float, constant: float) -> Tensor:
    """Sum these tokens' part of the mean over episodes, each the sum over its tokens by the same constant.

        (1/E) Σ_e (1/C) Σ_{t in e} mask·loss,  a scalar

    Dr. GRPO (2503.20783): the direction of ``sequence_mean``, at a size that does not grow with the episodes.

    Args:
        loss_T: float [T].
        mask_T: bool [T], True on sampled tokens.
        episodes: E, the whole batch's, the ones without a gradient included.
        constant: C, the most tokens that an episode may sample.

    Raises:
        ValueError: for E ≤ 0, C ≤ 0 or unequal shapes.
    """
    check_same_shape(loss_T=loss_T, mask_T=mask_T)
    if not episodes > 0:
        raise ValueError(f"episodes = {episodes} must be positive: an empty batch has no loss")
    if not constant > 0:
        raise ValueError(f"constant = {constant} must be positive")
    return torch.where(mask_T, loss_T, 0.0).sum() / (episodes * constant)
