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
from areal_agents.tracking.trajectories import Record, read_lines, read_shard, records_of

_LIGHT = (
    "id", "group", "task_id", "step", "reward", "stop_reason", "error", "n_turns", "n_tool_calls", "n_valid_tool_calls",
    "sampled_tokens",
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


def group_rewards(path: Path, group: str) -> dict[str, tuple[float, ...]]:
    """Read the rewards of a group's episodes, one number a turn, by the episodes' ids.

    Raises ArealError as ``read_shard`` does.
    """
    rows = _rows(path, ("id", "group", "turns.list.element.reward"), group=group)
    return {_text(row["id"]): tuple(turn["reward"] for turn in row["turns"]) for row in rows}


def _rows(path: Path, columns: Sequence[str], *, group: str | None = None) -> list[dict[str, Any]]:
    """Read some columns of a shard, of one group or all."""
    stored = None if group is None else to_utf8(group)
    with readable(path):
        if path.suffix == ".jsonl":
            rows = [row for _, row in read_lines(path)]
        else:
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                rows = file.read(columns=list(columns), use_threads=False).to_pylist()
        return [row for row in rows if stored is None or row["group"] == stored]


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
