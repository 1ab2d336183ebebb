"""The way from finished groups to the batch that the learner steps on.

groups ─▶ a view of each episode ─▶ estimator ─▶ advantages (``credit.py``) ─▶ rows
"""

from __future__ import annotations

from collections.abc import Sequence

from areal_agents.algorithms.batch import Batch, Row, rows_of
from areal_agents.algorithms.estimator import Estimator, entries
from areal_agents.algorithms.refinement import refined
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.trainer.credit import require_state_keys, views_of
from areal_agents.types import Group


def batch_of(groups: Sequence[Group], algorithm: AlgorithmConfig, version: int, temperature: float) -> Batch:
    """Turn groups into training rows, with advantages from rewards.

    Args:
        groups: the finished groups of one batch.
        algorithm: the advantage estimator is taken from it, and what follows it.
        version: the learner's.
        temperature: that the episodes were sampled at.

    Raises:
        ConfigError: the estimator returned something else than advantages, or needs what the environment does not give.
    """
    rows: list[Row] = []
    episode, estimator = 0, Estimator(algorithm.advantage)
    require_state_keys(groups, estimator)
    views = [views_of(group) for group in groups]
    found = refined(estimator.of_batch(views), views, overlong=algorithm.overlong, normalize=algorithm.normalize)
    for group, advantages in zip(groups, found, strict=True):
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            rows += rows_of(trajectory, entries(advantage), episode=episode)
            episode += 1
    return Batch(tuple(rows), episode, version, temperature)
