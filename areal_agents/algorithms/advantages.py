"""Advantage estimators: from a group's rewards to one number a turn.

Pure functions of rewards, one an estimator, registered by name in ``registry.py``. A group is G independent episodes of
one task. A trajectory counts once in every mean, however many turns, tokens or training rows it became.

    r_{i,k}                              reward of turn k of trajectory i (k from 0, K_i turns)
    R_i = Σ_k r_{i,k}                    return of trajectory i
    G_{i,k} = Σ_{j≥k} γ^{j−k} r_{i,j}    return from turn k on

Sums run in float64, results are float32. A difference that is mere rounding (``utils/tolerance.py``) is exactly 0, so
that equal rewards give no gradient: AdamW would take a step even for 1e-16, whatever its momentum says.

Not covered: critics, and discounting inside a turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.registry import ADVANTAGES, Choice
from areal_agents.errors import ConfigError, RewardError
from areal_agents.group_reward import Declaration
from areal_agents.types import Group
from areal_agents.utils.real_number import LARGEST
from areal_agents.utils.tolerance import all_same, rounding_of

Baseline = Literal["others", "group", "none"]
F = TypeVar("F", bound=Callable[..., Any])
STD_EPS = 1e-6
"""Added to the group's standard deviation: equal rewards give advantage 0, not 0/0."""


@dataclass(frozen=True)
class EpisodeRewards:
    """The rewards of one episode, one a turn: [K], K ≥ 1.

    Raises ValueError without a turn, RewardError for a reward that is not finite, or too large to be compared.
    """

    rewards_K: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rewards_K:
            raise ValueError("an episode without a turn has no advantage: leave it out of the group")
        for k, reward in enumerate(self.rewards_K):
            if not math.isfinite(reward):
                raise RewardError(f"the reward of turn {k} is {reward}: rewards must be finite numbers")
            if abs(reward) > LARGEST:
                raise RewardError(f"the reward of turn {k} is {reward:g}: rewards may be up to {LARGEST:g} in size")


class Estimator:
    """The estimator that the settings choose, looked up once and called for every group."""

    def __init__(self, choice: Choice) -> None:
        """Look the function up, and try it on a small group.

        Raises ConfigError for an unknown estimator, a wrong parameter, or a function that returns something else.
        """
        self.choice = choice
        self._estimate = ADVANTAGES.bound(choice)
        self((EpisodeRewards((0.0, 1.0)), EpisodeRewards((0.5,))))

    def __call__(self, group: Sequence[EpisodeRewards]) -> list[Tensor]:
        """Return a group's advantages: float32 [K_i] an episode, one number a turn.

        Raises ConfigError where the function returns anything else, or a number that is not finite.
        """
        advantages = self._checked(group)
        # For equal returns an estimator looks at more than returns, or makes much of a rounding: in float32, or by a
        # division by the spread. Numbers of few bits have exact means, and with them it shows which.
        equal = all_same([math.fsum(e.rewards_K) for e in group])
        if equal and _any(advantages) and not _any(self._checked(_of_few_bits(group))):
            return [torch.zeros_like(a) for a in advantages]
        largest = max(float(a.abs().max()) for a in advantages)  # of ±1, whatever the rewards, after a normalisation
        return [_snapped(a, group, largest) for a in advantages]

    def _checked(self, group: Sequence[EpisodeRewards]) -> list[Tensor]:
        expected = [(len(e.rewards_K),) for e in group]
        found = self._estimate(tuple(group))
        where = f"algorithm.advantage.kind = {self.choice.kind!r}"
        if not isinstance(found, list | tuple) or not all(isinstance(a, Tensor) for a in found):
            raise ConfigError(f"{where} returned {type(found).__name__}: expected a list of tensors, one an episode")
        shapes = [tuple(a.shape) for a in found]
        if shapes != expected:
            raise ConfigError(f"{where} returned advantages of shapes {shapes}: expected one number a turn, {expected}")
        advantages = [a.detach().float() for a in found]
        if not all(bool(torch.isfinite(a).all()) for a in advantages):
            raise ConfigError(f"{where} returned an advantage that is not finite, for the rewards {list(group)}")
        return advantages

    def of(self, group: Group) -> list[Tensor]:
        """Return the advantages of a finished group's episodes."""
        return self([EpisodeRewards(tuple(t.reward for t in e.turns)) for e in group.trajectories])


def compares_with(baseline: Baseline) -> Callable[[F], F]:
    """Make a decorator that declares what an estimator takes an episode's baseline from.

    ``others`` are the group's other episodes, so that the baseline does not depend on the episode's own actions.
    ``group`` is the whole group, itself included: a bias that the estimator states. ``none`` is no episode of the
    group.
    """

    def declare(function: F) -> F:
        function.baseline = baseline  # type: ignore[attr-defined]
        return function

    return declare


def refuse_biased(choice: Choice, declared: Declaration, reward: str) -> None:
    """Raise ConfigError where a group reward would be part of the very baseline that must not depend on the episode.

    A reward that reads the group's other episodes lets their rewards depend on this one's actions, and so the baseline
    too. Leave-one-out votes only scale the gradient of turns that all have (``Declaration.leave_one_out``).

    Args:
        choice: the estimator.
        declared: what the group reward declares.
        reward: its name.
    """
    if not declared.reads_others or declared.leave_one_out:
        return
    where, function = f"algorithm.advantage.kind = {choice.kind!r}", ADVANTAGES.function(choice.kind)
    baseline = getattr(function, "baseline", None)
    reads = f"the group reward {reward!r} reads the other episodes (reads_others)"
    if baseline not in get_args(Baseline):
        raise ConfigError(
            f"{where} does not say what it takes an episode's baseline from, and {reads}: declare it with "
            '@compares_with("others"), "group" or "none" (areal_agents.algorithms.advantages)'
        )
    if baseline == "others":
        raise ConfigError(
            f"{where} compares an episode with the others of its group, whose rewards must not depend on it, but "
            f"{reads}: the gradient would be biased. Use algorithm.advantage.kind = 'grpo', which states its "
            "bias, or a reward of leave-one-out votes (areal_agents.rewards.agreement)"
        )


def _any(advantages: Sequence[Tensor]) -> bool:
    return any(bool(a.any()) for a in advantages)


def _snapped(advantages: Tensor, group: Sequence[EpisodeRewards], largest: float = math.inf) -> Tensor:
    """Replace what is mere rounding of the group's rewards, or of numbers up to ``largest``, by 0."""
    scale = max(math.fsum(map(abs, e.rewards_K)) for e in group)
    return torch.where(advantages.abs() > rounding_of(min(scale, largest)), advantages, 0.0)


def _of_few_bits(group: Sequence[EpisodeRewards]) -> list[EpisodeRewards]:
    """Round the rewards to 14 bits below the largest of them, so that float32 has room for a thousand of them."""
    largest = max(abs(r) for e in group for r in e.rewards_K)
    unit = math.ldexp(1.0, max(math.frexp(largest)[1] - 14, -1000))  # below it there is nothing to round
    return [EpisodeRewards(tuple(round(r / unit) * unit for r in e.rewards_K)) for e in group]


@compares_with("group")
def grpo(
    group: Sequence[EpisodeRewards],
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
    returns_G = torch.tensor([math.fsum(e.rewards_K) for e in group], dtype=torch.float64)
    advantages_G = _snapped(returns_G - returns_G.mean(), group)
    if normalize:
        advantages_G = advantages_G / (returns_G.std(correction=1) + STD_EPS)
    return [a.expand(len(e.rewards_K)).float() for a, e in zip(advantages_G, group, strict=True)]


@compares_with("others")
def turn_return(
    group: Sequence[EpisodeRewards],
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
    advantages_GK = _snapped(returns_GK - baseline_GK, group).float()
    return [advantages_GK[i, : len(e.rewards_K)].clone() for i, e in enumerate(group)]
