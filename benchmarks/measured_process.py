"""One side of a comparison: a process of its own that answers JSON lines, and the memory of its whole process tree.

    with Side("trl", [python, "trl_sides.py", "trl"]) as side:
        answer = side.ask({"steps": 3})          # waits; RuntimeError with the end of stderr where the process dies
        side.memory.peak_mib()

The other end calls ``serve``. Standard library only: a side may live in a virtual environment without this package.
Each side runs alone: nothing else may compute while one is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

TAIL = 40
"""Lines of stderr shown when a side fails."""


def tree(pid: int) -> list[int]:
    """``pid`` and all its descendants, whatever their sessions."""
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{current}/task").iterdir():
                with contextlib.suppress(OSError):
                    todo += [int(child) for child in (thread / "children").read_text().split()]
    return found


def pss_of(text: str) -> int:
    """KiB of proportional set size in the text of a ``smaps_rollup``; 0 where there is none."""
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def pss_mib(pid: int) -> float:
    """Proportional set size of ``pid`` and its descendants: a page shared by n processes counts 1/n in each."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError):  # ended meanwhile
            total += pss_of(Path(f"/proc/{member}/smaps_rollup").read_text())
    return total / 1024


class Memory(threading.Thread):
    """Samples a process tree's memory until ``close``.

    The kernel walks every page table for a sample (some 10 ms a GiB): between two samples the thread waits at least
    ``REST`` times as long as the last one took, so that at most 4 % of one core goes into looking.
    """

    REST = 25

    def __init__(self, pid: int, *, every: float = 0.25) -> None:
        super().__init__(name=f"memory-{pid}", daemon=True)
        self.samples: list[tuple[float, float]] = []
        """(time.time(), MiB)"""
        self._pid, self._every = pid, every
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.is_set():
            start = time.perf_counter()
            self.samples.append((time.time(), pss_mib(self._pid)))
            self._done.wait(max(self._every, self.REST * (time.perf_counter() - start)))

    def peak_mib(self, start: float = 0.0, end: float = float("inf")) -> float:
        """The largest sample in [start, end] (seconds since the epoch); 0 where there is none."""
        return round(max((m for t, m in list(self.samples) if start <= t <= end), default=0.0), 1)

    def close(self) -> None:
        self._done.set()
        self.join()


class Side:
    """A started side. A context manager that leaves no process behind."""

    def __init__(
        self, name: str, command: Sequence[object], *, env: dict[str, str] | None = None, memory: bool = True
    ) -> None:
        """``memory``: sample the memory of its process tree."""
        self.name = name
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=env,
            start_new_session=True,
        )
        self._memory = Memory(self._process.pid) if memory else None

    @property
    def memory(self) -> Memory:
        """Raises ValueError for a side that was started without."""
        if self._memory is None:
            raise ValueError(f"side {self.name} was started with memory=False")
        return self._memory

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises RuntimeError where the side fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            raise RuntimeError(f"side {self.name} ended with code {self._process.returncode}:\n{self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"side {self.name} failed: {answer['error']}\n{self._tail()}")
        return answer

    def _tail(self) -> str:
        self._stderr.seek(0)
        return "".join(self._stderr.readlines()[-TAIL:])

    def close(self) -> None:
        """End the process and all it started."""
        members = tree(self._process.pid)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # serve returns at the end of its input
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            for member in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            self._process.wait()
        if self._memory is not None:
            self._memory.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            for member in tree(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
        self.close()


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until the input ends. What ``handle`` raises is the answer; stray prints go to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:  # noqa: BLE001  boundary: the parent reports it and stops
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
