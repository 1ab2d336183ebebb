"""The way from finished groups to the batch that the learner steps on.

groups ─▶ (rows ─▶ the critic's values) ─▶ a view of each episode ─▶ estimator ─▶ refinement ─▶ advantages ─▶ rows
                                                                          └─▶ (targets of the values)

What is in brackets is for estimators that read a critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from areal_agents.algorithms.batch import Batch, Row, rows_of, tail_row
from areal_agents.algorithms.critic_targets import target_columns
from areal_agents.algorithms.estimator import Estimator, entries
from areal_agents.algorithms.refinement import refined
from areal_agents.errors import ConfigError
from areal_agents.learner.critic import Values
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.trainer.credit import require_state_keys, views_of
from areal_agents.types import Group, Trajectory


class Valuer(Protocol):
    """The part of a learner that a batch needs."""

    @property
    def version(self) -> int: ...
    async def values(self, batch: Batch) -> Values: ...


@dataclass(frozen=True, slots=True)
class EpisodeValues:
    """What a critic says of one episode."""

    values_K: tuple[tuple[float, ...], ...]
    """V before each sampled token, [T_k] a turn."""
    tail: float = 0.0
    """V after the last turn. 0 where the task ended."""


async def batch_for(
    learner: Valuer, groups: Sequence[Group], algorithm: AlgorithmConfig, *, temperature: float
) -> Batch:
    """Turn groups into training rows for ``learner``, whose critic is asked where the estimator reads values.

    Args:
        learner: steps on the batch next.
        groups: the finished groups of one batch.
        algorithm: the advantage estimator and the critic's settings are taken from it.
        temperature: that the episodes were sampled at.
    """
    values = None
    if Estimator(algorithm.advantage).reads_values:
        values = await _read_values(learner, [t for g in groups for t in g.trajectories], temperature)
    return batch_of(groups, algorithm, learner.version, temperature, values=values)


def batch_of(
    groups: Sequence[Group],
    algorithm: AlgorithmConfig,
    version: int,
    temperature: float,
    *,
    values: Sequence[EpisodeValues] | None = None,
) -> Batch:
    """Turn groups into training rows.

    Args:
        groups: the finished groups of one batch.
        algorithm: the advantage estimator and what follows it are taken from it.
        version: the learner's.
        temperature: that the episodes were sampled at.
        values: of each episode of all groups, in order. None without a critic.

    Raises:
        ConfigError: the estimator returned something else than advantages, or needs what the environment does not give.
    """
    estimator = Estimator(algorithm.advantage)
    require_state_keys(groups, estimator)
    views = [views_of(group) for group in groups]
    if values is not None:
        told = iter(values)
        views = [
            [replace(view, values_K=v.values_K, tail_value=v.tail) for view, v in zip(group, told, strict=False)]
            for group in views
        ]
    found = estimator.of_batch(views)
    columns = None
    if values is not None:  # V is fitted to what the estimator found, before anything is normalised
        every = [a for group in found for a in group]
        columns = [target_columns(a, v.values_K) for a, v in zip(every, values, strict=True)]
    refinement = refined(found, views, overlong=algorithm.overlong, normalize=algorithm.normalize)
    advantages = [a for group in refinement for a in group]
    episodes = [t for g in groups for t in g.trajectories]
    rows: list[Row] = []
    for i, trajectory in enumerate(episodes):
        rows += rows_of(trajectory, entries(advantages[i]), episode=i, columns=columns[i] if columns else None)
    return Batch(tuple(rows), len(episodes), version, temperature)


async def _read_values(learner: Valuer, episodes: Sequence[Trajectory], temperature: float) -> list[EpisodeValues]:
    """Ask the critic for V before each sampled token, and after the last turn of episodes that a limit cut."""
    rows: list[Row] = []
    for i, t in enumerate(episodes):
        tail = tail_row(t, episode=i)
        rows += [*rows_of(t, [0.0] * len(t.turns), episode=i), *([] if tail is None else [tail])]
    found = await learner.values(Batch(tuple(rows), len(episodes), learner.version, temperature))
    if not all(np.isfinite(values).all() for values in found):
        raise ConfigError(
            "the critic's values are no finite numbers any more: go on from an earlier checkpoint with a lower "
            "algorithm.critic.lr"
        )
    turns: list[list[tuple[float, ...]]] = [[() for _ in t.turns] + [(0.0,)] for t in episodes]  # the tail is last
    for row, values in zip(rows, found, strict=True):
        for k in sorted(set(row.turns[row.mask].tolist())):
            turns[row.episode][k] = tuple(values[row.turns == k].tolist())
    return [EpisodeValues(tuple(of_turns), tail) for *of_turns, (tail,) in turns]
