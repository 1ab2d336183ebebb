"""The background thread that writes a run's files.

An error there (a full disk) is raised by the next call.
"""

from __future__ import annotations

import io
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from areal_agents.errors import ArealError
from areal_agents.utils.files import append_whole, unwritable

T = TypeVar("T")


class Writer:
    """A thread that runs jobs, in the order of the calls."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._files: dict[Path, io.FileIO] = {}
        self._error: Exception | None = None
        self.failure: Exception | None = None
        """The first write that failed, also after it was raised."""
        self._thread = threading.Thread(target=self._work, name="areal-track", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` after all before it.

        Raises ArealError if one of those failed.
        """
        self._raise()
        self._jobs.put(job)

    def put(self, job: Callable[[], None]) -> None:
        """Run ``job`` as ``submit`` does, for threads that must not be told of an earlier error."""
        self._jobs.put(job)

    def call(self, job: Callable[[], T]) -> T:
        """Run ``job`` after all before it, wait, and return what it returns.

        Raises ArealError if a write failed, or the writer is closed.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)
                raise

        self.put(run)
        # In short waits: a closed writer runs no job, and this would wait for ever.
        while not done.done():
            with suppress(TimeoutError):
                done.exception(timeout=0.5)
            if not done.done() and not self.open:
                raise ArealError("the tracker is closed: log before its `close`")
        self._raise()
        return done.result()

    def sync(self) -> None:
        """Put all files' lines on the disk.

        For use inside ``call``.
        """
        for path, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise unwritable(path, error) from error

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()
        for file in self._files.values():
            file.close()  # unbuffered: nothing is left to write
        self._files.clear()
        self._raise()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - kept, and raised in the caller's thread by the next call
                self._error = self._error or error
                self.failure = self.failure or error

    def append(self, path: Path, line: str) -> None:
        """Append one line, whole or not at all.

        For use inside jobs.
        """
        try:
            file = self._files.get(path)
            if file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = self._files[path] = io.FileIO(path, "a")
            # A lone surrogate out of a model's text becomes \udXXX, which is JSON's own escape for it.
            append_whole(file, (line + "\n").encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise unwritable(path, error) from error

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            own = isinstance(error, ArealError)
            said = str(error) if own else f"the run's files cannot be written: {type(error).__name__}: {error}"
            raise ArealError(said) from error
