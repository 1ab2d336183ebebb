"""Advantage estimators that give an episode one number, the same for all of its turns, from returns alone.

They are registered by name in ``registry.py``. A group is G independent episodes of one task. A trajectory counts once
in every mean, however many turns, tokens or training rows it became, unless a formula says that its tokens count.
Symbols are those of ``episode_view.py``. Estimators that tell turns apart are in ``turn_credit.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import compares_with, needs_more_than, reads_ratios, snapped
from areal_agents.errors import RewardError

STD_EPS = 1e-6
"""Added to a standard deviation: equal rewards give advantage 0, not 0/0."""
LARGEST_LOG = 20.0
"""Bound on the log ratio of a trajectory, as in ``offpolicy``."""

Group = Sequence[EpisodeView]


@compares_with("group")
def grpo(
    group: Group,
    *,
    normalize: Annotated[bool, Field(description="Divide by the group's standard deviation.")] = True,
) -> list[Tensor]:
    """Compare each episode's return with the mean of its group.

        A_i = (R_i − mean(R)) / (std(R) + ε),  the same for every turn of trajectory i

    mean and std (n − 1 in its denominator) are over the group's trajectories, ε = 1e-6. ``normalize=False`` leaves the
    division out, as ``dr_grpo`` does.

    Paper: GRPO, 2402.03300, outcome supervision.

    Bias: R_i is part of its own baseline, which scales the expected gradient by (G − 1)/G. The division weights tasks
    by the inverse spread of their rewards, so hard and easy tasks weigh more than the objective says. A group reward
    that reads other episodes makes *their* rewards depend on episode i too, which is no mere scale.

    Use it: for one reward at the end; the published baseline.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "grpo")
    returns_G = returns_of(group)
    advantages_G = snapped(returns_G - returns_G.mean(), group)
    if normalize:
        advantages_G = advantages_G / (returns_G.std(correction=1) + STD_EPS)
    return spread(advantages_G, group)


@compares_with("group")
def dr_grpo(group: Group) -> list[Tensor]:
    """Compare each episode's return with the mean of its group, without a division.

        A_i = R_i − mean(R),  the same for every turn of trajectory i

    It is ``grpo`` with ``normalize=False``. The paper's other half, a loss that is divided by a constant instead of an
    episode's length, is a setting of the aggregation.

    Paper: Dr. GRPO, 2503.20783.

    Bias: R_i is part of its own baseline, which scales the expected gradient by (G − 1)/G and changes nothing else.

    Use it: for one reward at the end, where tasks shall weigh as the objective says.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "dr_grpo")
    return grpo(group, normalize=False)


@compares_with("others")
def rloo(group: Group) -> list[Tensor]:
    """Compare each episode's return with the mean of the group's other episodes.

        A_i = R_i − mean of R_j over j ≠ i = G/(G − 1)·(R_i − mean(R)),  the same for every turn of trajectory i

    Paper: RLOO, 2402.14740.

    Bias: none. The baseline does not depend on the episode's own actions.

    Use it: for one reward at the end, where no bias is wanted. ``turn_return`` is the same for episodes of one turn,
    and credits turns where there are several.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "rloo")
    returns_G = returns_of(group)
    others_G = (returns_G.sum() - returns_G) / (len(group) - 1)
    return spread(snapped(returns_G - others_G, group), group)


@compares_with("batch")
def reinforce_pp(
    groups: Sequence[Group],
    *,
    baseline: Annotated[
        Literal["batch", "group"], Field(description="What is subtracted first: nothing, or the group's mean.")
    ] = "batch",
    weight: Annotated[
        Literal["episode", "token"], Field(description="What counts once in the batch's mean and deviation.")
    ] = "episode",
) -> list[list[Tensor]]:
    """Normalise returns over all episodes of the batch.

        X_i = R_i, or R_i − mean of R over i's group (baseline = "group")
        A_i = (X_i − mean(X)) / (std(X) + ε),  the same for every turn of trajectory i

    mean and std (n in its denominator) are over the batch's episodes, or over its sampled tokens (weight = "token", as
    the authors' code counts), ε = 1e-6. The paper's KL term in the reward is a setting of its own.

    Paper: REINFORCE++, 2501.03262; ``baseline = "group"`` is its REINFORCE++-baseline.

    Bias: R_i is part of its own baseline, a share of 1/E of it for E episodes, or 1/G of the group's. All tasks share
    one baseline and one scale, so that a task's difficulty is left in the advantages of ``baseline = "batch"``: more
    variance, no further bias. The deviation depends on the actions, a bias of order 1/E. With weight = "token" the
    baseline depends on the lengths too.

    Use it: for batches of many small groups, where a group's own deviation is noise. A group of equal returns has a
    gradient with ``baseline = "batch"``.

    Returns a list a group of one float32 tensor [K_i] per episode. Raises ValueError for a batch of fewer than two
    episodes, and with ``baseline = "group"`` for such a group.
    """
    every = [e for group in groups for e in group]
    if len(every) < 2:
        raise ValueError(f"reinforce_pp compares the episodes of a batch: it needs at least 2, got {len(every)}")
    returns_E = returns_of(every)
    if baseline == "group":
        for group in groups:
            require_two(group, "reinforce_pp with baseline = 'group'")
        centred = [returns_of(group) - returns_of(group).mean() for group in groups]
        returns_E = snapped(torch.cat(centred), every)
    counts = [1 if weight == "episode" else sum(e.tokens_K) for e in every]
    if not sum(counts):
        raise ValueError("reinforce_pp counts sampled tokens, and this batch has none")
    weights_E = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    centred_E = snapped(returns_E - (weights_E * returns_E).sum(), every)
    deviation = (weights_E * centred_E.square()).sum().sqrt()
    flat = iter(spread(centred_E / (deviation + STD_EPS), every))
    return [[next(flat) for _ in group] for group in groups]


@compares_with("greedy")
def remax(group: Group) -> list[Tensor]:
    """Compare each episode's return with that of an episode which the same policy plays without chance.

        A_i = R_i − R_greedy,  the same for every turn of trajectory i

    The trainer plays one more episode a group, at temperature 0, of the same task and seed. It trains nothing.

    Paper: ReMax, 2310.10505.

    Bias: none. The greedy episode does not depend on the actions of the sampled ones.

    Use it: for small groups, where a mean of few returns is noise. It costs one episode a group, and is a poor baseline
    where the greedy answer is unlike the usual one.

    Returns one float32 tensor [K_i] per episode. Raises ValueError where an episode knows of no greedy one.
    """
    greedy = [e.greedy_return for e in group]
    if any(g is None for g in greedy):
        raise ValueError("remax compares with a greedy episode, and this group has none")
    baselines_G = torch.tensor(greedy, dtype=torch.float64)
    return spread(snapped(returns_of(group) - baselines_G, group), group)


@compares_with("group")
def opo(group: Group) -> list[Tensor]:
    """Compare each episode's return with the group's mean, weighted by lengths.

        A_i = R_i − b,  b = Σ_j L_j R_j / Σ_j L_j,  the same for every turn of trajectory i

    L_j is the number of sampled tokens of trajectory j. b is the baseline of least variance where the squared norm of
    an episode's score grows with its length, and the tokens' scores are orthogonal.

    Paper: OPO, 2505.23585.

    Bias: R_i is part of its own baseline, the more of it the longer the episode is, so that the gradient is not merely
    scaled.

    Use it: on policy, for one reward at the end and episodes of much the same lengths.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes, or without a
    sampled token.
    """
    require_two(group, "opo")
    lengths_G = torch.tensor([float(sum(e.tokens_K)) for e in group], dtype=torch.float64)
    if not bool(lengths_G.sum() > 0):
        raise ValueError("opo weights returns by sampled tokens, and this group has none")
    returns_G = returns_of(group)
    return spread(snapped(returns_G - (lengths_G * returns_G).sum() / lengths_G.sum(), group), group)


@reads_ratios
@compares_with("group")
def opob(
    group: Group,
    *,
    truncate: Annotated[
        float | None,
        Field(gt=0.0, description="Cap on a trajectory's weight: that of algorithm.correction.truncate; none: no cap."),
    ] = 2.0,
) -> list[Tensor]:
    """Compare each episode's return with the group's mean, weighted by squared importance weights and lengths.

        A_i = R_i − b,  b = Σ_j w_j² L_j R_j / Σ_j w_j² L_j,  w_j = min(∏ π/μ, C),  the same for every turn of i

    The baseline of least variance of an off-policy gradient Σ_i w_i (R_i − b) ∇log π(τ_i): each trajectory counts by
    the square of its term. w_j is the ratio of the policy that trains to the sampler over the trajectory's tokens, its
    logarithm bounded to ±20. The weight of a term is the one that the correction gives it, so C is the correction's
    own (both are 2 by default). Without it a trajectory whose gradient is cut would still decide the baseline. L_j, the
    sampled tokens, stands for ‖∇log π(τ_j)‖², as in ``opo``: this is ``opo`` where all w are the same.

    Paper: VCPO, 2602.17616 (OPOB; read in a public implementation, not in the paper). It takes the norms of the
    trajectories' own gradients, for which each needs a backward pass of its own and a step a second buffer of
    gradients: that is not here. C is ours. Its other half is ``learner.ess_step``.

    Bias: that of ``opo``. Without C, and with far-off trajectories, b is the return of few of them.

    Use it: off policy, with weights of whole trajectories: ``reinforce`` with ``importance`` of ``scope =
    "trajectory"``. It costs a forward pass a batch.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes, without a
    sampled token, or without ratios, and for C ≤ 0.
    """
    require_two(group, "opob")
    if truncate is not None and not truncate > 0:
        raise ValueError(f"truncate = {truncate} must be positive, or None for no truncation")
    logs = [e.log_ratio for e in group]
    if any(x is None for x in logs):
        raise ValueError("opob weights returns by π/μ, and this group has no ratios")
    lengths_G = torch.tensor([float(sum(e.tokens_K)) for e in group], dtype=torch.float64)
    if not bool(lengths_G.sum() > 0):
        raise ValueError("opob weights returns by sampled tokens, and this group has none")
    most = LARGEST_LOG if truncate is None else min(math.log(truncate), LARGEST_LOG)
    logs_G = torch.tensor(logs, dtype=torch.float64).clamp(-LARGEST_LOG, most)
    weights_G = lengths_G * torch.exp(2.0 * (logs_G - logs_G.max()))
    returns_G = returns_of(group)
    return spread(snapped(returns_G - (weights_G * returns_G).sum() / weights_G.sum(), group), group)


@needs_more_than("k")
@compares_with("others")
def pass_at_k(
    group: Group, *, k: Annotated[int, Field(ge=1, description="Attempts, of which the best one counts.")] = 2
) -> list[Tensor]:
    """Reward an episode for what it adds to the best of k attempts.

        A_i = k · ( mean over S of max(R_i, max R_S) − mean over S' of max R_S' ),  the same for every turn of i

    S are the sets of k − 1 of the group's other trajectories, and S' those of k of them. For rewards of 0 and 1 the
    objective E[max of k] is pass@k. k = 1 is ``rloo``. Where episodes of a group were lost, so that fewer than k others
    are left, k is the number of the others.

    Paper: PKPO, 2505.15201 (transformed rewards with a leave-one-out baseline). The sets are not listed: they are
    counted, by binomials of a sorted group.

    Bias: none, for the gradient of E[max of k] that the *group's* k gives. The baseline depends on the other
    trajectories alone.

    Use it: where several attempts may be made, or to keep exploring hard tasks; an episode that fails beside a success
    is not pushed down much.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "pass_at_k")
    k = min(k, len(group) - 1)
    returns = [e.total for e in group]
    advantages = []
    for i, mine in enumerate(returns):
        others = sorted(returns[:i] + returns[i + 1 :])
        with_mine = _mean_largest([max(mine, r) for r in others], k - 1) if k > 1 else mine
        advantages.append(k * (with_mine - _mean_largest(others, k)))
    return spread(snapped(torch.tensor(advantages, dtype=torch.float64), group), group)


def _mean_largest(ascending: Sequence[float], size: int) -> float:
    """Return the mean, over all sets of ``size`` entries, of the largest entry of the set."""
    # the j-th smallest is the largest one of the sets that take the rest from the j entries before it
    sets = math.comb(len(ascending), size)
    return math.fsum(x * (math.comb(j, size - 1) / sets) for j, x in enumerate(ascending))


@compares_with("group")
def maxrl(group: Group) -> list[Tensor]:
    """Weigh each episode's return by the inverse of its group's mean, as maximum likelihood would.

        A_i = (R_i − mean(R)) / mean(R), and 0 where mean(R) = 0,  the same for every turn of trajectory i

    For rewards of 0 and 1 and a task that is solved with probability p, maximum likelihood ascends log p, whose
    expansion is −Σ_k (1 − p)^k / k. G episodes estimate the gradient of its first G − 1 terms: Σ_{k<G} ∇pass@k / k.

    Paper: MaxRL, 2602.02710.

    Bias: none for that objective, for rewards of 0 and 1. For the mean reward it is one on purpose: tasks weigh by
    1/p. For other rewards ≥ 0 the weights are the same, without a proof.

    Use it: for rewards of 0 and 1, where most tasks are hard.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes, RewardError
    for a return below 0.
    """
    require_two(group, "maxrl")
    returns_G = returns_of(group)
    if bool((returns_G < 0).any()):
        raise RewardError(f"maxrl divides by the mean return: returns must be ≥ 0, and one is {float(returns_G.min())}")
    mean = returns_G.mean()
    centred_G = snapped(returns_G - mean, group)
    return spread(centred_G / mean if bool(centred_G.any()) else centred_G, group)


def returns_of(group: Group) -> Tensor:
    """Return R of each episode, float64 [G]."""
    return torch.tensor([e.total for e in group], dtype=torch.float64)


def spread(advantages_G: Tensor, group: Group) -> list[Tensor]:
    """Give every turn of an episode its number: one float32 tensor [K_i] an episode."""
    return [a.expand(len(e.rewards_K)).float() for a, e in zip(advantages_G, group, strict=True)]


def require_two(group: Group, name: str) -> None:
    """Raise ValueError for a group of fewer than two episodes."""
    if len(group) < 2:
        raise ValueError(f"{name} compares the episodes of a group: it needs at least 2, got {len(group)}")
