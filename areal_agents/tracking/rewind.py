"""The way back to a checkpoint: metrics.jsonl and trajectory shards are cut to what they were at its mark.

    {"metrics_bytes": 1234, "shards": {"train": [[1, 10]], "eval-before": [[0, 0]]}}       first and last of each span

Cutting twice is cutting once, so a process that dies in the middle leaves nothing to repair.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError
from areal_agents.tracking.journal import says_of
from areal_agents.tracking.trajectories import shards, step_of

Spans = dict[str, list[list[int]]]


@dataclass(frozen=True, slots=True)
class Cut:
    """A report of what ``cut_back`` removed."""

    rows: int
    """Whole rows of metrics.jsonl."""
    shards: int
    missing: tuple[str, ...]
    """Shards that the mark names and that are gone, as KIND/STEP; somebody deleted them."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_shards(out: Path) -> list[Path]:
    """List the whole shards in ``OUT/trajectories``, and nowhere else.

    There are none where there is no such folder.
    """
    folder = out / "trajectories"
    return [path for path in shards(folder) if path.suffix == ".parquet"] if folder.is_dir() else []


def spans(paths: Iterable[Path]) -> Spans:
    """Write shards as spans of steps by kind.

    So a long run's mark stays short.
    """
    out: Spans = {}
    for kind, step in sorted((path.parent.name, step_of(path)) for path in paths):
        of_kind = out.setdefault(kind, [])
        if of_kind and of_kind[-1][1] == step - 1:
            of_kind[-1][1] = step
        else:
            of_kind.append([step, step])
    return out


def cut_back(out: Path, mark: Mapping[str, Any], *, of: str = "") -> Cut:
    """Remove every metrics row, shard and half-written shard that is not in ``mark``.

    The mark {} holds nothing. The lines of a shard that is not whole stay where they are of the run that goes on: each
    says ``of`` what it is. Raises ArealError, before anything is removed, for a metrics.jsonl that is shorter than
    the mark or has no line end there. Raises OSError where a file cannot be changed.
    """
    try:
        size: int = mark["metrics_bytes"] if mark else 0
        kept: Spans = mark["shards"] if mark else {}
        wanted = {(kind, step) for kind, of_kind in kept.items() for a, b in of_kind for step in range(a, b + 1)}
    except (KeyError, TypeError, ValueError) as error:
        raise ArealError(f"{dict(mark)} is no mark of a run's files ({type(error).__name__}: {error})") from error
    # First, because it refuses a file that does not fit the mark, and nothing may be gone then.
    rows = _cut_metrics(out / "metrics.jsonl", size)
    found = {(path.parent.name, step_of(path)): path for path in run_shards(out)}
    late = [path for key, path in found.items() if key not in wanted]
    lines = [path for path in (out / "trajectories").glob("*/step-*.jsonl") if not of or says_of(path) != of]
    for path in [*late, *lines, *(out / "trajectories").glob("*/.*.tmp")]:
        path.unlink()
    for folder in (out / "trajectories").glob("*/"):
        if not any(folder.iterdir()):
            folder.rmdir()
    return Cut(rows, len(late) + len(lines), tuple(f"{kind}/{step}" for kind, step in sorted(wanted - found.keys())))


def _cut_metrics(path: Path, size: int) -> int:
    """Cut the file to ``size`` bytes, and return how many whole rows went."""
    if not path.exists() and size == 0:
        return 0
    try:
        with path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if end < size or (size > 0 and file.read(1) != b"\n"):
                raise ArealError(
                    f"{path} does not fit the checkpoint: {end} bytes, and a row was to end at {size}. It was changed "
                    "by hand: put it back, or start a new run in another folder"
                )
            file.seek(size)
            rows = sum(line.endswith(b"\n") for line in file)
            file.truncate(size)
            os.fsync(file.fileno())
    except FileNotFoundError as error:
        raise ArealError(f"{path} is gone, but the checkpoint needs it: put it back, or start a new run") from error
    return rows
