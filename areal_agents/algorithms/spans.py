"""Spans of tokens that share one ratio: a token, a turn, or an episode over all its rows.

``trajectory`` is the whole episode: its sampled tokens in all rows, forks included, however they were packed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Span = Literal["token", "turn", "trajectory"]
"""From the shortest to the longest."""


class Spans:
    """The spans that some tokens lie in, with sums over each."""

    def __init__(self, scope: Span, episodes_T: Tensor | None, turns_T: Tensor | None, like_T: Tensor) -> None:
        """Number the spans.

        Args:
            scope: what a span is.
            episodes_T: int [T], the episode of each token; may be None for ``token`` alone.
            turns_T: int [T], its turn; may be None but for ``turn``.
            like_T: any tensor [T] of these tokens.

        Raises:
            ValueError: for an unknown scope, an absent or unequally long index.
        """
        match scope:
            case "token":
                keys_T = torch.arange(len(like_T))
            case "trajectory":
                keys_T = _index("episodes_T", episodes_T, like_T)
            case "turn":
                turns_T = _index("turns_T", turns_T, like_T)
                width = int(turns_T.max()) + 1 if len(turns_T) else 1
                keys_T = _index("episodes_T", episodes_T, like_T) * width + turns_T
            case other:
                raise ValueError(f"scope = {other!r}: there are token, turn and trajectory")
        keys_N, self.index_T = torch.unique(keys_T, return_inverse=True)
        self.lengths_N = torch.bincount(self.index_T, minlength=len(keys_N))

    def sum(self, values_T: Tensor) -> Tensor:
        """Sum over each span, [N]."""
        return torch.zeros(len(self.lengths_N), dtype=values_T.dtype).index_add(0, self.index_T, values_T)

    def mean(self, values_T: Tensor) -> Tensor:
        """Average over each span, [N]."""
        return self.sum(values_T) / self.lengths_N

    def spread(self, values_N: Tensor) -> Tensor:
        """Give each token its span's value, [T]."""
        return values_N[self.index_T]


def _index(name: str, index_T: Tensor | None, like_T: Tensor) -> Tensor:
    if index_T is None or index_T.shape != like_T.shape:
        shape = None if index_T is None else tuple(index_T.shape)
        raise ValueError(f"{name} must say for each of {tuple(like_T.shape)} tokens where it lies, got {shape}")
    return index_T
