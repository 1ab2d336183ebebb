"""Masks, which take the gradient from tokens, turns or episodes that are too far off the policy.

Every mask here measures u = π/μ, the current policy against the sampler, whatever the loss takes its ratio to. It comes
on top of the correction's own ``token_mask``. It returns what is kept, bool [T]. A masked token still counts in the
loss's denominator (``losses`` says why).

The ratio of a sequence of T tokens is a product, ∏u. Its logarithm is a sum that grows with T, or with √T where the
terms are noise. So a fixed bound on the product masks long sequences for being long, and a fixed bound on the geometric
mean (∏u)^{1/T} hardly ever masks one. ``geometric`` can bound the mean by c/√T, which treats all lengths alike, with a
c that covers the noise which the learner measured at the start (``noise_T``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.offpolicy import Bounds, around_one, check_same_shape, log_ratio
from areal_agents.algorithms.scope import sees
from areal_agents.algorithms.spans import Spans

F = TypeVar("F", bound=Callable[..., Any])


def leaves_noise(**values: object) -> Callable[[F], F]:
    """Make a decorator that declares when a mask leaves ``noise_T`` unread: at any of these values of its parameters.

    What is measured costs a forward pass, and need not be then.
    """

    def declare(function: F) -> F:
        function.leaves_noise = values  # type: ignore[attr-defined]
        return function

    return declare


Over = Annotated[
    Literal["turn", "trajectory"], Field(description="What is kept or masked as one: a turn, or a whole episode.")
]


def none(logprobs_T: Tensor) -> Tensor:
    """Mask nothing.

        kept = 1

    Bias: none.

    Use it: by default, beside the correction's ``token_mask``.
    """
    return torch.ones_like(logprobs_T, dtype=torch.bool)


@sees("episode")
def sequence(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    *,
    bounds: Annotated[Bounds, Field(description="Sequences whose ∏ π/μ lies outside get no gradient.")] = (0.5, 2.0),
    scope: Over = "trajectory",
) -> Tensor:
    """Mask the sequences whose whole ratio is far from 1.

        kept = 1[lo ≤ ∏_{t in y} u_t ≤ hi],  u = π/μ

    Masked importance sampling of sequences (the default bounds are those in public code). With a correction whose
    ``scope`` is ``trajectory`` the kept ones are weighed by the same product.

    Bias: against long sequences, whose product lies further from 1.

    Use it: for short answers, or turns.

    Args:
        logprobs_T: log π, float [T]; all tokens of their episodes.
        behaviour_T: log μ, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        bounds: [lo, hi] around 1.
        scope: what y is.

    Raises:
        ValueError: for unequal shapes, or bounds not around 1.
    """
    spans, log_T = _log_ratios(logprobs_T, behaviour_T, episodes_T, turns_T, scope)
    low, high = _logarithms(bounds)
    total_N = spans.sum(log_T)
    return spans.spread((total_N >= low) & (total_N <= high))


@leaves_noise(measured=False, shrink=False)
@sees("episode")
def geometric(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    noise_T: Tensor | None = None,
    *,
    bounds: Annotated[
        Bounds, Field(description="Sequences whose (∏ π/μ)^(1/T) lies outside get no gradient; see ``shrink``.")
    ] = (0.86, 1.16),
    shrink: Annotated[
        bool, Field(description="Divide the bounds' logarithms by √T, T the sequence's tokens: c/√T, c = log hi.")
    ] = True,
    measured: Annotated[
        bool,
        Field(description="With ``shrink``: c is 4 times the engine's distance to the learner, where that is more."),
    ] = True,
    scope: Over = "trajectory",
) -> Tensor:
    """Mask the sequences whose ratio, averaged geometrically over their tokens, is far from 1.

        kept = 1[min(log lo, −4m) / √T ≤ (1/T) Σ_{t in y} log u_t ≤ max(log hi, 4m) / √T],  u = π/μ

    Geometric sequence masking, with bounds c/√T that shrink as the mean of T noisy terms does. m is the mean |log u| of
    tokens on policy, which the learner measures at its first step: what rounding in engine and learner makes of one
    policy. For normal noise 4m/√T is 3.2 standard deviations. The ``bounds`` are the least c, for engines that compute
    as the learner does: there m is 0, and a c of 4m would mask all that is off policy. The default is 4 times bf16's m
    of 0.036.

    Without ``shrink`` the bounds are fixed, as published: 0.99 and 1.01, or 0.999 and 1.001. With that noise, 0.99 and
    1.01 mask half of all turns of 10 tokens on policy. Without ``measured`` m is 0.

    Bias: towards the sampler, by the masked sequences.

    Use it: for long sequences, whose drift hides in many small steps.

    Args:
        logprobs_T: log π, float [T]; all tokens of their episodes.
        behaviour_T: log μ, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        noise_T: m, float [T], the same for all; None, or 0, where it was not measured.
        bounds: [lo, hi] around 1, of a sequence of one token.
        shrink: whether they shrink with √T.
        measured: whether m widens them.
        scope: what y is.

    Raises:
        ValueError: for unequal shapes, or bounds not around 1.
    """
    spans, log_T = _log_ratios(logprobs_T, behaviour_T, episodes_T, turns_T, scope)
    low, high = _logarithms(bounds)
    if measured and shrink and noise_T is not None and len(noise_T):
        check_same_shape(logprobs_T=logprobs_T, noise_T=noise_T)
        least = 4.0 * float(noise_T.max())
        low, high = min(low, -least), max(high, least)
    by_N = spans.lengths_N.to(log_T.dtype).sqrt() if shrink else torch.ones(len(spans.lengths_N), dtype=log_T.dtype)
    mean_N = spans.mean(log_T)
    return spans.spread((mean_N >= low / by_N) & (mean_N <= high / by_N))


@sees("episode")
def trust_region(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    *,
    bounds: Annotated[Bounds, Field(description="One token whose π/μ lies outside masks its whole sequence.")] = (
        0.2,
        5.0,
    ),
    scope: Over = "trajectory",
) -> Tensor:
    """Mask every sequence with a token outside the trust region.

        kept = 1[lo ≤ u_t ≤ hi for every t in y],  u = π/μ

    Trust region masking (2512.23075, whose bounds rest on the largest divergence of any token; here u of the sampled
    token stands for it, and the default bounds are ours).

    Bias: against long sequences, which have more tokens that may violate it.

    Use it: where one broken token says that all that follows is off the policy.

    Args:
        logprobs_T: log π, float [T]; all tokens of their episodes.
        behaviour_T: log μ, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        bounds: [lo, hi] around 1.
        scope: what y is.

    Raises:
        ValueError: for unequal shapes, or bounds not around 1.
    """
    spans, log_T = _log_ratios(logprobs_T, behaviour_T, episodes_T, turns_T, scope)
    low, high = _logarithms(bounds)
    outside_N = spans.sum(((log_T < low) | (log_T > high)).to(log_T.dtype))
    return spans.spread(outside_N == 0)


@sees("minibatch")
def m2po(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    *,
    threshold: Annotated[float, Field(gt=0.0, description="Largest mean of (log π/μ)² over the kept tokens.")] = 0.04,
) -> Tensor:
    """Mask the tokens furthest off the policy, until the mean square of the others' log ratio is small.

        M = (1/N) Σ (log u_t)² over the kept tokens;  the largest terms are dropped until M ≤ τ,  u = π/μ

    M2PO (2510.01161, with τ = 0.04; from AReaL's documentation, the paper was not read). It looks at a whole minibatch
    at once, which costs a second forward pass.

    Bias: towards the sampler, by the fewest tokens that keep the second moment under τ.

    Use it: with much staleness, where a fixed mask would take too many tokens.

    Args:
        logprobs_T: log π, float [T]; all tokens of the minibatch.
        behaviour_T: log μ, float [T].
        threshold: τ.

    Raises:
        ValueError: for unequal shapes, or τ ≤ 0.
    """
    check_same_shape(logprobs_T=logprobs_T, behaviour_T=behaviour_T)
    if threshold <= 0.0:
        raise ValueError(f"threshold = {threshold} must be positive")
    square_T = log_ratio(logprobs_T, behaviour_T).detach().double().square()
    ascending_T, order_T = torch.sort(square_T, stable=True)
    means_T = ascending_T.cumsum(0) / torch.arange(1, len(square_T) + 1)  # of the n smallest: it grows with n
    kept_T = torch.zeros_like(square_T, dtype=torch.bool)
    kept_T[order_T[means_T <= threshold]] = True
    return kept_T


@sees("episode")
def opsm(
    logprobs_T: Tensor,
    behaviour_T: Tensor,
    advantages_T: Tensor,
    episodes_T: Tensor,
    turns_T: Tensor,
    *,
    delta: Annotated[float, Field(gt=0.0, description="Largest mean of log μ/π in a punished sequence.")] = 0.03,
    scope: Over = "trajectory",
) -> Tensor:
    """Mask the bad tokens of sequences that the policy has already left.

        masked = 1[A_t < 0 and (1/|y|) Σ_{t in y} (log μ − log π) > δ]

    Off-policy sequence masking (DeepSeek-V3.2, 2512.02556, eq. 9, which names no δ; the default is that of public
    code). What is good is kept, however far it is off the policy.

    Bias: against punishing what has become rare.

    Use it: with staleness, where negative advantages destabilise.

    Args:
        logprobs_T: log π, float [T]; all tokens of their episodes.
        behaviour_T: log μ, float [T].
        advantages_T: A, float [T].
        episodes_T: int [T], each token's episode.
        turns_T: int [T], its turn.
        delta: δ.
        scope: what y is.

    Raises:
        ValueError: for unequal shapes, or δ ≤ 0.
    """
    if delta <= 0.0:
        raise ValueError(f"delta = {delta} must be positive")
    check_same_shape(logprobs_T=logprobs_T, advantages_T=advantages_T)
    spans, log_T = _log_ratios(logprobs_T, behaviour_T, episodes_T, turns_T, scope)
    return (advantages_T >= 0) | (spans.spread(spans.mean(-log_T)) <= delta)


def _log_ratios(
    logprobs_T: Tensor, behaviour_T: Tensor, episodes_T: Tensor, turns_T: Tensor, scope: Literal["turn", "trajectory"]
) -> tuple[Spans, Tensor]:
    """Return the spans, and log u of each token, in float64: many are summed, and compared with a bound."""
    check_same_shape(logprobs_T=logprobs_T, behaviour_T=behaviour_T)
    log_T = log_ratio(logprobs_T, behaviour_T).detach().double()
    return Spans(scope, episodes_T, turns_T, log_T), log_T


def _logarithms(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = around_one(bounds)
    return (math.log(low) if low > 0.0 else -math.inf), math.log(high)
