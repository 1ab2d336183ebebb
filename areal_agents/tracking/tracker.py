"""The files that a run leaves behind.

    OUT/metrics.jsonl                            one object a log call: kind, step, time, then the metrics
    OUT/events.jsonl                             one object an event: kind, time, then its fields
    OUT/trajectories/KIND/step-000003.parquet    every episode (``trajectories.py``)
    OUT/tensorboard/                             the same metrics for TensorBoard (``tensorboard.py``); on request
                                                 for W&B (``wandb.py``)

All writing happens on one background thread, in order, so the event loop never waits for a disk. An error there (a full
disk) is raised by the next call.

``Tracker.mark`` says where the files end at a checkpoint, and ``Tracker(mark=...)`` cuts them back to there. Metrics
and episodes are those of the surviving lineage, events are all that ever happened.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from areal_agents.errors import ArealError
from areal_agents.tracking import console as display
from areal_agents.tracking.journal import Journal
from areal_agents.tracking.rewind import Cut, cut_back, run_shards, spans
from areal_agents.tracking.tensorboard import Board, Point, event_files
from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.tracking.wandb import WandbLog, require_wandb
from areal_agents.tracking.writer import Writer
from areal_agents.types import Trajectory
from areal_agents.utils.files import cut_torn_line, sync, unwritable

__all__ = ["Tracker", "TrajectoryWriter", "read_metrics"]

RESERVED = frozenset({"kind", "step", "time"})
T = TypeVar("T")


class TrajectoryWriter:
    """A writer of episodes to ``OUT/trajectories/KIND/step-N.parquet``.

    They are serialised and written off the event loop.
    """

    def __init__(self, out: Path, writer: Writer) -> None:
        self._out = out
        self._writer = writer
        self._known = set(run_shards(out))
        self.written = set(self._known)
        """The shards on the disk. For use on the writing thread."""

    def write(self, trajectories: Iterable[Trajectory], *, step: int, kind: str = "train") -> None:
        """Write the whole shard of (``kind``, ``step``), one row an episode.

        Raises ArealError where that shard was written before, ``kind`` is no folder name, or an earlier write failed.
        """
        path = shard_path(self._out, kind, step)
        if path in self._known:
            raise ArealError(f"{path} is written already: one call holds all episodes of a kind and a step")
        records = [Record(kind, step, t) for t in trajectories]

        def job() -> None:
            write_shard(path, records)
            path.with_suffix(".jsonl").unlink(missing_ok=True)  # the episodes one by one, which the shard has now
            self.written.add(path)

        self._writer.submit(job)
        self._known.add(path)

    def append(self, journal: Journal, record: Record, **beside: Any) -> None:
        """Write one episode of a shard that is not whole yet. Raises ArealError where an earlier write failed."""
        self._writer.submit(lambda: journal.append(record, **beside))

    def end(self, journal: Journal) -> None:
        """Close a journal after all that was written before."""
        self._writer.put(journal.close)


class Tracker:
    """The metrics, events and episodes of one run.

    What ``mark`` cut from an earlier run's files stands in ``cut``.
    """

    def __init__(
        self,
        out: Path,
        *,
        steps: int | None = None,
        first_step: int = 0,
        tensorboard: bool = True,
        wandb: str = "",
        console: bool = True,
        config: Mapping[str, Any] | None = None,
        mark: Mapping[str, Any] | None = None,
        of: str = "",
    ) -> None:
        """Open the run's files and its display.

        Args:
            out: the run's folder.
            steps: the run's length, for the display.
            first_step: the step that it goes on from, for the display.
            tensorboard: write the metrics for TensorBoard too.
            wandb: a W&B project (or ``entity/project``); empty for none.
            console: show progress.
            config: the run's settings, for W&B.
            mark: cut an earlier run's files back to what ``Tracker.mark`` said ({}: to nothing) and go on from there;
                None appends to whatever there is.
            of: what the lines are of that stay then, of shards that are not whole.

        Raises:
            ArealError: where the files cannot be written or do not fit the mark.
            ConfigError: without the wandb package.
        """
        if wandb:
            require_wandb()  # before a file is touched
        self.out = out
        self._metrics, self._events = out / "metrics.jsonl", out / "events.jsonl"
        self._board: Board | None = None
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path in (self._metrics, self._events):
                cut_torn_line(path)
            self.cut: Cut | None = None if mark is None else cut_back(out, mark, of=of)
            self._open_board(tensorboard)
        except OSError as error:
            raise unwritable(out, error) from error
        self._writer = Writer()
        self.trajectories = TrajectoryWriter(out, self._writer)
        self._display = display.display(steps, first_step) if console else display.Silent()
        self._wandb: WandbLog | None = None
        if self.cut is not None:
            self.event("cut_back", **self.cut.to_json())
        if wandb:
            kept = [point_of(row) for row in self._rows()]
            again = self.cut is not None and not self.cut.rows
            self._wandb = WandbLog(
                out, wandb, config=config or {}, rows=kept, go_on=again,
                started=lambda where: self.message(f"W&B: {where}"), failed=self._wandb_failed,
            )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float], *, kind: str = "train", show: bool = True) -> None:
        """Record ``metrics`` of ``step``, and show them on the display.

        NaN and infinities are written as null. ``time`` is the wall clock, for people: rows are in the order of the
        calls, whatever that clock does.

        Args:
            step: the step; 0 before the first update.
            metrics: values by name.
            kind: what they measure, such as ``train``.
            show: False records them only.

        Raises:
            ValueError: for a metric named kind, step or time.
            ArealError: if an earlier write failed.
        """
        if taken := RESERVED & metrics.keys():
            raise ValueError(f"metric names {sorted(taken)} are reserved: rename them")
        values = {name: float(value) for name, value in metrics.items()}
        row: dict[str, Any] = {"kind": kind, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}

        def write() -> None:
            # W&B gets a row that the file has, so that it never knows more than a resumed run.
            self._writer.append(self._metrics, json.dumps(row, ensure_ascii=False, allow_nan=False))
            self._publish(point_of(row))

        self._writer.submit(write)
        if show:
            self._display.show(int(step), values, kind)

    def event(self, kind: str, **fields: Any) -> None:
        """Append what happened, and when, to the run's event log.

        Values that JSON lacks are written as text.
        """
        self._writer.submit(self._event_job(kind, fields))

    def start_clock(self) -> None:
        """Count the time left from here, because the first step starts now."""
        self._display.start_clock()

    def message(self, text: str) -> None:
        """Show a line to the person watching, above the progress display."""
        self._display.line(text)

    def flush(self) -> None:
        """Wait until all files hold everything logged so far.

        Raises ArealError if a write failed.
        """
        self._writer.call(lambda: None)

    def mark(self) -> dict[str, Any]:
        """Return where the files end now, for ``Tracker(mark=...)``.

        Everything logged so far is then safe on the disk. The mark is JSON-able. Raises ArealError if a write ever
        failed.
        """

        def measure() -> dict[str, Any]:  # one place in the queue, whoever else logs meanwhile
            if self._writer.failure is not None:  # whoever was told: no mark may be taken over the hole it left
                raise self._writer.failure
            self._writer.sync()
            sync(self.out)
            size = self._metrics.stat().st_size if self._metrics.exists() else 0
            return {"metrics_bytes": size, "shards": spans(self.trajectories.written)}

        return self._writer.call(measure)

    def close(self) -> None:
        """End the display and the files.

        A second call does nothing. Raises ArealError if a write failed.
        """
        if not self._writer.open:
            return
        try:
            if self._wandb is not None:
                with suppress(ArealError):  # the files' own error is raised below, by their `close`
                    # Rows reach W&B through the writing thread: all of them are there before it is told to end.
                    self._writer.call(lambda: None)
                self._wandb.close()
        finally:
            self._display.close()
            if self._board is not None:
                self._writer.put(self._board.close)
            self._writer.close()

    def _event_job(self, kind: str, fields: Mapping[str, Any]) -> Callable[[], None]:
        row = {"kind": kind, "time": round(time.time(), 3), **fields}
        return lambda: self._writer.append(self._events, json.dumps(row, ensure_ascii=False, default=str))

    def _wandb_failed(self, reason: str) -> None:
        """Note W&B's failure.

        It is called on W&B's thread, so it leaves an earlier write's error to the next caller.
        """
        self._writer.put(self._event_job("wandb_failed", {"error": reason}))
        self.message(f"warning: W&B gets nothing more from this run: {reason}")

    def _publish(self, point: Point) -> None:
        if self._board is not None:
            try:
                self._board.add(point)
            except OSError as error:
                raise unwritable(self.out / "tensorboard", error) from error
        if self._wandb is not None:
            self._wandb.log(point)

    def _open_board(self, tensorboard: bool) -> None:
        """Write all rows there are to a new event file.

        Where TensorBoard is off, it does so only to replace old files.
        """
        folder = self.out / "tensorboard"
        if tensorboard or event_files(folder):
            board = Board(folder, map(point_of, self._rows()))
            if tensorboard:
                self._board = board
            else:
                board.close()

    def _rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.out) if self._metrics.exists() else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.close()
        except ArealError as late:
            if error is None:
                raise
            if str(late) not in str(error):  # a full disk fails each write in the same way
                error.add_note(str(late))  # what ended the run stays the error that is raised


def read_metrics(out: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the rows of ``OUT/metrics.jsonl``, of one kind or all.

    A last line cut short is left out.
    """
    with (out / "metrics.jsonl").open(encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file if line.endswith("\n")]
    return [row for row in rows if kind is None or row["kind"] == kind]


def point_of(row: Mapping[str, Any]) -> Point:
    """Take a row of metrics.jsonl apart into kind, step, wall time and its finite values."""
    values = {name: value for name, value in row.items() if name not in RESERVED and value is not None}
    return row["kind"], row["step"], row["time"], values
