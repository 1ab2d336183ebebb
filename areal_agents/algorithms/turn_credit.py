"""Advantage estimators that tell an episode's turns apart, from rewards and states, without a critic.

They are registered by name in ``registry.py``. Rewards of turns and of whole episodes go together here: an episode's
verdict is part of its last turn's reward, so that G_{i,0} = R_i for γ = 1. Symbols are those of ``episode_view.py``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.advantages import STD_EPS, grpo, require_two
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import compares_with, reads_state_keys, snapped

Gamma = Annotated[float, Field(ge=0.0, le=1.0, description="Discount per turn.")]
Normalize = Annotated[bool, Field(description="Divide by standard deviations.")]
Group = Sequence[EpisodeView]


@compares_with("others")
def turn_return(group: Group, *, gamma: Gamma = 1.0) -> list[Tensor]:
    """Compare each turn's return with the mean over the group's other episodes at that turn.

        A_{i,k} = G_{i,k} − mean of G_{j,k} over the *other* trajectories j ≠ i with K_j > k

    Leave-one-out REINFORCE on turn returns. Without another trajectory alive at k the baseline is 0. A is not set to 0
    there, because that would shrink the gradient of late turns. It is never divided by a per-turn std.

    Paper: RLOO, 2402.14740, on turn returns.

    Bias: none for γ = 1. The baseline of (i, k) depends on the other trajectories alone, which are independent of i's
    actions given the task. Leave-one-out votes of a group reward are an exception where episodes differ in length
    (``Declaration.leave_one_out``). γ < 1 trades bias for variance. Centring *rewards* per turn and then summing would
    be biased when the policy chooses when to stop.

    Use it: for rewards at several turns, or episodes of different lengths.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for an empty group or γ outside [0, 1].
    """
    if not group:
        raise ValueError("turn_return needs a group of at least 1 episode, got 0")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma = {gamma} must lie in [0, 1]")
    longest = max(len(e.rewards_K) for e in group)
    returns_GK = torch.zeros(len(group), longest, dtype=torch.float64)
    alive_GK = torch.zeros(len(group), longest, dtype=torch.bool)
    for i, e in enumerate(group):
        returns_GK[i, : len(e.rewards_K)] = torch.tensor(e.turn_returns(gamma), dtype=torch.float64)
        alive_GK[i, : len(e.rewards_K)] = True
    # A finished trajectory has return 0 from then on, so it adds nothing to the sums over those alive.
    others_GK = alive_GK.sum(0, keepdim=True) - 1
    baseline_GK = (returns_GK.sum(0, keepdim=True) - returns_GK) / others_GK.clamp(min=1)
    baseline_GK = torch.where(others_GK > 0, baseline_GK, 0.0)
    advantages_GK = snapped(returns_GK - baseline_GK, group).float()
    return [advantages_GK[i, : len(e.rewards_K)].clone() for i, e in enumerate(group)]


@compares_with("group")
def kevin(group: Group, *, gamma: Gamma = 0.4, normalize: Normalize = True) -> list[Tensor]:
    """Take each turn as a sample of its own, and compare its return with all turns of the group.

        A_{i,k} = (G_{i,k} − mean(G)) / (std(G) + ε)

    mean and std (n − 1 in its denominator) are over all turns of all trajectories of the group, ε = 1e-6.

    Paper: Kevin, 2507.11948, with its γ = 0.4.

    Bias: the baseline is weighted by rows. One success of 1 turn and one failure of 5 get +0.83 and −0.17 before the
    division, where a trajectory that counts once gets ±0.5, so long episodes weigh more than short ones. It compares
    late turns with early ones, depends on the actions that prolong an episode, and holds the turn's own return. γ < 1
    credits what comes soon.

    Use it: for episodes of equal numbers of turns with a score at each, such as repeated attempts at one program.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "kevin")
    returns_N = torch.tensor([x for e in group for x in e.turn_returns(gamma)], dtype=torch.float64)
    centred_N = snapped(returns_N - returns_N.mean(), group)
    if normalize:
        centred_N = centred_N / (returns_N.std(correction=1) + STD_EPS)
    return _by_episode(centred_N, group)


@reads_state_keys
@compares_with("group")
def gigpo(
    group: Group,
    *,
    gamma: Gamma = 0.95,
    step_weight: Annotated[float, Field(ge=0.0, description="ω: weight of the comparison of equal states.")] = 1.0,
    normalize: Normalize = True,
) -> list[Tensor]:
    """Compare episodes with their group, and turns with the group's other turns in the same state.

        A_{i,k} = A^E_i + ω · A^S_{i,k}
        A^E_i = (R_i − mean(R)) / F(R)
        A^S_{i,k} = (G_{i,k} − mean(G)) / F(G) over the turns of the group that were shown the state of (i, k)

    A state is known by its ``state_key``, which the environment gives. A turn without one, or in a state that no other
    turn met, has A^S = 0. F is std + ε (n − 1 in its denominator, ε = 1e-6), or 1 with ``normalize = false``, which the
    paper has too. ``anchor_size`` among the metrics is the number of turns in a turn's state. In search tasks states
    mostly meet at the first turn alone, and then A^S adds little.

    Paper: GiGPO, 2505.10978, ω = 1 and γ = 0.95.

    Bias: that of ``grpo``, and for each state the same again: the turn's own return is in its mean, which scales by
    (n − 1)/n for n turns, and singletons have no part in A^S. An episode that comes by a state twice counts twice
    there, and its own later actions are then in its baseline.

    Use it: for environments whose episodes pass through equal states, and give a ``state_key``.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "gigpo")
    returns = [e.turn_returns(gamma) for e in group]
    states: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, e in enumerate(group):
        for k, key in enumerate(e.state_keys_K):
            if key is not None:
                states[key].append((i, k))
    steps = [torch.zeros(len(e.rewards_K), dtype=torch.float64) for e in group]
    for places in states.values():
        if len(places) > 1:
            returns_N = torch.tensor([returns[i][k] for i, k in places], dtype=torch.float64)
            centred_N = snapped(returns_N - returns_N.mean(), group)
            if normalize:
                centred_N = centred_N / (returns_N.std(correction=1) + STD_EPS)
            for (i, k), a in zip(places, centred_N, strict=True):
                steps[i][k] = a
    whole = grpo(group, normalize=normalize)
    return [(a + step_weight * s).float() for a, s in zip(whole, steps, strict=True)]


def anchor_sizes(group: Group) -> list[list[int]]:
    """Count for each turn of each episode the group's turns that were shown its state, itself included.

    A turn without a ``state_key`` is alone.
    """
    found = Counter(key for e in group for key in e.state_keys_K if key is not None)
    return [[1 if key is None else found[key] for key in e.state_keys_K] for e in group]


@compares_with("group")
def mt_grpo(
    group: Group,
    *,
    turn_weight: Annotated[float, Field(ge=0.0, description="λ: weight of a turn's own reward.")] = 1.0,
    normalize: Normalize = True,
) -> list[Tensor]:
    """Compare outcomes with the group's outcomes, and each earlier turn's reward with those of the same turn.

        A_{i,k} = A^O_i + λ · A^T_{i,k} for k < K_i − 1,  and A^O_i for the last turn
        A^O_i = (o_i − mean(o)) / (std(o) + ε),  o_i = r_{i,K_i−1}, the reward of the last turn
        A^T_{i,k} = (r_{i,k} − mean(r_k)) / (std(r_k) + ε) over the trajectories for which k is not the last turn

    std has n − 1 in its denominator, ε = 1e-6. Where only one trajectory has such a turn, A^T is 0.

    Paper: MT-GRPO, 2505.11821, for two turns: a tool call, and an answer after its result (the weight on the turn's
    part is checked in code alone). For more turns it is the same rule, which is ours.

    Bias: a turn's reward is credited to that turn alone, never to earlier ones, and the outcome to all. A turn is
    compared with those that went on, so the baseline depends on the action that ends an episode. That is not the
    gradient of the sum of rewards, and the divisions weigh the parts by the inverse of their spreads.

    Use it: for a tool call that is judged by itself, followed by an answer that is judged by itself.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "mt_grpo")
    outcomes = grpo([EpisodeView(e.rewards_K[-1:]) for e in group], normalize=normalize)
    found = [outcome.repeat(len(e.rewards_K)) for outcome, e in zip(outcomes, group, strict=True)]
    for k in range(max(len(e.rewards_K) for e in group) - 1):
        going = [i for i, e in enumerate(group) if len(e.rewards_K) - 1 > k]
        if len(going) > 1:
            parts = grpo([EpisodeView(group[i].rewards_K[k : k + 1]) for i in going], normalize=normalize)
            for i, part in zip(going, parts, strict=True):
                found[i][k] += turn_weight * part[0]
    return found


@compares_with("group")
def grpo_process(group: Group, *, normalize: Normalize = True) -> list[Tensor]:
    """Normalise each turn's reward over all turns of the group, and sum what is to come.

        A_{i,k} = Σ_{j≥k} (r_{i,j} − mean(r)) / (std(r) + ε)

    mean and std (n − 1 in its denominator) are over all turns of all trajectories of the group, ε = 1e-6. It is GRPO
    with *process* supervision: a reward model judges each step, and here each turn. ``grpo`` is the same paper's
    *outcome* supervision.

    Paper: GRPO, 2402.03300, process supervision.

    Bias: rewards are centred before they are summed, so that each further turn costs the mean reward: the baseline
    depends on the action that goes on. With reward 1 a turn and a policy that goes on with probability 0.5 the true
    gradient is 0.25, and this gives 0. The mean is weighted by rows, so long episodes weigh more.

    Use it: for episodes of equal numbers of turns, each of which a reward model judges.

    Returns one float32 tensor [K_i] per episode. Raises ValueError for a group of fewer than two episodes.
    """
    require_two(group, "grpo_process")
    rewards_N = torch.tensor([r for e in group for r in e.rewards_K], dtype=torch.float64)
    centred_N = snapped(rewards_N - rewards_N.mean(), group)
    if normalize:
        centred_N = centred_N / (rewards_N.std(correction=1) + STD_EPS)
    return _by_episode(centred_N, group, lambda part: part.flip(0).cumsum(0).flip(0))


def _by_episode(
    numbers_N: Tensor, group: Group, change: Callable[[Tensor], Tensor] = lambda part: part
) -> list[Tensor]:
    """Cut one number a turn of the whole group into one float32 tensor [K_i] an episode, each changed by itself."""
    found, start = [], 0
    for e in group:
        found.append(change(numbers_N[start : start + len(e.rewards_K)]).float())
        start += len(e.rewards_K)
    return found
