"""A private Ray for a module's tests, and the processes that it must not leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cluster.ray_session import Cluster, cluster
from tests.conftest import require
from tests.processes import MARKER, descendants, marked, wait_gone


class RaySession:
    """A loop that is connected to a Ray of its own with 8 logical CPUs."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        entered = self.stack.enter_async_context(cluster(num_cpus=8, object_store_gib=0.1))
        self.cluster: Cluster = self.run(entered)

    def run(self, work: Awaitable[Any], seconds: float = 240) -> Any:
        async def main() -> Any:
            return await asyncio.wait_for(work, seconds)

        return self.runner.run(main())

    def close(self) -> None:
        self.run(self.stack.aclose())
        self.runner.close()

    def processes(self, named: str) -> list[int]:
        """Ray's processes here whose command line has ``named``."""
        return [pid for pid in marked(self.mark) if named.encode() in command_line(pid)]


def command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def engine_worker(actor: int) -> int:
    """The process that computes, below an engine's actor."""
    return next(p for p in descendants(actor) if b"areal_agents.engines.cpu.worker" in command_line(p))


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    """Ends with the proof that nothing of it is left."""
    require("module:ray")
    mark = f"ray-{uuid.uuid4().hex}"
    os.environ[MARKER] = mark
    try:
        it = RaySession(mark)
        assert it.processes("raylet")
        try:
            yield it
        finally:
            it.close()
        assert not wait_gone(marked(mark), 20), f"left behind: {[command_line(p) for p in marked(mark)]}"
    finally:
        del os.environ[MARKER]
