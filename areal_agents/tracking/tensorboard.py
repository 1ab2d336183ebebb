"""A run's metrics for TensorBoard.

Measured with TensorBoard 2.21 and 300 writers on a tmpfs of 64 KiB: where the disk is full, opening a writer, or the
flush behind a row, raises OSError, and so does every later call. None of them hangs, and what was flushed before stays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

Point = tuple[str, int, float, Mapping[str, float]]
"""Kind, step, wall time (seconds since 1970) and values of one log call."""


class Board:
    """A new event file in ``folder`` with ``points`` in it, instead of the event files that were there.

    Raises OSError.
    """

    def __init__(self, folder: Path, points: Iterable[Point] = ()) -> None:
        # Imported here: torch takes seconds, and only runs need it.
        from torch.utils.tensorboard import SummaryWriter

        old = event_files(folder)
        # A step of 0, and all points anew: a viewer that is open forgets every point before them. Steps cannot say what
        # was cut, since each kind counts its own.
        self._writer = SummaryWriter(str(folder), purge_step=0)
        for point in points:
            self._write(point)
        self._writer.flush()
        for path in old:
            # Emptied and not removed: a viewer that reads this file would never turn to the next one.
            os.truncate(path, 0)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # nothing is left to write: `add` has raised what the writer raises again here
            self._writer.close()

    def add(self, point: Point) -> None:
        """Write finite values as scalars ``KIND/NAME``.

        They are in the file on return. Raises OSError.
        """
        self._write(point)
        self._writer.flush()  # the writer's own thread does the writing: only this waits for it and says how it went

    def _write(self, point: Point) -> None:
        kind, step, wall_time, values = point
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, step, walltime=wall_time)


def event_files(folder: Path) -> list[Path]:
    """List the event files of ``folder``."""
    return sorted(folder.glob("events.out.tfevents.*"))
