"""Policy losses with one ratio for all tokens of an episode, or of a turn.

An episode is all its rows (forks included), so the learner gives these functions whole episodes. Tokens that a
correction or their age masks lose their own term. They still count in their episode's ratio.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.losses import LossTerms, clipped
from areal_agents.algorithms.offpolicy import check_same_shape, log_ratio
from areal_agents.algorithms.scope import sees
from areal_agents.algorithms.spans import Spans

Over = Annotated[
    Literal["turn", "trajectory"], Field(description="What shares one ratio: an episode's tokens, or a turn's.")
]


@sees("episode")
def gspo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    *,
    clip_low: Annotated[float, Field(gt=0.0, description="Lower clip range of the sequence's ratio.")] = 3e-4,
    clip_high: Annotated[float, Field(gt=0.0, description="Upper clip range of the sequence's ratio.")] = 4e-4,
    scope: Over = "trajectory",
) -> LossTerms:
    """Compute the GSPO loss of each token, whose ratio is the geometric mean over its sequence.

        L = max(−s·A, −clip(s, 1−ε_low, 1+ε_high)·A),  s = exp((1/|y|) Σ_{t in y} log r_t),  r = π/p

    GSPO (2507.18071), with its clip ranges. The gradient flows through all of s, so every token of y is moved by the
    mean advantage of y. The paper takes the mean over sequences: ``algorithm.aggregation = "episode"``.

    Bias: towards the old policy. A geometric mean is no importance weight: it leaves out most of the sequence's ratio.

    Use it: for long answers and mixture-of-experts models, where single tokens' ratios are noise.

    Args:
        logprobs_T: log π with gradient, float [T]; all tokens of their episodes.
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        clip_low: ε_low.
        clip_high: ε_high.
        scope: what y is.

    Raises:
        ValueError: for unequal shapes, or ε_low or ε_high ≤ 0.
    """
    spans, log_T = _log_ratios(logprobs_T, old_logprobs_T, advantages_T, episodes_T, turns_T, scope)
    ratio_T = spans.spread(torch.exp(spans.mean(log_T)))
    return clipped(ratio_T, advantages_T, clip_low=clip_low, clip_high=clip_high)


@sees("episode")
def gspo_token(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    *,
    clip_low: Annotated[float, Field(gt=0.0, description="Lower clip range of the sequence's ratio.")] = 3e-4,
    clip_high: Annotated[float, Field(gt=0.0, description="Upper clip range of the sequence's ratio.")] = 4e-4,
    scope: Over = "trajectory",
) -> LossTerms:
    """Compute the token form of GSPO: the sequence's ratio weighs each token's own gradient.

        L = max(−s_t·A_t, −clip(s_t, 1−ε_low, 1+ε_high)·A_t),  s_t = sg(s)·π_t/sg(π_t),  s as in ``gspo``

    GSPO-token (2507.18071). Its value is that of ``gspo``. With equal advantages in a sequence its gradient is too, and
    with different ones each token is moved by its own advantage, where ``gspo`` moves all of them by their mean.

    Bias: that of ``gspo``.

    Use it: in ``gspo``'s place, where the turns or tokens of an episode have advantages of their own.

    Args:
        logprobs_T: log π with gradient, float [T]; all tokens of their episodes.
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        clip_low: ε_low.
        clip_high: ε_high.
        scope: what the sequence is.

    Raises:
        ValueError: for unequal shapes, or ε_low or ε_high ≤ 0.
    """
    spans, log_T = _log_ratios(logprobs_T, old_logprobs_T, advantages_T, episodes_T, turns_T, scope)
    ratio_T = spans.spread(torch.exp(spans.mean(log_T.detach())))
    own_T = torch.exp(logprobs_T - logprobs_T.detach())  # 1, with the gradient of log π
    return clipped(ratio_T * own_T, advantages_T, clip_low=clip_low, clip_high=clip_high)


@sees("episode")
def gmpo(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    *,
    clip_low: Annotated[float, Field(gt=0.0, description="Lower clip range of a token's log ratio.")] = 0.4,
    clip_high: Annotated[float, Field(gt=0.0, description="Upper clip range of a token's log ratio.")] = 0.4,
    scope: Over = "trajectory",
) -> LossTerms:
    """Compute the GMPO loss of each token: tokens are clipped first, then averaged geometrically.

        L = −A·exp((1/|y|) Σ_{t in y} l_t),  l = min(log r, ε_high) for A ≥ 0,  max(log r, −ε_low) for A < 0,  r = π/p

    GMPO (2507.20673; the clip of log r to ±0.4 as in public code, the paper was not read). A clipped token loses its
    gradient, and the others of its sequence keep theirs.

    Bias: towards the old policy, by the clip; and that of a geometric mean, as with ``gspo``.

    Use it: where ``gspo`` clips whole sequences for a few tokens.

    Args:
        logprobs_T: log π with gradient, float [T]; all tokens of their episodes.
        old_logprobs_T: log p (or log μ when bypassing), float [T]; detached here.
        advantages_T: A, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        clip_low: ε_low.
        clip_high: ε_high.
        scope: what y is.

    Raises:
        ValueError: for unequal shapes, or ε_low or ε_high ≤ 0.
    """
    if clip_low <= 0.0 or clip_high <= 0.0:
        raise ValueError(f"clip_low = {clip_low} and clip_high = {clip_high} must be positive")
    spans, log_T = _log_ratios(logprobs_T, old_logprobs_T, advantages_T, episodes_T, turns_T, scope)
    advantages_T = advantages_T.detach()
    kept_T = torch.where(advantages_T < 0, log_T.clamp(min=-clip_low), log_T.clamp(max=clip_high))
    loss_T = -advantages_T * spans.spread(torch.exp(spans.mean(kept_T)))
    return LossTerms(loss_T, (kept_T != log_T).detach() & (advantages_T != 0))


def _log_ratios(
    logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, episodes_T: Tensor, turns_T: Tensor,
    scope: Literal["turn", "trajectory"],
) -> tuple[Spans, Tensor]:  # fmt: skip
    """Return the spans, and log r of each token."""
    check_same_shape(logprobs_T=logprobs_T, old_logprobs_T=old_logprobs_T, advantages_T=advantages_T)
    spans = Spans(scope, episodes_T, turns_T, logprobs_T)
    return spans, log_ratio(logprobs_T, old_logprobs_T.detach())
