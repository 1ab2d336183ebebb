"""The process of a reward model, which all episodes that play in one process share.

    submit ─▶ queue ─▶ one thread: takes what waits as a batch ─▶ worker process ─▶ replies
                                        └─ gone: started again, the batch is scored again, one by one
                                        └─ no reply in time: killed, InfraError, started again

Waits for / unblocked by: a future waits for the batches before it, and is unblocked by a reply, by the deadline of its
batch, or by ``close``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import areal_agents
from areal_agents.errors import ConfigError, InfraError, ModelError
from areal_agents.utils.short_text import described

_MAX_LOST = 3
"""Processes that one conversation may end before it is given up."""
Rows = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker is started with."""

    folder: str
    cuts: bool = False
    """Whether the middle of what is too long is left out."""
    softmax: bool = False
    """Whether a label's probability among several is asked for."""
    label: str | None = None
    """The output that is the reward. A model of one output needs none."""
    max_tokens: int | None = None
    """Of a conversation. None is the model's positions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    """Where it computes, as torch names it."""
    threads: int = 1
    batch: int = 16
    """Most conversations at once."""
    deadline: float = 30.0
    """Seconds for a batch."""
    start_seconds: float = 300.0
    """Seconds that loading may take."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"reward_model: unknown precision {self.precision!r}: there are fp32, bf16")
        for name, value in (("threads", self.threads), ("batch", self.batch), ("max_tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"reward_model: {name} must be at least 1, got {value}")
        if not (self.deadline > 0 and self.start_seconds > 0):
            raise ConfigError("reward_model: deadline and start_seconds must be over 0 seconds")


@dataclass(eq=False, slots=True)
class _Job:
    rows: Rows
    future: Future[dict[str, Any]] = field(default_factory=Future)
    lost: int = 0


class _Lost(Exception):
    """The worker's process ended."""


class ModelServer:
    """One worker process, started when it is first needed. It may be used from several event loops and threads."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.replaced = 0
        """Processes that were killed or lost."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._index = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The worker's process id. None where none runs."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def submit(self, rows: Rows) -> Future[dict[str, Any]]:
        """Queue a conversation.

        The future's result is {tokens, left_out, logits, index}, with ``long`` in place of logits for one that is too
        long, or {error}. It raises InfraError, or ModelError where the folder cannot be used.
        """
        job = _Job(rows)
        with self._guard:
            if self._closed:
                raise InfraError("the reward model's server was closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="reward-model", daemon=True)
                self._thread.start()
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """End the worker. What waits gets an InfraError. May be called twice."""
        with self._guard:
            closed, self._closed = self._closed, True
            thread, process = self._thread, self._process
        if closed:
            return
        self._jobs.put(None)
        if process is not None:
            process.kill()  # the thread sees its end
        if thread is not None:
            thread.join(10)
        self._end()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            ended = False
            while len(jobs) < self.settings.batch:
                try:
                    more = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    ended = True
                    break
                jobs.append(more)
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            try:
                self._serve(running)
            except Exception as error:  # noqa: BLE001  a boundary: this thread serves every other call too
                self._end()  # what else the worker wrote would be taken for the next reply
                failed = InfraError(f"the reward model gave no score: {described(error)}")
                failed.__cause__ = error
                for job in running:
                    if not job.future.done():
                        job.future.set_exception(failed)
            if ended:
                return

    def _serve(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        try:
            replies = self._exchange([job.rows for job in jobs])
        except _Lost as error:
            self.replaced += 1
            for job in jobs:
                job.lost += 1
                if self._closed or job.lost >= _MAX_LOST:
                    why = "the server was closed" if self._closed else f"{error}, {job.lost} times"
                    job.future.set_exception(InfraError(f"the reward model gave no score: {why}"))
                else:
                    self._serve([job])  # alone: a conversation that ends its worker takes no other one with it
        except (InfraError, ModelError) as error:
            for job in jobs:
                job.future.set_exception(error)
        else:
            for job, reply in zip(jobs, replies, strict=True):
                job.future.set_result(reply | {"index": self._index})

    def _exchange(self, batch: Sequence[Rows]) -> list[dict[str, Any]]:
        """Let the worker score a batch. Raises _Lost where it ended, InfraError where it was killed for its time."""
        process = self._process
        if process is None or process.poll() is not None:
            if process is not None:
                self.replaced += 1  # it ended while nobody asked
            process = self._start()
        reply = self._ask(process, {"batch": batch}, self.settings.deadline)
        if reply is None:
            self._end()
            self.replaced += 1
            raise InfraError(
                f"the reward model gave no scores for {len(batch)} conversations within {self.settings.deadline:g} s "
                "(deadline): its process was killed"
            )
        scores: list[dict[str, Any]] = reply["scores"]
        return scores

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        root = str(Path(areal_agents.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "areal_agents.rewards.learned.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(self.settings.threads)},
            start_new_session=True,  # Ctrl-C is the run's
        )
        with self._guard:
            self._process = process
            closed = self._closed
        if closed:
            self._end()
            raise InfraError("the reward model's server was closed")
        try:
            ready = self._ask(process, asdict(self.settings), self.settings.start_seconds)
        except _Lost as error:
            raise InfraError(f"the reward model did not start: {error}") from error
        if ready is None:
            self._end()
            raise InfraError(f"the reward model was not ready within {self.settings.start_seconds:g} s")
        if "refused" in ready:
            self._end()
            raise ModelError(f"reward model: {ready['refused']}")
        self._index = int(ready["index"])
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the reply, or None where there is none in time. Raises _Lost where the process ended."""
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, seconds)
        except (BrokenPipeError, EOFError) as error:
            code = process.wait()
            self._end()
            raise _Lost(f"its process ended with exit code {code}: its message stands on stderr") from error
        reply: dict[str, Any] | None = None if line is None else json.loads(line)
        return reply

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        assert process.stdout is not None
        end = time.monotonic() + seconds
        poller = select.poll()
        poller.register(process.stdout, select.POLLIN)
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _end(self) -> None:
        with self._guard:
            process, self._process, self._read = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


_shared: dict[tuple[int, WorkerSettings], ModelServer] = {}
_sharing = threading.Lock()


def shared_server(settings: WorkerSettings) -> ModelServer:
    """Return the server of this process with these settings, which is closed at its end."""
    key = (os.getpid(), settings)
    with _sharing:
        if key not in _shared:
            _shared[key] = server = ModelServer(settings)
            atexit.register(server.close)
        return _shared[key]
