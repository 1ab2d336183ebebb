"""The way from finished groups to the batch that the learner steps on.

groups ─▶ a view of each episode ─▶ estimator ─▶ advantages ─▶ rows
"""

from __future__ import annotations

from collections.abc import Sequence

from areal_agents.algorithms.batch import Batch, Row, rows_of
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, entries
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.types import Group


def batch_of(groups: Sequence[Group], algorithm: AlgorithmConfig, version: int, temperature: float) -> Batch:
    """Turn groups into training rows, with advantages from rewards.

    Args:
        groups: the finished groups of one batch.
        algorithm: the advantage estimator is taken from it.
        version: the learner's.
        temperature: that the episodes were sampled at.
    """
    rows: list[Row] = []
    episode, estimator = 0, Estimator(algorithm.advantage)
    views = [[EpisodeView.of(t) for t in group.trajectories] for group in groups]
    for group, advantages in zip(groups, estimator.of_batch(views), strict=True):
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            rows += rows_of(trajectory, entries(advantage), episode=episode)
            episode += 1
    return Batch(tuple(rows), episode, version, temperature)
