"""The way from trajectories to training rows.

A *row* is one root-to-leaf path through an episode's turns. A plain conversation is one row, a forked or rewritten one
is several. Each sampled token trains in exactly one row (T5). Everything that an episode's weight depends on is counted
over the episode, never over its rows (T6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from areal_agents.errors import ConfigError
from areal_agents.types import AssistantMessage, Completion, Trajectory, Turn

LEFT_OUT = "left_out"
"""The name of a column that is 1 at tokens which give no gradient at all, and count in denominators alone."""


@dataclass(frozen=True)
class Row:
    """One sequence of T tokens.

    ``mask`` is True on the sampled tokens that train in this row.
    """

    ids: NDArray[np.int64]  # [T]
    mask: NDArray[np.bool_]  # [T]
    logprobs: NDArray[np.float32]  # [T], log μ where mask, else 0
    versions: NDArray[np.int64]  # [T], where mask, else -1
    turns: NDArray[np.int64]  # [T], turn index where mask, else -1
    advantages: NDArray[np.float32]  # [T], where mask, else 0
    episode: int
    """Index of the episode inside the batch."""
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """What else a loss may read of each token, by name, [T] where mask, else 0: ``reference`` (log π of a reference
    policy), ``values`` (V before the token when the batch was made), ``returns`` (what V is fitted to), ``fitted`` (1
    where it is), ``left_out`` (1 where ``algorithm.overlong`` took the gradient)."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """The rows of one learner step.

    ``version`` is the policy version that the learner holds.
    """

    rows: tuple[Row, ...]
    episodes: int
    """Episodes in the batch, the ones without a gradient included: the denominator of the episode mean."""
    version: int
    temperature: float


def _paths(trajectory: Trajectory) -> list[list[int]]:
    """List the root-to-leaf paths of turn indices, in order of their leaves."""
    parents = [t.parent for t in trajectory.turns]
    for k, parent in enumerate(parents):
        if parent is not None and not 0 <= parent < k:
            raise ValueError(f"turn {k} of {trajectory.id} has parent {parent}: a parent is an earlier turn")
    paths: list[list[int]] = []
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path: list[int] = []
        node: int | None = leaf
        while node is not None:
            path.append(node)
            node = parents[node]
        paths.append(path[::-1])
    return paths


def rows_of(
    trajectory: Trajectory,
    advantages: Sequence[float | Sequence[float]],
    *,
    episode: int,
    columns: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> list[Row]:
    """Cut one episode into training rows.

    A turn that several paths share trains in the first of them. A path on which nothing trains gives no row.

    Args:
        trajectory: the episode.
        advantages: an entry a turn: one number for all of the turn's sampled tokens, or one for each of them.
        episode: its index inside the batch.
        columns: further numbers of each sampled token, [T_k] a turn, by name (``Row.columns``).

    Raises:
        ValueError: where ``advantages`` or a column does not fit the turns, or a turn's parent is no earlier turn.
        ConfigError: for a turn without token ids (a chat server's model played it).
    """
    if len(advantages) != len(trajectory.turns):
        raise ValueError(f"{len(advantages)} advantages for {len(trajectory.turns)} turns of {trajectory.id}")
    for k, turn in enumerate(trajectory.turns):
        if not turn.prompt_suffix and not turn.completion.ids:
            raise ConfigError(
                f"episode {trajectory.id} cannot be trained on: its turn {k} has neither token ids nor "
                "log-probabilities (T1, T3), because a chat model played it; play it with an engine"
            )
    columns = columns or {}
    _require_fit(trajectory, advantages, columns)
    trained: set[int] = set()
    rows: list[Row] = []
    for path in _paths(trajectory):
        row = _row(trajectory, path, set(path) - trained, advantages, episode, columns)
        trained.update(path)
        if row.mask.any():
            rows.append(row)
    return rows


def tail_row(trajectory: Trajectory, *, episode: int) -> Row | None:
    """Return a row in which a critic's value after the last turn can be read, or None where there is none to read.

    It is the prompt that the next turn would have had, and one token more that stands for what was never sampled. That
    token is the only one of its mask, of a turn behind the last: V before it is V after the episode's last turn.
    """
    tail, n = trajectory.tail, len(trajectory.turns)
    if tail is None or trajectory.terminated:
        return None
    never = Turn(tail.ids, Completion((0,), (0.0,), (0,), "stop"), AssistantMessage(()), parent=tail.parent)
    longer = replace(trajectory, turns=(*trajectory.turns, never))
    path = next(path for path in _paths(longer) if path[-1] == n)
    return _row(longer, path, {n}, [0.0] * (n + 1), episode, {})


def _require_fit(
    trajectory: Trajectory,
    advantages: Sequence[float | Sequence[float]],
    columns: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    for k, turn in enumerate(trajectory.turns):
        n, advantage = len(turn.completion.ids), advantages[k]
        if not isinstance(advantage, float | int) and len(advantage) != n:
            raise ValueError(f"{len(advantage)} advantages for the {n} tokens of turn {k} of {trajectory.id}")
        for name, values in columns.items():
            if len(values) != len(trajectory.turns) or len(values[k]) != n:
                raise ValueError(f"column {name!r} does not fit the {n} tokens of turn {k} of {trajectory.id}")


def _row(
    trajectory: Trajectory,
    path: list[int],
    fresh: set[int],
    advantages: Sequence[float | Sequence[float]],
    episode: int,
    columns: Mapping[str, Sequence[Sequence[float]]],
) -> Row:
    """Lay one path out as a row, in which the turns in ``fresh`` train."""
    length = sum(len(trajectory.turns[k].prompt_suffix) + len(trajectory.turns[k].completion.ids) for k in path)
    row = Row(
        ids=np.zeros(length, np.int64),
        mask=np.zeros(length, np.bool_),
        logprobs=np.zeros(length, np.float32),
        versions=np.full(length, -1, np.int64),
        turns=np.full(length, -1, np.int64),
        advantages=np.zeros(length, np.float32),
        episode=episode,
        columns={name: np.zeros(length, np.float32) for name in columns},
    )
    start = 0
    for k in path:
        turn = trajectory.turns[k]
        sampled = start + len(turn.prompt_suffix)
        stop = sampled + len(turn.completion.ids)
        row.ids[start:sampled] = turn.prompt_suffix
        row.ids[sampled:stop] = turn.completion.ids
        if k in fresh:
            row.mask[sampled:stop] = True
            row.logprobs[sampled:stop] = turn.completion.logprobs
            row.versions[sampled:stop] = turn.completion.versions
            row.turns[sampled:stop] = k
            row.advantages[sampled:stop] = advantages[k]
            for name, values in columns.items():
                row.columns[name][sampled:stop] = values[k]
        start = stop
    return row
