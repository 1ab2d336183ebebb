"""A private Ray for all tests that take ``session``, and the processes that it must not leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from areal_agents.cluster.ray_session import Cluster, cluster
from tests.conftest import require
from tests.processes import MARKER, descendants, marked, wait_gone
from tests.served import SECONDS
from tests.tiny_models import tiny_chat_model

if TYPE_CHECKING:
    from tests.cluster.fleet import Fleet

T = TypeVar("T")


class RaySession:
    """A loop that is connected to a Ray of its own with 8 logical CPUs. Its processes have ``mark``."""

    def __init__(self) -> None:
        self.mark = f"ray-{uuid.uuid4().hex}"
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(MARKER, self.mark)
            entered = self.stack.enter_async_context(cluster(num_cpus=8, object_store_gib=0.1))
            self.cluster: Cluster = self.run(entered)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, SECONDS))

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


def assert_parts(mark: str) -> None:
    """A Ray and an engine pool are among the processes with ``mark``."""
    lines = b"\n".join(command_line(pid) for pid in marked(mark))
    parts = (b"raylet", b"gcs_server", b"ray::PoolActor", b"ray::EngineActor", b"areal_agents.engines.cpu.worker")
    assert [part for part in parts if part not in lines] == []


def ray_folders(driver: int) -> list[Path]:
    """Of the private Rays that process ``driver`` started."""
    return [path for parent in {"/tmp", tempfile.gettempdir()} for path in Path(parent).glob(f"areal-ray-{driver}-*")]


def engine_worker(actor: int) -> int:
    """The process that computes, below an engine's actor."""
    return next(p for p in descendants(actor) if b"areal_agents.engines.cpu.worker" in command_line(p))


@pytest.fixture(scope="session")
def session() -> Iterator[RaySession]:
    """Ends with the proof that nothing of it is left."""
    require("module:ray")
    it = RaySession()
    assert it.processes("raylet")
    try:
        yield it
    finally:
        it.close()
    assert not wait_gone(marked(it.mark), 60), f"left behind: {[command_line(p) for p in marked(it.mark)]}"


@pytest.fixture(scope="module")
def module_fleet(session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    from tests.cluster.fleet import Fleet

    made = Fleet(session, tiny_chat_model(tmp_path_factory.mktemp("model") / "m"))
    yield made
    made.close()


@pytest.fixture
def fleet(module_fleet: Fleet) -> Fleet:
    """Two workers that the tests of a file share, without events yet."""
    module_fleet.events.clear()
    return module_fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a Ray come last, so that it does not run beside those that start their own."""
    items.sort(key=lambda item: "session" in getattr(item, "fixturenames", ()))
