"""Verifier processes that all episodes of a host share, and that a deadline ends.

    verify() ─▶ cache? ─▶ bounded queue ─▶ a thread for each worker process ─▶ reply
                                              └─ deadline passed, or process gone: killed, and another is forked

SymPy cannot be interrupted inside one process: a signal reaches the main thread alone, and a thread cannot be killed.
So each answer is verified in a process of its own kind, with bounded memory. A worker that is killed by somebody else
costs nothing: its answer is verified again. An answer that ends its worker twice has itself to blame. An exception that
nobody expected is told as what it is, and ends no worker.

Waits for / unblocked by: ``verify`` waits for a place in the queue, and is unblocked by a verdict or by its deadline,
which starts when a worker takes the answer up.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import queue
import select
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from areal_agents.errors import ConfigError, InfraError
from areal_agents.rewards.mathematics.extract import SLOTS, Slot
from areal_agents.rewards.mathematics.fork_server import Forked, ForkServer
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verdict import VERSION, MathVerdict, Status

MAX_TEXT = 1 << 16
"""Characters at the end of a model's text that are looked at. The answer stands there."""
_CACHED = 1 << 14
_CLOSED = MathVerdict("infra_error", "the verifier was closed")


class MathPool:
    """Worker processes, started when they are first needed.

    It may be used from several event loops and threads.
    """

    def __init__(self, workers: int | None = None, *, deadline: float = 5.0, waiting: int = 4096) -> None:
        """Start nothing yet.

        Args:
            workers: processes at once. None is one for each two cores.
            deadline: seconds for one answer.
            waiting: answers that may wait. More wait outside, in ``verify``.
        """
        self.workers = workers if workers is not None else max(1, (os.cpu_count() or 2) // 2)
        if self.workers < 1 or not deadline > 0:
            raise ConfigError(f"workers = {workers} must be at least 1 and deadline = {deadline} over 0 seconds")
        self.deadline = deadline
        self.replaced = 0
        """Workers that were killed or lost."""
        self.raised = Counter[str]()
        """Exceptions that nobody expected of SymPy, by their kind. Their answers are ``parse_error``."""
        self._room = threading.BoundedSemaphore(waiting)
        self._server = ForkServer()
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._idle.put(Worker(self._server))
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="verifier")
        self._cache: OrderedDict[tuple[Any, ...], MathVerdict] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    async def verify(
        self, gold: str | Sequence[str], pred: str, *, slot: Slot = "answer", options: Options | None = None
    ) -> MathVerdict:
        """Compare an answer with the gold one, as ``verify.verify`` does, within the deadline.

        Args:
            gold: the right answer, or several of which one suffices.
            pred: what the model wrote. Its last ``MAX_TEXT`` characters are looked at.
            slot: where in it the answer stands.
            options: what counts as equal beyond exact mathematics.
        """
        if slot not in SLOTS:
            raise ConfigError(f"unknown slot {slot!r}: there are {', '.join(SLOTS)}")
        return await self._verdict(gold, pred[-MAX_TEXT:], slot, options)

    async def look(self, gold: str | Sequence[str], *, options: Options | None = None) -> MathVerdict:
        """Say whether a gold answer can be read, as ``verify.look`` does, within the deadline."""
        return await self._verdict(gold, None, "answer", options)

    async def _verdict(
        self, gold: str | Sequence[str], pred: str | None, slot: Slot, options: Options | None
    ) -> MathVerdict:
        golds = (gold,) if isinstance(gold, str) else tuple(gold)
        key = (VERSION, golds, pred, slot, options or Options())
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        if self._closed:
            return _CLOSED
        while not self._room.acquire(blocking=False):  # noqa: ASYNC110  the room belongs to several event loops
            await asyncio.sleep(0.01)
        try:
            with self._lock:  # which close() takes
                if self._closed:
                    return _CLOSED
                asked = self._threads.submit(self._verified, key)
            verdict = await asyncio.wrap_future(asked)
        finally:
            self._room.release()
        if verdict.status not in ("timeout", "infra_error"):  # which another moment may spare
            with self._lock:
                self._cache[key] = verdict
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
        return verdict

    def close(self) -> None:
        """End every worker. Answers that wait get ``infra_error``."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=True)  # one that waits finds the pool closed; cancelled, its episode would be
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().end()
        self._server.close()

    def _verified(self, key: tuple[Any, ...]) -> MathVerdict:
        """Ask a worker, and another one where the first is lost."""
        _, golds, pred, slot, options = key
        request = {"gold": golds, "pred": pred, "slot": slot, "options": asdict(options), "seconds": self.deadline}
        if self._closed:
            return _CLOSED
        start = time.monotonic()
        worker = self._idle.get()
        try:
            for _ in range(2):
                try:
                    reply = worker.ask(request, self.deadline)
                except Lost:
                    self.replaced += 1
                    continue
                except InfraError as error:
                    return MathVerdict("infra_error", str(error))
                if reply is None:
                    self.replaced += 1
                    return MathVerdict("timeout", f"not verified within {self.deadline:g} s", _since(start))
                if raised := reply.get("raised", ""):
                    with self._lock:
                        self.raised[raised] += 1
                return MathVerdict(cast(Status, reply["status"]), reply["detail"], _since(start), raised)
            return MathVerdict("timeout", "it ended the verifier's process twice", _since(start))
        finally:
            self._idle.put(worker)


class Lost(Exception):
    """The worker's process ended while it was asked."""


class Worker:
    """One process, replaced when it is asked after its end. One thread uses it at a time."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self._forked: Forked | None = None
        self._read = b""

    @property
    def pid(self) -> int | None:
        return self._forked.pid if self._forked else None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the reply, or None where there is none in time: the process is then killed.

        Raises Lost where it ended or somebody stopped it, InfraError where none can be started.
        """
        if self._forked is not None and _is_readable(self._forked.socket, 0):  # it says nothing unasked, but its end
            self.end()
        if self._forked is None:
            self._forked = self._server.fork()
        end = time.monotonic() + seconds
        try:
            line = self._exchanged(self._forked.socket, json.dumps(request).encode() + b"\n", end)
        except (OSError, EOFError) as error:
            self.end()
            raise Lost from error
        if line is None:
            stopped = _is_stopped(self._forked.pid)
            self.end()
            if stopped:
                raise Lost
            return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def end(self) -> None:
        forked, self._forked, self._read = self._forked, None, b""
        if forked is not None:
            self._server.end(forked)

    def _exchanged(self, worker: socket.socket, request: bytes, end: float) -> bytes | None:
        """Write a request and read one line, or None after ``end``. Raises EOFError where the process has ended."""
        try:
            worker.settimeout(max(1e-3, end - time.monotonic()))
            worker.sendall(request)  # a socket holds less than a long answer
        except TimeoutError:
            return None
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not _is_readable(worker, left):
                return None
            chunk = worker.recv(1 << 16)
            if not chunk:
                raise EOFError
            self._read += chunk
        line, _, self._read = self._read.partition(b"\n")
        return line


def _is_readable(worker: socket.socket, seconds: float) -> bool:
    poller = select.poll()
    poller.register(worker, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _is_stopped(pid: int) -> bool:
    """Say whether a signal stopped a process (SIGSTOP), so that its silence is not the answer's fault."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")


_shared: tuple[int, MathPool] | None = None
_guard = threading.Lock()


def shared_pool() -> MathPool:
    """Return the pool of this process, which is closed at its end."""
    global _shared
    with _guard:
        if _shared is None or _shared[0] != os.getpid():
            pool = MathPool()
            atexit.register(pool.close)
            _shared = os.getpid(), pool
        return _shared[1]


def _since(start: float) -> float:
    return round(1000 * (time.monotonic() - start), 3)
