"""What follows any estimator: cut episodes may lose their advantages, and a batch's may be normalised.

advantages of a batch ─▶ overlong ─▶ normalize ─▶ what trains
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Advantages, mapped

STD_EPS = 1e-8

Overlong = Literal["keep", "mask"]
Normalize = Literal["none", "batch"]


def refined(
    found: Sequence[Sequence[Advantages]],
    groups: Sequence[Sequence[EpisodeView]],
    *,
    overlong: Overlong,
    normalize: Normalize,
) -> list[list[Advantages]]:
    """Make the advantages that train of those that an estimator found.

    Args:
        found: the estimator's, an episode's in each group.
        groups: the views that it saw.
        overlong: ``mask`` gives an episode that a limit cut advantage 0, after it was part of its group's baseline.
        normalize: ``batch`` is ``batch_normalized`` over the episodes that are left.
    """
    trains = [[overlong == "keep" or e.terminated for e in group] for group in groups]
    kept = [
        [a if yes else mapped(torch.zeros_like, a) for a, yes in zip(advantages, row, strict=True)]
        for advantages, row in zip(found, trains, strict=True)
    ]
    if normalize == "none":
        return kept
    flat = [a for group in kept for a in group]
    tokens, train = [e.tokens_K for group in groups for e in group], [yes for row in trains for yes in row]
    normal = iter(batch_normalized(flat, tokens, train))
    return [[next(normal) for _ in group] for group in kept]


def batch_normalized(
    advantages: Sequence[Advantages], tokens: Sequence[Sequence[int]], trains: Sequence[bool]
) -> list[Advantages]:
    """Centre a batch's advantages and divide them by their deviation, each sampled token counted once.

        Â = (A − mean(A)) / (std(A) + 1e-8)

    mean and std (n in its denominator) are over the sampled tokens of the episodes that train. The other episodes keep
    what they have. Where all advantages are the same, nothing is divided, and all become 0.

    Paper: PPO's usual implementation (2005.12729 measures its effect); REINFORCE++, 2501.03262.

    Bias: the mean depends on the actions, and so do the lengths it is weighted by. An episode whose own advantage is 0
    gets −mean/std, and so do groups without a signal. After it, the size of the rewards no longer matters.

    Args:
        advantages: each episode's, one number a turn [K] or one a token.
        tokens: each episode's sampled tokens, one count a turn [K].
        trains: whether the episode trains.
    """
    numbers, counts = [], []
    for a, tokens_K, yes in zip(advantages, tokens, trains, strict=True):
        if yes:
            flat = a if isinstance(a, Tensor) else torch.cat([*a, torch.zeros(0)])
            numbers.append(flat.double())
            counts.append(
                torch.tensor(list(tokens_K)) if isinstance(a, Tensor) else torch.ones(flat.shape, dtype=torch.long)
            )
    if not numbers or not bool((total := sum(c.sum() for c in counts)) > 0):
        return list(advantages)
    numbers_N, counts_N = torch.cat(numbers), torch.cat(counts).double()
    mean = (numbers_N * counts_N).sum() / total
    std = ((numbers_N - mean).square() * counts_N).sum().div(total).sqrt()
    scale = 1.0 / (std + STD_EPS) if bool(std > STD_EPS) else torch.zeros(())

    def normal(t: Tensor) -> Tensor:
        return ((t.double() - mean) * scale).float()

    return [mapped(normal, a) if yes else a for a, yes in zip(advantages, trains, strict=True)]
