"""The normalisation of a batch's advantages, after any estimator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from areal_agents.algorithms.estimator import Advantages

STD_EPS = 1e-8


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

    return [
        a if not yes else normal(a) if isinstance(a, Tensor) else tuple(map(normal, a))
        for a, yes in zip(advantages, trains, strict=True)
    ]
