"""The reading of one episode out of a shard, without the others.

    shard ─▶ statistics of the ids ─▶ ids of a row group that may hold it ─▶ that row group's one row

A file of many long episodes is read in milliseconds so, where its row groups are those of ``write_shard``. Files of one
row group are read too, as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.tracking.exact_json import from_utf8, to_utf8
from areal_agents.tracking.row_groups import readable
from areal_agents.tracking.trajectories import Record, is_version_2, read_lines, read_shard, records_of
from areal_agents.types import StopReason, Trajectory

_LIGHT = (
    "id", "group", "task_id", "step", "reward", "stop_reason", "error", "n_turns", "n_tool_calls", "n_valid_tool_calls",
    "sampled_tokens", "content_hash",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """One episode without its turns."""

    id: str
    group: str
    task_id: str
    step: int
    reward: float
    stop_reason: str
    error: str | None
    n_turns: int
    n_tool_calls: int
    n_valid_tool_calls: int
    sampled_tokens: int
    content_hash: str
    """Of the task."""


@dataclass(frozen=True, slots=True)
class Earned:
    """What credit depends on in one episode, as ``EpisodeView`` has it. Fields that end with ``_K`` are [K]."""

    id: str
    group: str
    rewards_K: tuple[float, ...]
    tokens_K: tuple[int, ...]
    state_keys_K: tuple[str | None, ...]
    terminated: bool
    stop_reason: StopReason

    @classmethod
    def of(cls, t: Trajectory) -> Earned:
        """Take it of an episode."""
        return cls(
            t.id, t.group, tuple(turn.reward for turn in t.turns), tuple(len(turn.completion.ids) for turn in t.turns),
            tuple(turn.state_key for turn in t.turns), t.terminated, t.stop_reason,
        )  # fmt: skip


def read_episode(path: Path, id: str) -> Record | None:
    """Read the episode called ``id`` from the shard at ``path``.

    Returns None where the shard has none. Raises ArealError as ``read_shard`` does.
    """
    if path.suffix == ".jsonl":
        return next((r for r in read_shard(path) if r.trajectory.id == id), None)
    import pyarrow.parquet as pq

    stored = to_utf8(id)
    with readable(path), pq.ParquetFile(path) as file:
        for i in _row_groups_with(file, stored):
            ids = file.read_row_group(i, columns=["id"], use_threads=False)["id"].to_pylist()
            if stored in ids:
                row = file.read_row_group(i, use_threads=False).slice(ids.index(stored), 1)
                return records_of(file, path, row)[0]
    return None


def read_summaries(path: Path) -> list[Summary]:
    """Read a shard's episodes without their turns, in order.

    Raises ArealError as ``read_shard`` does.
    """
    return [Summary(**{name: _text(row[name]) for name in _LIGHT}) for row in _rows(path, _LIGHT)]


def read_earned(path: Path, group: str | None = None) -> list[Earned]:
    """Read what a shard's episodes earned, in order, of one group or all.

    Raises ArealError as ``read_shard`` does.
    """
    if path.suffix == ".jsonl":
        with readable(path):
            found = [Earned.of(record.trajectory) for record, _ in read_lines(path)]
        return [e for e in found if group is None or e.group == group]
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    turn = [f"turns.list.element.{name}" for name in ("ids", "reward", "state_key")]
    with readable(path), pq.ParquetFile(path) as file:
        table = file.read(columns=["id", "group", "terminated", "stop_reason", *turn], use_threads=False)
        if group is not None:
            table = table.filter(pc.equal(table["group"], to_utf8(group)))
        # The lengths alone leave Arrow: the ids of a batch are millions of numbers.
        turns = pc.list_flatten(table["turns"])
        tokens = iter(pc.list_value_length(pc.struct_field(turns, "ids")).to_pylist())
        rewards, keys = (iter(pc.struct_field(turns, name).to_pylist()) for name in ("reward", "state_key"))
        rows = table.select(["id", "group", "terminated", "stop_reason"]).to_pylist()
        counts = pc.list_value_length(table["turns"]).to_pylist()
        shifted = is_version_2(file)
    found = []
    for row, n in zip(rows, counts, strict=True):
        keys_K = tuple(_text(next(keys)) for _ in range(n))
        found.append(
            Earned(
                _text(row["id"]), _text(row["group"]), tuple(next(rewards) for _ in range(n)),
                tuple(next(tokens) for _ in range(n)), (None, *keys_K)[:n] if shifted else keys_K,
                row["terminated"], row["stop_reason"],
            )
        )  # fmt: skip
    return found


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read some columns of a shard."""
    with readable(path):
        if path.suffix == ".jsonl":
            return [row for _, row in read_lines(path)]
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            found: list[dict[str, Any]] = file.read(columns=list(columns), use_threads=False).to_pylist()
            return found


def _row_groups_with(file: Any, id: str) -> list[int]:
    """Return the row groups whose statistics leave room for the id, in order."""
    schema = file.metadata.schema
    column = [schema.column(i).path for i in range(len(schema))].index("id")
    found = []
    for i in range(file.num_row_groups):
        known = file.metadata.row_group(i).column(column).statistics
        if known is None or not known.has_min_max or known.min <= id <= known.max:
            found.append(i)
    return found


def _text(value: Any) -> Any:
    return from_utf8(value) if isinstance(value, str) else value
