"""Trajectory files: one JSON object a line, every token with its log-probability and version, read back exactly.

    {"schema_version": 1, "kind": "train", "step": 3, "reward": 1.0, "id": …, "task": {…}, "turns": [{…}, …], …}

``reward`` is the sum over turns, for people and ``jq``; the reader recomputes it. Floats are written with the shortest
digits that read back to the same float; JSON has no NaN or infinity, so those become ``{"$float": "nan"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Image,
    Message,
    Part,
    Task,
    Text,
    ToolCall,
    Trajectory,
    Turn,
)

SCHEMA_VERSION = 1
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a trajectory file."""

    kind: str
    """``train`` or ``eval``, or what the writer was told."""
    step: int
    trajectory: Trajectory


def encode(trajectory: Trajectory, *, step: int, kind: str) -> str:
    """One line, without its newline."""
    row = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "step": step,
        "reward": _plain(trajectory.reward),
        "id": trajectory.id,
        "group": trajectory.group,
        "task": {
            "id": trajectory.task.id,
            "split": trajectory.task.split,
            "seed": trajectory.task.seed,
            "payload": _plain(trajectory.task.payload),
            "content_hash": trajectory.task.content_hash,
        },
        "turns": [_turn_to_json(t) for t in trajectory.turns],
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "stop_reason": trajectory.stop_reason,
        "final_observation": [_message_to_json(m) for m in trajectory.final_observation],
        "metrics": _plain(trajectory.metrics),
        "error": trajectory.error,
    }
    line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate out of a model's JSON escape: only \u escapes can carry it
        return json.dumps(row, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return line


def decode(line: str) -> Record:
    """The record of one line. Raises ArealError for another schema version or a broken line."""
    try:
        row = json.loads(line)
        version = row["schema_version"]
        if version != SCHEMA_VERSION:
            raise ArealError(f"trajectory schema_version {version} cannot be read: this package reads {SCHEMA_VERSION}")
        task = Task(**{**row["task"], "payload": _exact(row["task"]["payload"])})
        trajectory = Trajectory(
            id=row["id"],
            task=task,
            group=row["group"],
            turns=tuple(_turn_from_json(t) for t in row["turns"]),
            terminated=row["terminated"],
            truncated=row["truncated"],
            stop_reason=row["stop_reason"],
            final_observation=tuple(_message_from_json(m) for m in row["final_observation"]),
            metrics=_exact(row["metrics"]),
            error=row["error"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArealError(f"not a trajectory: {type(error).__name__}: {error}") from error
    return Record(row["kind"], row["step"], trajectory)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order. A last line cut short (a killed run) is left out.

    Raises ArealError, with file and line, on any other line that is not a trajectory.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield decode(line)
            except ArealError as error:
                raise ArealError(f"{path}:{number}: {error}") from error


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """The trajectories of a file, equal to those that were written."""
    return (record.trajectory for record in read_records(path))


def _turn_to_json(turn: Turn) -> Json:
    return {
        "prompt_suffix": turn.prompt_suffix,
        "ids": turn.completion.ids,
        "logprobs": [_plain(x) for x in turn.completion.logprobs],
        "versions": turn.completion.versions,
        "finish": turn.completion.finish,
        "message": {
            "parts": [_part_to_json(p) for p in turn.message.parts],
            "tool_calls": [_call_to_json(c) for c in turn.message.tool_calls],
            "finish": turn.message.finish,
        },
        "reward": _plain(turn.reward),
        "components": _plain(turn.components),
        "parent": turn.parent,
        "observation": [_message_to_json(m) for m in turn.observation],
        "state_key": turn.state_key,
    }


def _turn_from_json(row: Json) -> Turn:
    message = row["message"]
    return Turn(
        prompt_suffix=tuple(row["prompt_suffix"]),
        completion=Completion(
            ids=tuple(row["ids"]),
            logprobs=tuple(_exact(x) for x in row["logprobs"]),
            versions=tuple(row["versions"]),
            finish=row["finish"],
        ),
        message=AssistantMessage(
            parts=tuple(_part_from_json(p) for p in message["parts"]),
            tool_calls=tuple(_call_from_json(c) for c in message["tool_calls"]),
            finish=message["finish"],
        ),
        reward=_exact(row["reward"]),
        components=_exact(row["components"]),
        parent=row["parent"],
        observation=tuple(_message_from_json(m) for m in row["observation"]),
        state_key=row["state_key"],
    )


def _call_to_json(call: ToolCall) -> Json:
    return {
        "id": call.id,
        "name": call.name,
        "arguments": _plain(call.arguments),
        "raw": call.raw,
        "status": call.status,
        "token_span": call.token_span,
    }


def _call_from_json(row: Json) -> ToolCall:
    span = row["token_span"]
    return ToolCall(
        **{**row, "arguments": _exact(row["arguments"]), "token_span": None if span is None else (span[0], span[1])}
    )


def _message_to_json(message: Message) -> Json:
    return {
        "role": message.role,
        "parts": [_part_to_json(p) for p in message.parts],
        "tool_call_id": message.tool_call_id,
        "name": message.name,
    }


def _message_from_json(row: Json) -> Message:
    return Message(**{**row, "parts": tuple(_part_from_json(p) for p in row["parts"])})


def _part_to_json(part: Part) -> Json:
    return {"text": part.text} if isinstance(part, Text) else {"image": part.ref}


def _part_from_json(row: Json) -> Part:
    return Text(row["text"]) if "text" in row else Image(row["image"])


def _plain(value: Any) -> Any:
    """``value`` with mappings as dicts and non-finite floats as ``{"$float": …}``."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _exact(value: Any) -> Any:
    """The inverse of ``_plain``; sequences come back as lists."""
    if isinstance(value, dict):
        return float(value["$float"]) if value.keys() == {"$float"} else {k: _exact(v) for k, v in value.items()}
    return [_exact(v) for v in value] if isinstance(value, list) else value
