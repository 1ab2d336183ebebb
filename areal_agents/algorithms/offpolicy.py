"""Off-policy corrections for tokens that another policy sampled: whom the ratio is taken to, and what it weighs.

μ is the policy that sampled (behaviour), p the proximal policy, π the current one; ρ = p/μ, r = π/p, u = π/μ. A
correction returns a detached weight a token, which multiplies the loss of ``losses``. The weight is 0 where the token
is masked. The masked token still counts in the loss's denominator (``losses`` says why). ``masks`` masks besides, by u.

All log ratios are clamped to ±``LOG_RATIO_BOUND`` before they are exponentiated, so no ratio is infinite and none is
NaN for log-probabilities that are not NaN themselves. Weights carry no gradient, so the bound has no part in one here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from areal_agents.algorithms.scope import sees
from areal_agents.algorithms.spans import Span, Spans

F = TypeVar("F", bound=Callable[..., Any])
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


def keeps_proximal(decay: str) -> Callable[[F], F]:
    """Make a decorator that declares that p is an average of the policies so far, with the parameter ``decay``.

    Without it a correction that takes ``proximal_T`` has p recomputed: the policy as the batch's step begins.
    """

    def declare(function: F) -> F:
        function.proximal_decay = decay  # type: ignore[attr-defined]
        return function

    return declare


def around_one(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= bounds[0] < 1.0 < bounds[1]:
        raise ValueError(f"the bounds {list(bounds)} must enclose 1, for example [0.5, 5.0]")
    return bounds


Bounds = Annotated[tuple[float, float], AfterValidator(around_one)]
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

    Use it: by default; it costs no forward pass.

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


Scope = Annotated[
    Span,
    Field(description="What the weight is the ratio of: each token alone, its turn, or its trajectory (the episode)."),
]
Truncate = Field(gt=0.0, description="Truncated importance sampling: the weight is capped at this (2 is usual).")


@sees("episode", alone={"scope": ("token",)})
def importance(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    episodes_T: Tensor | None = None,
    turns_T: Tensor | None = None,
    *,
    scope: Scope = "token",
    truncate: Annotated[float | None, Truncate] = 2.0,
    token_mask: Annotated[Bounds | None, Field(description="Tokens whose π/μ lies outside get no gradient.")] = (
        0.5,
        5.0,
    ),
) -> Correction:
    """Weight each token by the ratio of the current policy to the sampler, for losses without a ratio of their own.

        weight = min(∏_{span} u, C)·1[lo ≤ u ≤ hi],  u = π/μ

    Truncated importance sampling (Ionides, 2008), with IcePop's mask. With ``reinforce`` and ``scope = "token"`` its
    gradient is that of ``cispo`` under ``bypass``. A whole trajectory's weight is the exact one, and its variance grows
    with the length.

    Bias: tokens apart ignore how likely their past was. C and the mask trade variance for more of it.

    Use it: with ``reinforce``, off policy.

    Args:
        logprobs_T: log π, float [T]; detached here.
        behaviour_T: log μ, float [T].
        episodes_T: int [T], each token's episode; read by ``turn`` and ``trajectory``.
        turns_T: int [T], its turn; read by ``turn``.
        scope: the span whose tokens' ratios are multiplied.
        truncate: C; None leaves the weight as it is.
        token_mask: [lo, hi] of each token's own u; None masks nothing.

    Raises:
        ValueError: for unequal shapes, C ≤ 0, or bounds not around 1.
    """
    check_same_shape(logprobs_T=logprobs_T, behaviour_T=behaviour_T)
    log_u_T = log_ratio(logprobs_T, behaviour_T).detach()
    return _weighted(log_u_T, Spans(scope, episodes_T, turns_T, log_u_T), truncate, token_mask)


@sees("episode", alone={"scope": (None, "token")})
def decoupled(
    proximal_T: Tensor,
    behaviour_T: Tensor,
    episodes_T: Tensor | None = None,
    turns_T: Tensor | None = None,
    *,
    scope: Annotated[
        Span | None,
        Field(description="What the weight is the ratio of: each token, its turn, its trajectory; none: no weight."),
    ] = "token",
    truncate: Annotated[float | None, Truncate] = None,
    token_mask: Annotated[Bounds | None, Field(description="Tokens whose p/μ lies outside get no gradient.")] = (
        0.5,
        5.0,
    ),
) -> Correction:
    """Weight each token by the ratio of the proximal policy to the sampler; p is recomputed for each batch.

        weight = min(∏_{span} ρ, C)·1[lo ≤ ρ ≤ hi],  ρ = p/μ

    With PPO on r = π/p the loss is L = −E[ρ·min(r·A, clip(r)·A)]. This is decoupled PPO (2110.00641; AReaL,
    2505.24298). C makes it truncated importance sampling. The mask is IcePop's (0.5 and 5).

    Bias: none from the weight of a trajectory, at a variance that grows with the distance and the length. Tokens apart
    ignore how likely their past was. C and the mask trade variance for bias. Without a weight (``scope = none``)
    what lies between sampler and p is not corrected at all.

    Use it: with several minibatches a batch, or more staleness than ``bypass`` bears; p costs one forward pass.

    Args:
        proximal_T: log p, float [T]; detached here.
        behaviour_T: log μ, float [T].
        episodes_T: int [T], each token's episode; read by ``turn`` and ``trajectory``.
        turns_T: int [T], its turn; read by ``turn``.
        scope: the span whose tokens' ratios are multiplied; None weighs every token by 1.
        truncate: C (2 is usual); None leaves the weight as it is.
        token_mask: [lo, hi] of each token's own ρ; None masks nothing.

    Raises:
        ValueError: for unequal shapes, C ≤ 0, or bounds not around 1.
    """
    check_same_shape(proximal_T=proximal_T, behaviour_T=behaviour_T)
    log_rho_T = log_ratio(proximal_T, behaviour_T).detach()
    spans = None if scope is None else Spans(scope, episodes_T, turns_T, log_rho_T)
    return _weighted(log_rho_T, spans, truncate, token_mask)


@keeps_proximal("decay")
@sees("episode", alone={"scope": (None, "token")})
def kept(
    proximal_T: Tensor,
    behaviour_T: Tensor,
    episodes_T: Tensor | None = None,
    turns_T: Tensor | None = None,
    *,
    decay: Annotated[
        float, Field(gt=0.0, lt=1.0, description="β: a policy of n batches ago weighs β^n in the average that p is.")
    ] = 0.8,
    scope: Annotated[
        Span | None,
        Field(description="What the weight is the ratio of: each token, its turn, its trajectory; none: no weight."),
    ] = "token",
    truncate: Annotated[float | None, Truncate] = None,
    token_mask: Annotated[Bounds | None, Field(description="Tokens whose p/μ lies outside get no gradient.")] = (
        0.5,
        5.0,
    ),
) -> Correction:
    """Weight each token by the ratio of a kept proximal policy, an average of the policies so far, to the sampler.

        θ_p = Σ_n β^n θ_{v−n} / Σ_n β^n over the policies since training began, before the step on batch v
        weight = min(∏_{span} ρ, C)·1[lo ≤ ρ ≤ hi],  ρ = p/μ

    PPO-EWMA (2110.00641). The average is of weights, and with adapters of the adapters. In the authors' code it moves
    after every optimizer step, here after every batch. p lags the policy by β/(1 − β) batches, and by none at the first
    one. So the clip of r = π/p acts with one minibatch a batch too, and holds the policy to where it was lately.

    Bias: that of ``decoupled``, and towards the policies of late, by the clip.

    Use it: with one optimizer step a batch, where ``decoupled`` has nothing to clip. It costs a forward pass a batch,
    and 4 bytes of memory (and of a checkpoint) for each number that trains.

    Args:
        proximal_T: log p, float [T]; detached here.
        behaviour_T: log μ, float [T].
        episodes_T: int [T], each token's episode; read by ``turn`` and ``trajectory``.
        turns_T: int [T], its turn; read by ``turn``.
        decay: β, which the learner averages by.
        scope: the span whose tokens' ratios are multiplied; None weighs every token by 1.
        truncate: C (2 is usual); None leaves the weight as it is.
        token_mask: [lo, hi] of each token's own ρ; None masks nothing.

    Raises:
        ValueError: for unequal shapes, β outside (0, 1), C ≤ 0, or bounds not around 1.
    """
    if not 0.0 < decay < 1.0:
        raise ValueError(f"decay = {decay} must lie between 0 and 1")
    return decoupled(
        proximal_T, behaviour_T, episodes_T, turns_T, scope=scope, truncate=truncate, token_mask=token_mask
    )


@sees("episode", alone={"scope": ("token",)})
def log_linear(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    ages_T: Tensor,
    episodes_T: Tensor | None = None,
    turns_T: Tensor | None = None,
    *,
    scope: Scope = "token",
    truncate: Annotated[float | None, Truncate] = None,
    token_mask: Annotated[Bounds | None, Field(description="Tokens whose p/μ lies outside get no gradient.")] = (
        0.5,
        5.0,
    ),
) -> Correction:
    """Weight each token by the ratio of a proximal policy between the sampler and the current one, without a pass.

        log p = log μ + α·sg(log π − log μ),  α = (age − 1)/age for age ≥ 1, else 0
        weight = min(∏_{span} ρ, C)·1[lo ≤ ρ ≤ hi],  ρ = p/μ

    A-3PO (2512.06547; ages as in AReaL's documentation, where p is one version behind π). The loss takes its ratio to
    this p. It saves the forward pass of ``decoupled``. For tokens of age 0 and 1, p is the sampler and the weight 1.

    Bias: that of ``decoupled``, and that of a straight line in the place of the policies between.

    Use it: in ``decoupled``'s place where ``rollout.max_staleness`` is 2 or more.

    Args:
        logprobs_T: log π, float [T]; detached here.
        behaviour_T: log μ, float [T].
        ages_T: int [T], the learner's version minus the token's.
        episodes_T: int [T], each token's episode; read by ``turn`` and ``trajectory``.
        turns_T: int [T], its turn; read by ``turn``.
        scope: the span whose tokens' ratios are multiplied.
        truncate: C; None leaves the weight as it is.
        token_mask: [lo, hi] of each token's own ρ; None masks nothing.

    Raises:
        ValueError: for unequal shapes, C ≤ 0, or bounds not around 1.
    """
    check_same_shape(logprobs_T=logprobs_T, behaviour_T=behaviour_T, ages_T=ages_T)
    alpha_T = (ages_T - 1).clamp(min=0) / ages_T.clamp(min=1)
    log_rho_T = alpha_T * log_ratio(logprobs_T, behaviour_T).detach()
    corrected = _weighted(log_rho_T, Spans(scope, episodes_T, turns_T, log_rho_T), truncate, token_mask)
    return corrected._replace(old_T=behaviour_T.detach() + log_rho_T)


def _weighted(
    log_T: Tensor, spans: Spans | None, truncate: float | None, token_mask: tuple[float, float] | None
) -> Correction:
    """Weight each token by its span's product of ratios, or by 1 without spans, and mask those far from 1."""
    if truncate is not None and not truncate > 0:
        raise ValueError(f"truncate = {truncate} must be positive, or None for no truncation")
    weight_T = torch.ones_like(log_T)
    if spans is not None:
        weight_T = torch.exp(spans.spread(spans.sum(log_T)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
        weight_T = weight_T if truncate is None else weight_T.clamp(max=truncate)
    kept_T = _inside(torch.exp(log_T), token_mask)
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
    no_future(versions_T, version)
    return (versions_T >= 0) & (version - versions_T <= max_staleness)


def _ratio(numerator_T: Tensor, denominator_T: Tensor) -> Tensor:
    """Compute exp of the bounded log ratio, detached."""
    check_same_shape(numerator_T=numerator_T, denominator_T=denominator_T)
    return torch.exp(log_ratio(numerator_T.detach(), denominator_T.detach()))


def _inside(ratio_T: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Mark the ratios that lie in [lo, hi], or all of them without bounds."""
    if bounds is None:
        return torch.ones_like(ratio_T, dtype=torch.bool)
    low, high = around_one(bounds)
    return (ratio_T >= low) & (ratio_T <= high)


def no_future(versions_N: Tensor, version: int) -> None:
    """Raise ValueError for a token of a version after ``version``."""
    newest = int(versions_N.max()) if versions_N.numel() else version
    if newest > version:
        raise ValueError(f"a token of version {newest} reached a learner at version {version}: versions are mixed up")
