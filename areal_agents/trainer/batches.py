"""The way from finished groups to the batch that the learner steps on.

groups ─▶ (rows ─▶ the critic's values) ─▶ a view of each episode ─▶ estimator ─▶ refinement ─▶ advantages ─▶ rows
              ├─▶ (log π) ─▶ (ratio) ─────────▶ ┤
              └─▶ (log ref) ─▶ (pay) ─────────▶ ┘                          └─▶ (targets of the values) ▲
              └─▶ (log teacher) ─▶ (credit) ───────────────────────────────────────────────────────────┘

What is in brackets is for estimators that read a critic or ratios, for a KL term in the reward, and for a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from areal_agents.algorithms.batch import LEFT_OUT, Batch, Row, rows_of, tail_row
from areal_agents.algorithms.critic_targets import Columns, target_columns
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Advantages, Estimator, entries
from areal_agents.algorithms.refinement import refined
from areal_agents.algorithms.token_credit import TEACHER, ByTurn, penalties, taught
from areal_agents.errors import ConfigError
from areal_agents.learner.critic import Values
from areal_agents.learner.passes import Logprobs
from areal_agents.learner.reference import COLUMN
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.trainer.credit import require_state_keys, views_of
from areal_agents.types import Group, Trajectory


class Valuer(Protocol):
    """The part of a learner that a batch needs."""

    @property
    def version(self) -> int: ...
    async def logprobs(self, batch: Batch) -> Logprobs: ...
    async def values(self, batch: Batch) -> Values: ...
    async def reference(self, batch: Batch) -> tuple[Logprobs, float]: ...
    async def teacher(self, batch: Batch) -> Logprobs: ...


class Scorer(Protocol):
    """A teacher that is not the learner's."""

    async def logprobs(self, rows: Sequence[Row]) -> Logprobs:
        """Compute log π of the rows' sampled tokens at temperature 1, NaN where it cannot."""
        ...


@dataclass(frozen=True, slots=True)
class EpisodeValues:
    """What a critic says of one episode."""

    values_K: tuple[tuple[float, ...], ...]
    """V before each sampled token, [T_k] a turn."""
    tail: float = 0.0
    """V after the last turn. 0 where the task ended."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What models say of a batch's episodes, in the order of the episodes. None: they were not asked."""

    values: Sequence[EpisodeValues] | None = None
    """The critic's."""
    reference: Sequence[ByTurn] | None = None
    """log π of the reference policy."""
    kl_coef: float = 0.0
    """β as it is now."""
    log_ratios: Sequence[float] | None = None
    """Σ (log π − log μ) of each episode, π being the learner's policy."""
    teacher: Sequence[ByTurn] | None = None
    """The teacher's log π, NaN where it has none."""


async def batch_for(
    learner: Valuer,
    groups: Sequence[Group],
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    teacher: Scorer | None = None,
) -> Batch:
    """Turn groups into training rows for ``learner``, whose models are asked where the settings need them.

    Args:
        learner: steps on the batch next.
        groups: the finished groups of one batch.
        algorithm: the advantage estimator, the critic's, the KL term's and the teacher's settings are taken from it.
        temperature: that the episodes were sampled at.
        teacher: asked in the place of the learner's.
    """
    episodes = [t for g in groups for t in g.trajectories]
    asked, estimator = Asked(), None if algorithm.teacher.alone else Estimator(algorithm.advantage)
    ratios = estimator is not None and estimator.reads_ratios
    if algorithm.kl.in_reward or algorithm.teacher.model or ratios:
        rows = [row for i, t in enumerate(episodes) for row in rows_of(t, [0.0] * len(t.turns), episode=i)]
        plain = Batch(tuple(rows), len(episodes), learner.version, temperature)
        if ratios:
            asked = replace(asked, log_ratios=_log_ratios(rows, await learner.logprobs(plain), len(episodes)))
        if algorithm.kl.in_reward:
            found, coef = await learner.reference(plain)
            asked = replace(asked, reference=_by_turn(rows, found, episodes), kl_coef=coef)
        if algorithm.teacher.model:
            found = await (learner.teacher(plain) if teacher is None else teacher.logprobs(rows))
            asked = replace(asked, teacher=_by_turn(rows, found, episodes))
    if estimator is not None and estimator.reads_values:
        asked = replace(asked, values=await _read_values(learner, episodes, temperature))
    return batch_of(groups, algorithm, learner.version, temperature, asked)


def batch_of(
    groups: Sequence[Group], algorithm: AlgorithmConfig, version: int, temperature: float, asked: Asked | None = None
) -> Batch:
    """Turn groups into training rows.

    Args:
        groups: the finished groups of one batch.
        algorithm: the advantage estimator and what follows it are taken from it.
        version: the learner's.
        temperature: that the episodes were sampled at.
        asked: what models say of the episodes. None: nothing.

    Raises:
        ConfigError: the estimator returned something else than advantages, or needs what the environment does not give.
    """
    episodes, asked = [t for g in groups for t in g.trajectories], asked or Asked()
    columns: list[Columns] = [{} for _ in episodes]
    if asked.reference is not None:
        for of_episode, logprobs_K in zip(columns, asked.reference, strict=True):
            of_episode[COLUMN] = [list(turn) for turn in logprobs_K]
    if algorithm.teacher.alone:
        advantages: list[Advantages] = [torch.zeros(len(t.turns)) for t in episodes]
    else:
        advantages, targets = _of_rewards(groups, algorithm, asked)
        for of_episode, more in zip(columns, targets, strict=True):
            of_episode.update(more)
    rows: list[Row] = []
    for i, trajectory in enumerate(episodes):
        given = entries(advantages[i])
        if algorithm.overlong == "mask":  # the advantage is 0, and no term beside the loss may act on the tokens either
            out = float(left_out(trajectory, algorithm))
            columns[i][LEFT_OUT] = [[out] * len(t.completion.ids) for t in trajectory.turns]
        if asked.teacher is not None:
            columns[i][TEACHER] = [list(turn) for turn in asked.teacher[i]]
            if not left_out(trajectory, algorithm):
                given = taught(advantages[i], trajectory, asked.teacher[i], algorithm.teacher.coef)
        rows += rows_of(trajectory, given, episode=i, columns=columns[i])
    return Batch(tuple(rows), len(episodes), version, temperature)


def left_out(trajectory: Trajectory, algorithm: AlgorithmConfig) -> bool:
    """Say whether the policy learns nothing from an episode, which a limit cut."""
    return algorithm.overlong == "mask" and not trajectory.terminated


def _of_rewards(
    groups: Sequence[Group], algorithm: AlgorithmConfig, asked: Asked
) -> tuple[list[Advantages], list[Columns]]:
    """Return the advantages of the rewards that train, and what a critic is fitted to, an entry an episode."""
    estimator = Estimator(algorithm.advantage)
    require_state_keys(groups, estimator)
    views = [views_of(group) for group in groups]
    if asked.reference is not None:
        views = _paying(groups, views, asked.reference, algorithm, asked.kl_coef)
    if asked.log_ratios is not None:
        logs = iter(asked.log_ratios)
        views = [[replace(view, log_ratio=next(logs)) for view in group] for group in views]
    if asked.values is not None:
        told = iter(asked.values)
        views = [
            [replace(view, values_K=v.values_K, tail_value=v.tail) for view, v in zip(group, told, strict=False)]
            for group in views
        ]
    found = _by_env(groups, lambda places: estimator.of_batch([views[i] for i in places]))
    targets: list[Columns] = [{} for group in found for _ in group]
    if asked.values is not None:  # V is fitted to what the estimator found, before anything is normalised
        every = [a for group in found for a in group]
        targets = [target_columns(a, v.values_K) for a, v in zip(every, asked.values, strict=True)]
    refinement = _by_env(
        groups,
        lambda places: refined(
            [found[i] for i in places], [views[i] for i in places], overlong=algorithm.overlong,
            normalize=algorithm.normalize,
        ),
    )  # fmt: skip
    return [a for group in refinement for a in group], targets


def _by_env(
    groups: Sequence[Group], of_batch: Callable[[Sequence[int]], list[list[Advantages]]]
) -> list[list[Advantages]]:
    """Call ``of_batch`` with the places of the groups of each environment, as if they were a batch of their own.

    Rewards of different environments have different sizes: with one mean and one deviation for all, the one with the
    larger rewards would train, and the other's episodes would be alike.
    """
    found: dict[int, list[Advantages]] = {}
    for env in dict.fromkeys(group.env for group in groups):
        places = [i for i, group in enumerate(groups) if group.env == env]
        found |= dict(zip(places, of_batch(places), strict=True))
    return [found[i] for i in range(len(groups))]


def _paying(
    groups: Sequence[Group],
    views: Sequence[Sequence[EpisodeView]],
    reference: Sequence[ByTurn],
    algorithm: AlgorithmConfig,
    coef: float,
) -> list[list[EpisodeView]]:
    """Return the views with rewards that are less by what the episodes' tokens pay for leaving the reference."""
    logprobs, out = iter(reference), []
    for group, seen in zip(groups, views, strict=True):
        estimates = [penalties(algorithm.kl.estimator, t, next(logprobs)) for t in group.trajectories]
        paid = [[[coef * x for x in turn] for turn in of_episode] for of_episode in estimates]
        out.append([view.paying(p) for view, p in zip(seen, paid, strict=True)])
    return out


def _by_turn(rows: Sequence[Row], found: Logprobs, episodes: Sequence[Trajectory]) -> list[ByTurn]:
    """Sort numbers of the rows' sampled tokens by episode and turn."""
    turns: list[list[list[float]]] = [[[] for _ in t.turns] for t in episodes]
    for row, numbers in zip(rows, found, strict=True):
        for k in sorted(set(row.turns[row.mask].tolist())):
            turns[row.episode][k] = numbers[row.turns == k].tolist()
    return list(turns)


def _log_ratios(rows: Sequence[Row], found: Logprobs, episodes: int) -> list[float]:
    """Sum log π − log μ over the sampled tokens of each episode, all its rows together."""
    out = [0.0] * episodes
    for row, logprobs in zip(rows, found, strict=True):
        out[row.episode] += float((logprobs - row.logprobs)[row.mask].sum(dtype=np.float64))
    return out


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
