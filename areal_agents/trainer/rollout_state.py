"""The rollouts of a checkpoint as two files, ``rollouts.json`` and the episodes in ``groups.parquet``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_agents.rollout.buffer import BufferState, Ticket
from areal_agents.rollout.producer import GREEDY, OpenGroup, RolloutState
from areal_agents.rollout.tasks import StreamState
from areal_agents.tracking import exact_json
from areal_agents.tracking.trajectories import Record, write_shard
from areal_agents.types import Group, Task, Trajectory


def write_rollouts(folder: Path, state: RolloutState | None) -> None:
    """Write ``state`` to ``folder``, or null where there is none yet."""
    if state is None:
        (folder / "rollouts.json").write_text("null\n")
        return
    groups = state.buffer.buffered
    buffered = [(g.order, i, t) for g in groups for i, t in enumerate(g.trajectories)]
    buffered += [(g.order, GREEDY, g.greedy) for g in groups if g.greedy is not None]
    finished = [(g.ticket.order, i, t) for g in state.open for i, t in g.finished.items() if t is not None]
    # The order of the rows says whose they are. ``places`` below names group and index in the same order.
    records = [Record("checkpoint", 0, t) for _, _, t in [*buffered, *finished]]
    write_shard(folder / "groups.parquet", records)
    row = {
        "version": state.buffer.version,
        "admitted": state.buffer.admitted,
        "discarded": state.buffer.discarded,
        "dropped": state.buffer.dropped,
        "refilled": state.buffer.refilled,
        "refilled_now": state.buffer.refilled_now,
        "dropped_of": dict(state.buffer.dropped_of),
        "tasks_lost": state.tasks_lost,
        "places": [(order, index) for order, index, _ in [*buffered, *finished]],
        "buffered": [
            {"id": g.id, "order": g.order, "version": g.admitted_version, "task": _task(g.task)} | _from(g)
            for g in state.buffer.buffered
        ],
        "open": [
            {
                "order": g.ticket.order,
                "version": g.ticket.version,
                "task": _task(g.task),
                "failed": [i for i, t in g.finished.items() if t is None],
            }
            | _from(g)
            for g in state.open
        ],
        "stream": _stream(state.tasks),
    }
    (folder / "rollouts.json").write_text(json.dumps(row) + "\n", encoding="utf-8")


def rollouts_from_json(row: Mapping[str, Any], records: list[Record]) -> RolloutState:
    """Rebuild the state from the content of ``rollouts.json`` and the rows of ``groups.parquet``."""
    episodes: dict[int, dict[int, Trajectory | None]] = {}
    for (order, index), record in zip(row["places"], records, strict=True):
        episodes.setdefault(order, {})[index] = record.trajectory
    groups = tuple(
        Group(
            g["id"],
            _task_of(g["task"]),
            tuple(t for i, t in sorted(episodes[g["order"]].items()) if t is not None and i != GREEDY),
            g["version"],
            g["order"],
            episodes[g["order"]].get(GREEDY),
            g.get("env", ""),  # not there before a run could have several
            g.get("level"),
        )
        for g in row["buffered"]
    )
    open = tuple(
        OpenGroup(
            Ticket(g["order"], g["version"]),
            _task_of(g["task"]),
            {**dict.fromkeys(g["failed"]), **episodes.get(g["order"], {})},
            g.get("env", ""),
            g.get("level"),
        )
        for g in row["open"]
    )
    return RolloutState(
        BufferState(
            row["version"],
            row["admitted"],
            row["discarded"],
            tuple(row["dropped"]),
            tuple(g.ticket for g in open),
            groups,
            row.get("refilled", 0),  # not there before groups could be refilled
            row.get("refilled_now", 0),
            tuple(row.get("dropped_of", {}).items()),
        ),
        open,
        _stream_of(row["stream"]),
        tuple(row["tasks_lost"]),
    )


def _from(group: Group | OpenGroup) -> dict[str, Any]:
    """Return where a group's task is from, as far as that is not plain."""
    return ({"env": group.env} if group.env else {}) | ({} if group.level is None else {"level": group.level})


def _stream(state: StreamState) -> dict[str, Any]:
    row: dict[str, Any] = {
        "size": state.size,
        "drawn": state.drawn,
        "again": [_task(t) for t in state.again],
        "requeued": state.requeued,
        "recent": state.recent,
        "left_out": dict(state.left_out),
        "known": state.known,
    }
    if state.chosen:
        row["chosen"] = state.chosen
    if state.parts:
        row["parts"] = {name: _stream(part) for name, part in state.parts}
    if state.curriculum is not None:
        row["curriculum"] = dict(state.curriculum)
    return row


def _stream_of(row: Mapping[str, Any]) -> StreamState:
    return StreamState(
        row["size"],
        row["drawn"],
        tuple(_task_of(t) for t in row["again"]),
        tuple(row["requeued"]),
        tuple(row["recent"]),
        tuple(row.get("left_out", {}).items()),  # not there before a task could be left out
        row.get("known", 0),
        tuple((name, _stream_of(part)) for name, part in row.get("parts", {}).items()),
        row.get("curriculum"),
        row.get("chosen", ""),
    )


def _task(task: Task) -> dict[str, Any]:
    row = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    return row | {"payload": exact_json.dumps(dict(task.payload))}


def _task_of(row: Mapping[str, Any]) -> Task:
    return Task(**{**row, "payload": exact_json.loads(row["payload"])})
