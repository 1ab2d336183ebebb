"""From trajectories to training rows.

A *row* is one root-to-leaf path through an episode's turns: a plain conversation is one row, a forked or
rewritten one is several. Each sampled token trains in exactly one row (T5); everything an episode's weight
depends on is counted over the episode, never over its rows (T6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from areal_agents.types import Trajectory


@dataclass(frozen=True)
class Row:
    """One sequence of T tokens. ``mask`` is True on the sampled tokens that train in this row."""

    ids: NDArray[np.int64]  # [T]
    mask: NDArray[np.bool_]  # [T]
    logprobs: NDArray[np.float32]  # [T], log μ where mask, else 0
    versions: NDArray[np.int64]  # [T], where mask, else -1
    turns: NDArray[np.int64]  # [T], turn index where mask, else -1
    advantages: NDArray[np.float32]  # [T], where mask, else 0
    episode: int
    """Index of the episode inside the batch."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """The rows of one learner step. ``version`` is the policy version that the learner holds."""

    rows: tuple[Row, ...]
    episodes: int
    """Episodes in the batch, the ones without a gradient included: the denominator of the episode mean."""
    version: int
    temperature: float


def _paths(trajectory: Trajectory) -> list[list[int]]:
    """Root-to-leaf paths of turn indices, in order of their leaves."""
    parents = {t.parent for t in trajectory.turns if t.parent is not None}
    paths: list[list[int]] = []
    for leaf in range(len(trajectory.turns)):
        if leaf in parents:
            continue
        path: list[int] = []
        node: int | None = leaf
        while node is not None:
            path.append(node)
            node = trajectory.turns[node].parent
        paths.append(path[::-1])
    return paths


def rows_of(trajectory: Trajectory, advantages: Sequence[float], *, episode: int) -> list[Row]:
    """The rows of one episode; ``advantages`` has one number a turn, broadcast to the turn's sampled tokens.

    Raises ValueError where ``advantages`` does not have one entry a turn.
    """
    if len(advantages) != len(trajectory.turns):
        raise ValueError(f"{len(advantages)} advantages for {len(trajectory.turns)} turns of {trajectory.id}")
    trained: set[int] = set()
    rows: list[Row] = []
    for path in _paths(trajectory):
        columns: list[tuple[int, bool, float, int, int, float]] = []
        for k in path:
            turn = trajectory.turns[k]
            columns += [(i, False, 0.0, -1, -1, 0.0) for i in turn.prompt_suffix]
            c = turn.completion
            fresh = k not in trained
            columns += [
                (i, True, lp, v, k, float(advantages[k])) if fresh else (i, False, 0.0, -1, -1, 0.0)
                for i, lp, v in zip(c.ids, c.logprobs, c.versions, strict=True)
            ]
            trained.add(k)
        ids, mask, logprobs, versions, turns, adv = zip(*columns, strict=True)
        rows.append(
            Row(
                ids=np.asarray(ids, np.int64),
                mask=np.asarray(mask, np.bool_),
                logprobs=np.asarray(logprobs, np.float32),
                versions=np.asarray(versions, np.int64),
                turns=np.asarray(turns, np.int64),
                advantages=np.asarray(adv, np.float32),
                episode=episode,
            )
        )
    return rows
