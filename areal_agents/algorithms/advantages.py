"""Advantage estimators from rewards alone, one function each, registered by name in ``registry.py``.

A group is G independent episodes of one task. A trajectory counts once in every mean, however many turns, tokens or
training rows it became. Symbols are those of ``episode_view.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import compares_with, snapped

STD_EPS = 1e-6
"""Added to the group's standard deviation: equal rewards give advantage 0, not 0/0."""


@compares_with("group")
def grpo(
    group: Sequence[EpisodeView],
    *,
    normalize: Annotated[bool, Field(description="Divide by the group's standard deviation.")] = True,
) -> list[Tensor]:
    """Compare each episode's return with the mean of its group.

        A_i = (R_i − mean(R)) / (std(R) + ε),  the same for every turn of trajectory i

    GRPO (2402.03300, outcome supervision). mean and std (n − 1 in its denominator) are over the group's trajectories.
    ``normalize=False`` leaves the division out (Dr. GRPO, 2503.20783).

    Bias: R_i is part of its own baseline, which scales the expected gradient by (G − 1)/G. The division weights tasks
    by the inverse spread of their rewards, so hard and easy tasks weigh more than the objective says. A group reward
    that reads other episodes makes *their* rewards depend on episode i too, which is no mere scale.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    if len(group) < 2:
        raise ValueError(f"grpo compares the episodes of a group: it needs at least 2, got {len(group)}")
    returns_G = torch.tensor([e.total for e in group], dtype=torch.float64)
    advantages_G = snapped(returns_G - returns_G.mean(), group)
    if normalize:
        advantages_G = advantages_G / (returns_G.std(correction=1) + STD_EPS)
    return [a.expand(len(e.rewards_K)).float() for a, e in zip(advantages_G, group, strict=True)]


@compares_with("others")
def turn_return(
    group: Sequence[EpisodeView],
    *,
    gamma: Annotated[float, Field(ge=0.0, le=1.0, description="Discount per turn.")] = 1.0,
) -> list[Tensor]:
    """Compare each turn's return with the mean over the group's other episodes at that turn.

        A_{i,k} = G_{i,k} − mean of G_{j,k} over the *other* trajectories j ≠ i with K_j > k

    Leave-one-out REINFORCE (RLOO, 2402.14740) on turn returns. Without another trajectory alive at k the baseline is 0.
    A is not set to 0 there, because that would shrink the gradient of late turns. It is never divided by a per-turn
    std.

    Bias: none for γ = 1. The baseline of (i, k) depends on the other trajectories alone, which are independent of i's
    actions given the task. Leave-one-out votes of a group reward are an exception where episodes differ in length
    (``Declaration.leave_one_out``). γ < 1 trades bias for variance. Centring *rewards* per turn and then summing would
    be biased when the policy chooses when to stop.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for an empty group or γ outside [0, 1].
    """
    if not group:
        raise ValueError("turn_return needs a group of at least 1 episode, got 0")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma = {gamma} must lie in [0, 1]")
    longest = max(len(e.rewards_K) for e in group)
    rewards_GK = torch.zeros(len(group), longest, dtype=torch.float64)
    alive_GK = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, e in enumerate(group):
        rewards_GK[i, : len(e.rewards_K)] = torch.tensor(e.rewards_K, dtype=torch.float64)
        alive_GK[i, : len(e.rewards_K)] = True
    returns_GK = torch.zeros_like(rewards_GK)
    tail_G = torch.zeros(len(group), dtype=torch.float64)
    for k in reversed(range(longest)):
        tail_G = rewards_GK[:, k] + gamma * tail_G
        returns_GK[:, k] = tail_G
    # A finished trajectory has reward 0 from then on, so it adds nothing to the sums over those alive.
    others_GK = alive_GK.sum(0, keepdim=True) - 1
    baseline_GK = (returns_GK.sum(0, keepdim=True) - returns_GK) / others_GK.clamp(min=1)
    baseline_GK = torch.where(others_GK > 0, baseline_GK, 0.0)
    advantages_GK = snapped(returns_GK - baseline_GK, group).float()
    return [advantages_GK[i, : len(e.rewards_K)].clone() for i, e in enumerate(group)]
