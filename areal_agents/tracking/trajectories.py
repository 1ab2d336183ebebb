"""Trajectory files: Parquet shards that pandas, DuckDB and ``datasets`` read, and this package reads back exactly.

    OUT/trajectories/KIND/step-000003.parquet       one shard a (kind, step), one row an episode
    OUT/trajectories/KIND/step-000003.jsonl         the same rows, one a line, while the episodes come (``journal.py``)

A shard appears whole or not at all, and takes the place of the lines. Columns and queries: ``docs/trajectories.md``.
Text and JSON columns are written by ``exact_json``: plain, but for what UTF-8 and JSON lack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError
from areal_agents.tracking.exact_json import dumps, from_utf8, loads, to_utf8
from areal_agents.tracking.row_groups import encoding, readable, row_groups
from areal_agents.tracking.trajectory_schema import READ, SCHEMA_VERSION, VERSION_KEY, schema
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Image,
    Message,
    Part,
    Rewritten,
    Tail,
    Task,
    Text,
    ToolCall,
    ToolOutcome,
    Trajectory,
    Turn,
)
from areal_agents.utils.files import atomic_file, unwritable

_NAME = re.compile(r"step-(\d{6,})\.(?:parquet|jsonl)")
_KIND = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
ParquetRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a shard."""

    kind: str
    """``train``, ``demonstration``, ``eval-before``, …: the shard's folder."""
    step: int
    trajectory: Trajectory


# --- files -------------------------------------------------------------------------------------------------------


def shard_path(out: Path, kind: str, step: int) -> Path:
    """Return ``OUT/trajectories/KIND/step-000003.parquet`` for a kind and a step.

    Raises ArealError for a kind that is no plain folder name, or a negative step.
    """
    if _KIND.fullmatch(kind) is None or step < 0:
        raise ArealError(
            f"trajectories of kind {kind!r}, step {step}: a kind is letters, digits, '.', '_' and '-', a step is >= 0"
        )
    return out / "trajectories" / kind / f"step-{step:06}.parquet"


def shards(out: Path, kind: str | None = None) -> list[Path]:
    """List the shards of a run folder (or of its ``trajectories/``), sorted by kind, then step.

    The lines of a shard that is not whole yet stand in its place. ``kind`` chooses one kind, None all. Half-written
    files are left out. Raises ArealError where ``out`` is no folder.
    """
    if not out.is_dir():
        raise ArealError(f"{out} is no folder: name a run's folder, such as runs/demo")
    root = out / "trajectories" if (out / "trajectories").is_dir() else out
    found = [(p.parent.name, int(m[1]), p) for p in root.glob("*/step-*") if (m := _NAME.fullmatch(p.name))]
    # Where a process died between the two, the shard has all that the lines have.
    whole = [(k, step, p) for k, step, p in found if p.suffix == ".parquet" or not p.with_suffix(".parquet").exists()]
    return [path for k, _, path in sorted(whole) if kind is None or k == kind]


def step_of(path: Path) -> int:
    """Read the step in a shard's name.

    Raises ArealError for another name.
    """
    if (found := _NAME.fullmatch(path.name)) is None:
        raise ArealError(f"{path} is no trajectory shard: its name is not step-NNNNNN.parquet")
    return int(found[1])


def write_shard(path: Path, records: Sequence[Record]) -> None:
    """Write ``records`` to ``path``, in order, and replace the file as a whole.

    It is on the disk when this returns. Raises ArealError, with path and reason, where it cannot be written or a value
    cannot be stored. ``path`` is then what it was before.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist([row_of(r) for r in records], schema=schema())
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file, pq.ParquetWriter(file, table.schema, **encoding(table.schema)) as writer:
            for start, stop in row_groups([r.trajectory for r in records]):
                writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    except OSError as error:
        raise unwritable(path, error) from error
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ArealError(f"{path}: an episode holds a value that cannot be stored: {error}") from error


def read_shard(path: Path) -> list[Record]:
    """Read the records of one shard, equal to those that were written.

    Raises ArealError for a file that is missing, broken or of another schema version.
    """
    import pyarrow.parquet as pq

    with readable(path):
        if path.suffix == ".jsonl":
            return [record for record, _ in read_lines(path)]
        with pq.ParquetFile(path) as file:
            return records_of(file, path, file.read(use_threads=False))


def records_of(file: Any, path: Path, table: Any) -> list[Record]:
    """Return the records of ``table``, which holds rows of the open Parquet file at ``path``.

    Raises ArealError for another schema version.
    """
    version = (file.schema_arrow.metadata or {}).get(VERSION_KEY, b"").decode(errors="replace")
    if version not in READ:
        raise ArealError(
            f"{path}: trajectory schema_version {version or 'is missing'}, but this package reads "
            f"{' and '.join(READ)}: read it with the version of areal-agents that wrote it"
        )
    return [_record(row if version != "2" else _from_2(row)) for row in table.to_pylist()]


def is_version_2(file: Any) -> bool:
    """Say whether the open Parquet file is of version 2, whose state keys are those after the turns."""
    return (file.schema_arrow.metadata or {}).get(VERSION_KEY) == b"2"


def read_lines(path: Path) -> list[tuple[Record, ParquetRow]]:
    """Read the records of a shard that is still lines, each with its row, which may hold more.

    A last line that was cut short is left out. Raises ArealError for a file that is missing, or another broken line.
    """
    found: list[tuple[Record, ParquetRow]] = []
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    found.append(_of_line(line))
    except OSError as error:
        raise ArealError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArealError(
            f"{path}, line {len(found) + 1}, is no episode of this package ({type(error).__name__}: {error}): remove "
            "that line, and its episode is played again by --resume; or begin anew in another folder"
        ) from error
    return found


def _of_line(line: bytes) -> tuple[Record, ParquetRow]:
    row: ParquetRow = json.loads(line)
    if row["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version {row['schema_version']}, this package reads {SCHEMA_VERSION}")
    return _record(row), row


def read_records(out: Path, *, kind: str | None = None) -> Iterator[Record]:
    """Read the records of a run folder (or of its ``trajectories/``), a shard at a time.

    They come by kind, step and position. Raises ArealError as ``shards`` and ``read_shard`` do.
    """
    for path in shards(out, kind):
        yield from read_shard(path)


# --- rows --------------------------------------------------------------------------------------------------------


def row_of(record: Record) -> ParquetRow:
    """Return a record as one row of the file."""
    t = record.trajectory
    calls = [call for turn in t.turns for call in turn.message.tool_calls]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": _text(record.kind),
        "step": record.step,
        "id": _text(t.id),
        "group": _text(t.group),
        "task_id": _text(t.task.id),
        "task_split": _text(t.task.split),
        "task_seed": t.task.seed,
        "content_hash": _text(t.task.content_hash),
        "task_payload": dumps(t.task.payload),
        "reward": t.reward,
        "terminated": t.terminated,
        "truncated": t.truncated,
        "stop_reason": t.stop_reason,
        "error": _text(t.error),
        "n_turns": len(t.turns),
        "n_tool_calls": len(calls),
        "n_valid_tool_calls": sum(call.status == "ok" for call in calls),
        "sampled_tokens": t.sampled_tokens,
        "min_version": t.min_version,
        "max_version": max((v for turn in t.turns for v in turn.completion.versions), default=0),
        "metrics": dumps(t.metrics),
        "turns": [_turn_row(turn) for turn in t.turns],
        "final_observation": [_message_row(m) for m in t.final_observation],
        "tail": None if t.tail is None else {"ids": t.tail.ids, "parent": t.tail.parent},
        "outcome": None if t.outcome is None else dumps(t.outcome),
    }


def _record(row: ParquetRow) -> Record:
    payload = loads(row["task_payload"])
    task = Task(
        _exact(row["task_id"]), _exact(row["task_split"]), row["task_seed"], payload, _exact(row["content_hash"])
    )
    trajectory = Trajectory(
        id=_exact(row["id"]),
        task=task,
        group=_exact(row["group"]),
        turns=tuple(_turn(turn) for turn in row["turns"]),
        terminated=row["terminated"],
        truncated=row["truncated"],
        stop_reason=row["stop_reason"],
        final_observation=tuple(_message(m) for m in row["final_observation"]),
        metrics=loads(row["metrics"]),
        error=_exact(row["error"]),
        tail=None if (tail := row.get("tail")) is None else Tail(tuple(tail["ids"]), tail["parent"]),
        outcome=None if row.get("outcome") is None else loads(row["outcome"]),  # older files lack the column
    )
    return Record(_exact(row["kind"]), row["step"], trajectory)


def _from_2(row: ParquetRow) -> ParquetRow:
    """Return a row of version 2 as this version has it."""
    keys = [None, *(turn["state_key"] for turn in row["turns"])]
    turns = [turn | {"state_key": key, "in_thought": False} for turn, key in zip(row["turns"], keys, strict=False)]
    return row | {"turns": turns}


def _turn_row(turn: Turn) -> ParquetRow:
    done = turn.completion
    return {
        "prompt_suffix": turn.prompt_suffix,
        "ids": done.ids,
        "logprobs": done.logprobs,
        "versions": done.versions,
        "finish": done.finish,
        **_parts_row(turn.message.parts),
        "message_finish": turn.message.finish,
        "in_thought": turn.message.in_thought,
        "reasoning": _text(turn.message.reasoning) or None,
        "message_tokens": turn.message.tokens,
        "tool_calls": [_call_row(call) for call in turn.message.tool_calls],
        "reward": turn.reward,
        "components": dumps(turn.components),
        "parent": turn.parent,
        "observation": [_message_row(m) for m in turn.observation],
        "state_key": _text(turn.state_key),
        "tool_results": [{"status": _text(r.status), "truncated": r.truncated} for r in turn.tool_results],
        "own_reward": turn.own_reward,
        "own_components": None if turn.own_components is None else dumps(turn.own_components),
        "kind": turn.kind,
        "rewritten": None if turn.rewritten is None else _rewritten_row(turn.rewritten),
    }


def _turn(row: ParquetRow) -> Turn:
    return Turn(
        prompt_suffix=tuple(row["prompt_suffix"]),
        completion=Completion(tuple(row["ids"]), tuple(row["logprobs"]), tuple(row["versions"]), row["finish"]),
        message=AssistantMessage(
            _parts(row),
            tuple(_call(c) for c in row["tool_calls"]),
            row["message_finish"],
            in_thought=row["in_thought"],
            reasoning=_exact(row.get("reasoning")) or "",  # files of before it was kept lack the column
            tokens=_tokens(row),
        ),
        reward=row["reward"],
        components=loads(row["components"]),
        parent=row["parent"],
        observation=tuple(_message(m) for m in row["observation"]),
        state_key=_exact(row["state_key"]),
        tool_results=tuple(ToolOutcome(_exact(r["status"]), r["truncated"]) for r in row["tool_results"]),
        own_reward=row.get("own_reward"),  # files of before groups were judged lack both columns
        own_components=None if row.get("own_components") is None else loads(row["own_components"]),
        kind=row.get("kind") or "step",  # files of before histories were rewritten lack both columns
        rewritten=None if row.get("rewritten") is None else _rewritten(row["rewritten"]),
    )


def _tokens(row: ParquetRow) -> int | None:
    """Return the tokens of a turn's message, also from a file of before they were kept."""
    kept = row.get("message_tokens")
    return len(row["ids"]) or None if kept is None else int(kept)


def _rewritten_row(rewritten: Rewritten) -> str:
    """Write a rewritten history: the index of each message that was kept, and the others as they are."""
    return dumps([entry if isinstance(entry, int) else _message_row(entry) for entry in rewritten])


def _rewritten(text: str) -> Rewritten:
    return tuple(entry if isinstance(entry, int) else _message(entry) for entry in loads(text))


def _call_row(call: ToolCall) -> ParquetRow:
    start, end = call.token_span or (None, None)
    return {
        "id": _text(call.id),
        "name": _text(call.name),
        "arguments": dumps(call.arguments),
        "raw": _text(call.raw),
        "status": call.status,
        "token_start": start,
        "token_end": end,
        "format": call.format,
        "problem": _text(call.problem),
    }


def _call(row: ParquetRow) -> ToolCall:
    start, end = row["token_start"], row["token_end"]
    span = None if start is None else (start, end)
    arguments: Mapping[str, Any] = loads(row["arguments"])
    return ToolCall(
        _exact(row["id"]),
        _exact(row["name"]),
        arguments,
        _exact(row["raw"]),
        row["status"],
        span,
        row.get("format") or "hermes",  # older shards have no such column, and hold nothing else
        _exact(row.get("problem") or ""),
    )


def _message_row(message: Message) -> ParquetRow:
    named = {"tool_call_id": _text(message.tool_call_id), "name": _text(message.name)}
    return {"role": message.role, **_parts_row(message.parts), **named}


def _message(row: ParquetRow) -> Message:
    return Message(row["role"], _parts(row), _exact(row["tool_call_id"]), _exact(row["name"]))


def _parts_row(parts: tuple[Part, ...]) -> ParquetRow:
    """Write parts as ``text`` for people, and as ``parts`` only where they are not exactly one text."""
    text = "".join(part.text for part in parts if isinstance(part, Text))
    single = len(parts) == 1 and isinstance(parts[0], Text)
    plain = [{"text": p.text} if isinstance(p, Text) else {"image": p.ref} for p in parts]
    return {"text": _text(text), "parts": None if single else dumps(plain)}


def _parts(row: ParquetRow) -> tuple[Part, ...]:
    if row["parts"] is None:
        return (Text(_exact(row["text"])),)
    return tuple(Text(p["text"]) if "text" in p else Image(p["image"]) for p in loads(row["parts"]))


def _text(text: str | None) -> str | None:
    return None if text is None else to_utf8(text)


def _exact(text: Any) -> Any:
    return None if text is None else from_utf8(text)
