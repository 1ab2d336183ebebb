"""Processes in which code of other packages runs, shared by the episodes of a host and ended by a deadline.

    ask ──▶ an idle process, forked by one that has imported the package ──▶ reply
                 └ deadline passed: killed, and another is forked for the next request

They are for code that one trusts, given texts that one does not: they have the user's rights and are no sandbox.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

from areal_agents.errors import InfraError
from areal_agents.rewards.mathematics.fork_server import ForkServer
from areal_agents.rewards.mathematics.pool import Lost, Worker


class Late(Exception):
    """A request took longer than it may, or more memory: its process was killed, or ended twice."""


class WorkerPool:
    """Processes of one module, started when they are first needed. Threads and event loops may share it."""

    def __init__(
        self,
        module: str,
        what: str,
        *,
        workers: int | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start nothing yet.

        Args:
            module: run as ``__main__``, which calls ``worker.serve``.
            what: begins the messages.
            workers: processes at once. None is one for each two cores.
            environment: variables of the processes, over those of this one.
        """
        self.what = what
        self._server = ForkServer(module, what, environment)
        count = workers if workers is not None else max(1, (os.cpu_count() or 2) // 2)
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._all = [Worker(self._server) for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="foreign")

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the reply. It waits for an idle process, whose deadline then begins.

        Raises:
            Late: there was no reply in time, or the request ended its process twice.
            InfraError: no process can be started.
        """
        worker = self._idle.get()
        try:
            for _ in range(2):
                try:
                    reply = worker.ask({**request, "seconds": seconds}, seconds)
                except Lost:  # perhaps ended by somebody else: once more
                    continue
                if reply is None:
                    raise Late(f"{self.what} did not answer within {seconds:g} s")
                return reply
            raise Late(f"{self.what} ended twice at one request")
        finally:
            self._idle.put(worker)

    async def asked(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the reply as ``ask`` does, without holding the event loop."""
        try:
            submitted = self._threads.submit(self.ask, request, seconds)
        except RuntimeError as error:
            raise InfraError(f"{self.what} was closed") from error
        return await asyncio.wrap_future(submitted)

    def close(self) -> None:
        """End every process, once what runs has ended."""
        self._threads.shutdown(wait=True)
        for worker in self._all:
            worker.end()
        self._server.close()


_shared: dict[tuple[int, str], WorkerPool] = {}
_guard = threading.Lock()


def shared_pool(module: str, what: str, environment: Mapping[str, str] = MappingProxyType({})) -> WorkerPool:
    """Return this process's pool of a module, which is closed at its end."""
    key = os.getpid(), module
    with _guard:
        if key not in _shared:
            _shared[key] = pool = WorkerPool(module, what, environment=environment)
            atexit.register(pool.close)
        return _shared[key]
