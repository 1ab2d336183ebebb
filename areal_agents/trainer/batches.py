"""The way from finished groups to the batch that the learner steps on.

    groups ─▶ (rows ─▶ the critic's values) ─▶ a view of each episode ─▶ estimator ─▶ advantages ─▶ rows
                                                                              └─▶ (targets of the values)

What is in brackets is for estimators that read a critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from areal_agents.algorithms.batch import Batch, Row, rows_of, tail_row
from areal_agents.algorithms.critic_targets import Entries, target_columns, whitened
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, entries
from areal_agents.errors import ConfigError
from areal_agents.learner.critic import Values
from areal_agents.settings.config import AlgorithmConfig
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
        algorithm: the advantage estimator and the critic's settings are taken from it.
        version: the learner's.
        temperature: that the episodes were sampled at.
        values: of each episode of all groups, in order. None without a critic.
    """
    estimator = Estimator(algorithm.advantage)
    told = iter(values or [])
    views = [[_view(t, next(told) if values else None) for t in group.trajectories] for group in groups]
    advantages = [a for group in estimator.of_batch(views) for a in group]
    episodes = [t for g in groups for t in g.trajectories]
    given: list[Entries] = [entries(a) for a in advantages]
    columns = [target_columns(a, v.values_K) for a, v in zip(advantages, values, strict=True)] if values else None
    if values and algorithm.critic.whiten:
        given = whitened(given, [[len(turn.completion.ids) for turn in t.turns] for t in episodes])
    rows: list[Row] = []
    for i, trajectory in enumerate(episodes):
        rows += rows_of(trajectory, given[i], episode=i, columns=columns[i] if columns else None)
    return Batch(tuple(rows), len(episodes), version, temperature)


def _view(trajectory: Trajectory, values: EpisodeValues | None) -> EpisodeView:
    if values is None:
        return EpisodeView.of(trajectory)
    return EpisodeView.of(trajectory, values_K=values.values_K, tail_value=values.tail)


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
