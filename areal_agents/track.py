"""What a run leaves behind, and what it shows while it runs.

    OUT/metrics.jsonl               one object a log call: kind, step, time, then the metrics
    OUT/events.jsonl                one object an event: kind, time, then its fields
    OUT/trajectories/KIND.jsonl     every episode (``trajectories.py``)
    OUT/tensorboard/                the same metrics for TensorBoard

All writing happens on one background thread, in order, each line flushed, so the event loop never waits for a disk. An
error there (a full disk) is raised by the next call.
"""

from __future__ import annotations

import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from areal_agents.errors import ArealError
from areal_agents.trajectories import Record, encode, read_records, read_trajectories
from areal_agents.types import Trajectory

__all__ = ["Record", "Tracker", "TrajectoryWriter", "read_metrics", "read_records", "read_trajectories"]

SHOWN = (
    ("reward", "reward {:.3f}"),
    ("valid_call_rate", "valid {:.2f}"),
    ("age", "age {:.2f}"),
    ("queue", "queue {:.0f}"),
    ("tokens_per_second", "{:.0f} tok/s"),
)
"""Metrics of kind ``train`` that the progress display shows where they are logged, with their formats."""
RESERVED = frozenset({"kind", "step", "time"})


class _Lines:
    """Appends lines to files on a thread of its own, in the order of the calls."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._files: dict[Path, TextIO] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="areal-track", daemon=True)
        self._thread.start()

    def append(self, path: Path, line: Callable[[], str]) -> None:
        """Append what ``line()`` returns; it is called on the writing thread."""
        self.submit(lambda: self._append(path, line()))

    def submit(self, job: Callable[[], None]) -> None:
        self._raise()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until everything submitted so far is on its way to the disk."""
        done = threading.Event()
        self._jobs.put(done.set)
        while not done.wait(0.5):
            if not self._thread.is_alive():
                break
        self._raise()

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._raise()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - kept, and raised in the caller's thread by the next call
                self._error = self._error or error

    def _append(self, path: Path, line: str) -> None:
        file = self._files.get(path)
        if file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._files[path] = path.open("a", encoding="utf-8", newline="\n")
        file.write(line + "\n")
        file.flush()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise ArealError(f"the run's files cannot be written: {error}") from error


class TrajectoryWriter:
    """Appends episodes to ``OUT/trajectories/KIND.jsonl``; serialised and written off the event loop."""

    def __init__(self, folder: Path, lines: _Lines | None = None) -> None:
        self.folder = folder
        self._own = lines is None
        self._lines = lines or _Lines()

    def write(self, trajectories: Iterable[Trajectory], *, step: int, kind: str = "train") -> None:
        """One line an episode. ``kind`` names the file: ``train``, ``eval``. Raises ArealError if a write failed."""
        for trajectory in trajectories:
            self._lines.append(
                self.folder / f"{kind}.jsonl",
                lambda t=trajectory: encode(t, step=step, kind=kind),  # type: ignore[misc]
            )

    def flush(self) -> None:
        """Wait until every episode so far is in its file."""
        self._lines.flush()

    def close(self) -> None:
        if self._own:
            self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Tracker:
    """Metrics, events and episodes of one run. ``steps`` is the run's length, for the progress display."""

    def __init__(
        self,
        out: Path,
        *,
        steps: int | None = None,
        first_step: int = 0,
        tensorboard: bool = True,
        console: bool = True,
    ) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines()
        self.trajectories = TrajectoryWriter(out / "trajectories", self._lines)
        self._board: Any = None
        if tensorboard:
            # Imported here: half a second, and only runs need it.
            from tensorboard.summary import Writer

            self._board = Writer(str(out / "tensorboard"))
        self._display = _display(steps, first_step) if console else _Silent()

    def log(self, step: int, metrics: Mapping[str, float], *, kind: str = "train", show: bool = True) -> None:
        """Record ``metrics`` of ``step`` (0 before the first update), and ``show`` them on the display.

        NaN and infinities are written as null.

        Raises ValueError for a metric named kind, step or time; ArealError if an earlier write failed.
        """
        if taken := RESERVED & metrics.keys():
            raise ValueError(f"metric names {sorted(taken)} are reserved: rename them")
        values = {name: float(value) for name, value in metrics.items()}
        row: dict[str, Any] = {"kind": kind, "step": int(step), "time": round(time.time(), 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append(self.out / "metrics.jsonl", lambda: json.dumps(row, ensure_ascii=False, allow_nan=False))
        if self._board is not None:
            self._lines.submit(lambda: self._to_board(step, values, kind))
        if show:
            self._display.show(int(step), values, kind)

    def event(self, kind: str, **fields: Any) -> None:
        """Append to the run's event log: what happened, when. Values that JSON lacks are written as text."""
        row = {"kind": kind, "time": round(time.time(), 3), **fields}
        self._lines.append(self.out / "events.jsonl", lambda: json.dumps(row, ensure_ascii=False, default=str))

    def start_clock(self) -> None:
        """The first step starts now: the estimate of the time left counts from here."""
        self._display.start_clock()

    def message(self, text: str) -> None:
        """A line for the person watching, above the progress display."""
        self._display.line(text)

    def flush(self) -> None:
        """Wait until all files hold everything logged so far."""
        self._lines.flush()

    def close(self) -> None:
        """End the display and the files. Raises ArealError if a write failed. A second call does nothing."""
        if self._lines._thread.is_alive():
            self._display.close()
            if self._board is not None:
                self._lines.submit(self._board.close)
            self._lines.close()

    def _to_board(self, step: int, values: Mapping[str, float], kind: str) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_metrics(out: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of ``OUT/metrics.jsonl``, of one kind or all; a last line cut short is left out."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if kind is None or row["kind"] == kind]


# --- display -----------------------------------------------------------------------------------------------------


def summary(values: Mapping[str, float], kind: str) -> str:
    """The numbers worth a line: those of ``SHOWN`` for training, all of them otherwise."""
    if kind == "train":
        return "  ".join(text.format(values[name]) for name, text in SHOWN if name in values)
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def clock(seconds: float) -> str:
    """``2:05`` or ``1:02:05``."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def plain_line(step: int, steps: int | None, values: Mapping[str, float], kind: str, seconds_a_step: float) -> str:
    """One line of the display that is not a terminal's."""
    if kind != "train":
        return f"{kind} at step {step}  {summary(values, kind)}"
    if steps is None:
        return f"step {step}  {summary(values, kind)}"
    return f"step {step}/{steps}  {summary(values, kind)}  ETA {clock(seconds_a_step * (steps - step))}"


class _Silent:
    def show(self, step: int, values: Mapping[str, float], kind: str) -> None: ...
    def line(self, text: str) -> None: ...
    def start_clock(self) -> None: ...
    def close(self) -> None: ...


class _Plain(_Silent):
    """One printed line a step, for logs and pipes."""

    def __init__(self, steps: int | None, first_step: int) -> None:
        self._steps = steps
        self._first_step = first_step
        self._start = time.monotonic()

    def start_clock(self) -> None:
        self._start = time.monotonic()

    def show(self, step: int, values: Mapping[str, float], kind: str) -> None:
        done = max(1, step - self._first_step)
        self.line(plain_line(step, self._steps, values, kind, (time.monotonic() - self._start) / done))

    def line(self, text: str) -> None:
        print(text, flush=True)


class _Bar(_Silent):
    """A live bar with ETA and the latest numbers; other kinds are printed above it."""

    def __init__(self, steps: int | None, first_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("ETA"), Remaining(), TextColumn("{task.fields[numbers]}"))
        self._task = self._bar.add_task("training", total=steps, completed=first_step, numbers="")
        self._first_step = first_step
        self._bar.start()

    def start_clock(self) -> None:
        self._bar.reset(self._task, completed=self._first_step)

    def show(self, step: int, values: Mapping[str, float], kind: str) -> None:
        if kind == "train":
            self._bar.update(self._task, completed=step, numbers=summary(values, kind))
        else:
            self.line(plain_line(step, None, values, kind, 0.0))

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def _display(steps: int | None, first_step: int) -> _Silent:
    return _Bar(steps, first_step) if sys.stdout.isatty() else _Plain(steps, first_step)
