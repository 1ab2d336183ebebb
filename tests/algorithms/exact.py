"""Expected gradients of small MDPs, by enumeration of every group of episodes that can come about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from areal_agents.algorithms.episode_view import EpisodeView

Estimate = Callable[[list[EpisodeView]], list[list[float]]]


@dataclass(frozen=True)
class Outcome:
    """One way an episode can go: its probability, its reward a turn, and ∇log π of each turn's choice by that turn's
    logit (choice − probability for a Bernoulli choice)."""

    probability: float
    rewards: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def view(self) -> EpisodeView:
        """Turn k is shown the state k. The greedy episode earned 0.25."""
        keys = tuple(f"state {k}" for k in range(len(self.rewards)))
        return EpisodeView(self.rewards, state_keys_K=keys, greedy_return=0.25)


def expected_gradient(outcomes: Sequence[Outcome], group_size: int, estimate: Estimate) -> list[float]:
    """E[(1/G) Σ_i A_{i,k}·score_{i,k}] for each turn's logit, summed over every joint outcome of the group."""
    gradient = [0.0] * max(len(o.rewards) for o in outcomes)
    for group in product(outcomes, repeat=group_size):
        weight = math.prod(o.probability for o in group) / group_size
        for outcome, advantages in zip(group, estimate([o.view for o in group]), strict=True):
            for k, (a, score) in enumerate(zip(advantages, outcome.scores, strict=True)):
                gradient[k] += weight * a * score
    return gradient


def true_gradient(outcomes: Sequence[Outcome], *, best_of: int = 1) -> list[float]:
    """∇E[the best return of ``best_of`` episodes], by the policy-gradient theorem: E[max R · Σ_i score_i]."""
    gradient = [0.0] * max(len(o.rewards) for o in outcomes)
    for tries in product(outcomes, repeat=best_of):
        best = max(sum(o.rewards) for o in tries) * math.prod(o.probability for o in tries)
        for o in tries:
            for k, score in enumerate(o.scores):
                gradient[k] += best * score
    return gradient


# Three turns. Turn 0 goes on with probability 0.5, turn 1 with 0.4, turn 2 is right with 0.5 and then earns 1.
# So P(alive at turn 2) = 0.2 and J = 0.2 · 0.5. By the logits, p' = p(1 − p):
#   turn 2: 0.2 · 0.25 = 0.05;  turn 1: 0.5 · (0.4 · 0.6) · 0.5 = 0.06;  turn 0: 0.25 · 0.4 · 0.5 = 0.05.
THREE_TURNS = [
    Outcome(0.5, (0.0,), (-0.5,)),
    Outcome(0.5 * 0.6, (0.0, 0.0), (0.5, -0.4)),
    Outcome(0.5 * 0.4 * 0.5, (0.0, 0.0, 0.0), (0.5, 0.6, -0.5)),
    Outcome(0.5 * 0.4 * 0.5, (0.0, 0.0, 1.0), (0.5, 0.6, 0.5)),
]


def stop_or_go_on(p: float) -> list[Outcome]:
    """Reward 1 a turn; turn 0 goes on to turn 1 with probability p; turn 1 has no choice. dJ/dlogit = p(1 − p)."""
    return [Outcome(1 - p, (1.0,), (-p,)), Outcome(p, (1.0, 1.0), (1 - p, 0.0))]


STOP_OR_GO_ON = stop_or_go_on(0.5)


def coin(p: float) -> list[Outcome]:
    """One turn, right with probability p, which earns 1."""
    return [Outcome(1 - p, (0.0,), (-p,)), Outcome(p, (1.0,), (1 - p,))]
