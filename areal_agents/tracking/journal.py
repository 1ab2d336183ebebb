"""The episodes of a shard that is not whole yet, on the disk one by one, as they end.

    append ──▶ OUT/trajectories/KIND/step-000000.jsonl ──write_shard──▶ step-000000.parquet, and the lines go

Each line is on the disk when ``append`` returns. A process that is killed leaves at most a last line without its end,
which ``open`` cuts off.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from areal_agents.errors import ArealError, ConfigError
from areal_agents.tracking.trajectories import Record, read_shard, row_of
from areal_agents.utils.files import append_whole, cut_torn_line, sync, unwritable

try:
    import fcntl
except ImportError:  # Windows has no such locks: two processes on one folder are then the user's to avoid
    fcntl = None  # type: ignore[assignment]


class Journal:
    """The lines of one shard, which one process at a time may write.

    It is a context manager.
    """

    def __init__(self, path: Path) -> None:
        """Open the file for appending, and cut off a last line without its end.

        Raises ConfigError while another process writes it, and ArealError where it cannot be written.
        """
        self.path = path
        self.torn = False
        """Whether a line was cut off."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(path, "a")
            self._lock()
            before = path.stat().st_size
            cut_torn_line(path)
            self.torn = path.stat().st_size < before
            sync(path.parent)
        except OSError as error:
            raise unwritable(path, error) from error

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(
                f"{self.path} is being written by another process: wait for its end, or choose another --out"
            ) from error

    def append(self, record: Record, **beside: Any) -> None:
        """Write one episode, whole or not at all, with what else its line is to hold.

        Raises ArealError where it cannot be written, or holds a value that cannot be stored.
        """
        try:
            line = json.dumps(row_of(record) | beside, ensure_ascii=False, default=_number)
        except (TypeError, ValueError) as error:
            raise ArealError(f"{self.path}: an episode holds a value that cannot be stored: {error}") from error
        try:
            append_whole(self._file, (line + "\n").encode("utf-8", "backslashreplace"))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def take_over(self, shard: Path) -> None:
        """Write the episodes of ``shard`` as lines, which take its place.

        Lines that are there already are the shard's own, and go. Raises ArealError as ``append`` does.
        """
        records = read_shard(shard)
        try:
            self._file.truncate(0)
            for record in records:
                self.append(record)
            shard.unlink()  # last: until then the shard is what is read
            sync(shard.parent)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file, and remove one without an episode.

        May be called twice.
        """
        if not self._file.closed and not os.fstat(self._file.fileno()).st_size:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()  # where nothing else is in it
                self.path.parent.parent.rmdir()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _number(value: Any) -> Any:
    """Return NumPy's numbers and booleans as Python's own."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
