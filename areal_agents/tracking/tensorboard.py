"""A run's metrics for TensorBoard, as records that its own library makes and frames.

The file is written here and not by ``SummaryWriter``, which names its file after the clock. A viewer that is open turns
to a file only where its name sorts behind the one it reads. Where the clock was set back, it would stop for good.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Point = tuple[str, int, float, Mapping[str, float]]
"""Kind, step, wall time (seconds since 1970) and values of one log call."""


class Board:
    """A new event file in ``folder`` with ``points`` in it, instead of the event files that were there.

    Raises OSError.
    """

    def __init__(self, folder: Path, points: Iterable[Point] = ()) -> None:
        # Imported here: half a second, and only runs need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        old = event_files(folder)
        self._writer = RecordWriter((folder / _name_behind(old)).open("xb"))
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            # A start at step 0, and all points anew: a viewer that is open forgets every point before them. Steps
            # cannot say what was cut, since each kind counts its own.
            self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
            for point in points:
                self._write_point(point)
            self._writer.flush()
        except BaseException:
            self.close()
            raise
        for path in old:
            # Emptied and not removed: a viewer that reads this file would never turn to the next one.
            os.truncate(path, 0)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # nothing is left to write: `add` has raised what closing raises again here
            self._writer.close()

    def add(self, point: Point) -> None:
        """Write finite values as scalars ``KIND/NAME``.

        They are in the file on return. Raises OSError.
        """
        self._write_point(point)
        self._writer.flush()

    def _write_point(self, point: Point) -> None:
        kind, step, wall_time, values = point
        for name, value in values.items():
            if math.isfinite(value):
                scalar = self._summary.Value(tag=f"{kind}/{name}", simple_value=value)
                self._write(self._event(wall_time=wall_time, step=step, summary=self._summary(value=[scalar])))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def event_files(folder: Path) -> list[Path]:
    """List the event files of ``folder``."""
    return sorted(folder.glob("events.out.tfevents.*"))


def _name_behind(old: Iterable[Path]) -> str:
    """Return a name for an event file that sorts behind all ``old`` ones, even if the clock was set back."""
    stamps = [int(path.name.split(".")[3]) for path in old if path.name.split(".")[3].isdecimal()]
    stamp = max([int(time.time()), *(s + 1 for s in stamps)])
    return f"events.out.tfevents.{stamp:010}.{socket.gethostname()}.{os.getpid()}.0"
