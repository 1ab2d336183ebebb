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
        self._made = [folder for folder in path.parents if not folder.exists()]
        try:
            while True:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = io.FileIO(path, "a")
                self._lock()
                if _is_at(path, self._file):
                    break
                self._file.close()  # its last writer ended between the two, and removed it
            before = path.stat().st_size
            cut_torn_line(path)
            self.torn = path.stat().st_size < before
            sync(path.parent)
        except OSError as error:
            refused = unwritable(path, error)  # before what was made goes, which makes room
            with contextlib.suppress(AttributeError):  # it was not even opened
                self.close()
            self._remove_folders()
            raise refused from error

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(
                f"{self.path} is being written by another process: wait for its end, or choose another folder"
            ) from error
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"the file system of {self.path} has no locks ({error.strerror or error}): choose another --out"
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

    def empty(self) -> None:
        """Remove all episodes.

        Raises ArealError where the file cannot be written.
        """
        try:
            self._file.truncate(0)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file, and remove one without an episode, with the folders that were made for it.

        May be called twice.
        """
        if not self._file.closed and not os.fstat(self._file.fileno()).st_size:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._remove_folders()
        self._file.close()

    def _remove_folders(self) -> None:
        """Remove the folders that were made for the file, the deepest first, as far as nothing is in them."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def says_of(path: Path) -> str:
    """Return what the first readable line of a journal says that it is of; empty where none does.

    Raises OSError.
    """
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                if isinstance(row := json.loads(line), dict) and (of := row.get("of")):
                    return str(of)
    return ""


def _is_at(path: Path, file: io.FileIO) -> bool:
    """Say whether the open ``file`` is still the one that ``path`` names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _number(value: Any) -> Any:
    """Return NumPy's numbers and booleans as Python's own."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
