"""The display of a run while it goes on: a live bar on a terminal, one line a step elsewhere.

Durations and the time left come from a monotonic clock: setting the wall clock back changes neither.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

SHOWN = (
    ("reward", "reward {:.3f}"),
    ("valid_call_rate", "valid {:.2f}"),
    ("age", "age {:.2f}"),
    ("queue", "queue {:.0f}"),
    ("tokens_per_second", "{:.0f} tok/s"),
)
"""Metrics of kind ``train`` that the display shows where they are logged, with their formats."""
FINETUNED = (
    ("loss", "loss {:.4f}"),
    ("accuracy", "accuracy {:.2f}"),
    ("margin", "margin {:.3f}"),
    ("tokens_per_second", "{:.0f} tok/s"),
)
"""Those of a fine-tuning."""
NOTED = (
    ("unverifiable", "unverifiable {:.0f}"),
    ("verdict_timeouts", "verdict timeouts {:.0f}"),
    ("sandbox_replays", "sandbox replays {:.0f}"),
    ("withheld", "cut answers unpaid {:.0f}"),
    ("rewritten", "histories rewritten {:.0f}"),
)
"""Metrics that it shows where they are not 0."""
STEPS = ("train", "sft", "dpo")
"""The kinds whose rows are a run's steps."""


def summary(values: Mapping[str, float], kind: str) -> str:
    """Write out the numbers that are worth a line.

    They are those of ``SHOWN`` and ``NOTED`` for training, of ``FINETUNED`` for fine-tuning, and all of them
    otherwise.
    """
    if kind in (*STEPS[1:], "holdout"):
        return "  ".join(text.format(values[name]) for name, text in FINETUNED if name in values)
    if kind == "train":
        shown = [text.format(values[name]) for name, text in SHOWN if name in values]
        return "  ".join(shown + [text.format(values[name]) for name, text in NOTED if values.get(name)])
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def plain(text: str) -> str:
    """Make ``text`` safe for a terminal.

    Control, format and other unprintable characters become escapes. Newlines are kept.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def clock(seconds: float) -> str:
    """Write a duration in seconds as ``2:05`` or ``1:02:05``."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def plain_line(step: int, steps: int | None, values: Mapping[str, float], kind: str, seconds_a_step: float) -> str:
    """Write one line for a display that is no terminal.

    Args:
        step: the step that has ended.
        steps: the run's length; None where it is not known.
        values: the step's metrics by name.
        kind: of ``STEPS``, or what else was measured.
        seconds_a_step: for the estimate of the time left.
    """
    if kind not in STEPS:
        return f"{kind} at step {step}  {summary(values, kind)}"
    if steps is None:
        return f"step {step}  {summary(values, kind)}"
    return f"step {step}/{steps}  {summary(values, kind)}  ETA {clock(seconds_a_step * (steps - step))}"


class Silent:
    """A display that shows nothing."""

    def show(self, step: int, values: Mapping[str, float], kind: str) -> None: ...
    def line(self, text: str) -> None: ...
    def start_clock(self) -> None: ...
    def close(self) -> None: ...


class Plain(Silent):
    """A display of one printed line a step, for logs and pipes."""

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


class Bar(Silent):
    """A live bar with the time left and the latest numbers.

    Numbers of other kinds than training are printed above it.
    """

    def __init__(self, steps: int | None, first_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns, TextColumn("ETA"), Remaining(), TextColumn("{task.fields[numbers]}"), get_time=time.monotonic
        )
        self._task = self._bar.add_task("training", total=steps, completed=first_step, numbers="")
        self._first_step = first_step
        self._bar.start()

    def start_clock(self) -> None:
        self._bar.reset(self._task, completed=self._first_step)

    def show(self, step: int, values: Mapping[str, float], kind: str) -> None:
        if kind in STEPS:
            self._bar.update(self._task, completed=step, numbers=summary(values, kind))
        else:
            self.line(plain_line(step, None, values, kind, 0.0))

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def display(steps: int | None, first_step: int) -> Silent:
    """Choose the bar where standard output is a terminal, else lines."""
    return Bar(steps, first_step) if sys.stdout.isatty() else Plain(steps, first_step)
