"""TensorBoard event files, written in the caller's thread: a failed write is an OSError there.

(TensorBoard's own writer does it on another thread, where a full disk ends that thread and its flush never returns.)
"""

from __future__ import annotations

import io
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_agents.utils.files import append_whole

Point = tuple[str, int, float, Mapping[str, float]]
"""Kind, step, wall time (seconds since 1970) and values of one log call."""


class _File:
    """What TensorBoard's record writer needs of a file: each record is in it whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "x")

    def write(self, data: bytes) -> None:
        append_whole(self._file, data)

    def close(self) -> None:
        self._file.close()


class Board:
    """One new event file in ``folder``, with ``points`` in it; the files it ``replaces`` are empty once it is there.

    Raises OSError.
    """

    def __init__(self, folder: Path, points: Iterable[Point] = (), *, replaces: Sequence[Path] = ()) -> None:
        # Imported here: half a second, and only runs need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files by name: a new one sorts behind all there are, even if the clock was set back.
        stamps = [int(p.name.split(".")[3]) for p in event_files(folder) if p.name.split(".")[3].isdigit()]
        stamp = max([int(time.time()), *(s + 1 for s in stamps)])
        name = f"events.out.tfevents.{stamp:010}.{socket.gethostname()}.{os.getpid()}.0"
        self._event = Event
        self._file = _File(folder / name)
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if replaces or not stamps:
            # The first of these marks in a folder does nothing; at a later one a viewer forgets every point before it.
            self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        for point in points:
            self.add(point)
        for path in replaces:
            # Emptied and not removed: a viewer that reads this file would never turn to the next one.
            os.truncate(path, 0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, point: Point) -> None:
        """Write finite values as scalars ``KIND/NAME``; they are in the file on return. Raises OSError."""
        from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_FLOAT

        kind, step, wall_time, values = point
        event = self._event(wall_time=wall_time, step=step)
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        for name, value in values.items():
            if math.isfinite(value):
                tensor = TensorProto(dtype=DT_FLOAT, float_val=[value], tensor_shape={})
                metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_SCALAR)
                event.summary.value.add(tag=f"{kind}/{name}", tensor=tensor, metadata=metadata)
        if event.summary.value:
            self._write(event)

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def event_files(folder: Path) -> list[Path]:
    """The event files of ``folder``."""
    return sorted(folder.glob("events.out.tfevents.*"))
