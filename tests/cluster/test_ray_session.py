"""Starting, joining and leaving Ray; what a killed driver leaves behind: nothing."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from areal_agents.cluster.ray_session import cluster
from areal_agents.errors import ConfigError
from tests.cluster.conftest import RaySession, assert_parts, command_line, ray_folders
from tests.processes import MARKER, alive, marked, wait_gone
from tests.served import SECONDS
from tests.tiny_models import save_tiny, tiny_model

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

UNCONNECTED = """
import asyncio
import ray
from areal_agents.cluster.watched_actor import WatchedActor

async def main():
    actor = WatchedActor(object(), "an actor", hang_seconds=1, interval=1)
    await actor.end("it was closed")
    print(ray.is_initialized())

asyncio.run(main())
"""
DRIVER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born with it ignored
import asyncio, os, sys, threading, time
from areal_agents.cluster.ray_processes import MARKER
from areal_agents.cluster.pool_actor import PoolSettings, RemotePool
from areal_agents.cluster.ray_session import cluster
from areal_agents.engines.spec import EngineSpec

seen = []

def look():
    while not seen:
        if MARKER in os.environ:
            seen.append("in the driver's environment")
        time.sleep(0.001)

async def main():
    threading.Thread(target=look, daemon=True).start()
    async with cluster(num_cpus=8, object_store_gib=0.1):
        seen.append("ready")
        spec = EngineSpec("transformers", sys.argv[1], {"precision": "fp32", "max_context": 256})
        async with await RemotePool.start(PoolSettings(spec, 1), event=lambda kind, **fields: None):
            print(seen[0], flush=True)
            await asyncio.sleep(600)

asyncio.run(main())
"""
JOINING = """
import asyncio, sys
import ray
from areal_agents.cluster.ray_session import cluster

async def main():
    async with cluster(sys.argv[1]) as joined:
        def imported():
            from tests.letters_env import __name__ as name
            return name
        print(joined.private, await ray.remote(imported).options(num_cpus=0).remote(), flush=True)

asyncio.run(main())
"""
ROOT = Path(__file__).parents[2]


async def refused(address: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        async with cluster(address, connect_seconds=SECONDS):
            pass


def test_an_address_that_is_none_or_that_nobody_answers_at_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asyncio.run(refused(f"127.0.0.1:{port}", r"nobody answers at .*Connect call failed.* `ray start --head`"))
    asyncio.run(refused(f"ray://127.0.0.1:{port}", "start the run on a node of the cluster"))
    asyncio.run(refused("127.0.0.1", "is none of"))
    asyncio.run(refused("127.0.0.1:99999", "is none of"))


def test_a_missing_ray_and_too_small_a_store_are_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def small() -> None:
        async with cluster(object_store_gib=0.01):
            pass

    with pytest.raises(ConfigError, match=r"cluster.object_store_gib = 0\.01"):
        asyncio.run(small())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    asyncio.run(refused("", r"pip install 'areal-agents\[ray\]'"))


def test_ending_an_actor_after_ray_starts_no_other_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCONNECTED],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_the_object_store_of_a_private_ray_has_its_cap(session: RaySession) -> None:
    import ray

    assert ray.cluster_resources()["object_store_memory"] == int(0.1 * 2**30)


def test_another_driver_joins_by_address_and_leaves_it_running(session: RaySession) -> None:
    async def twice() -> None:
        async with cluster():
            pass

    with pytest.raises(ConfigError, match="connected to a Ray cluster already"):
        session.run(twice())
    done = subprocess.run(
        [sys.executable, "-c", JOINING, session.cluster.address],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd="/", capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False tests.letters_env\n"
    assert all(alive(pid) for pid in session.processes("raylet"))


def test_an_interrupted_driver_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    """One that is killed: ``test_train``."""
    mark = f"driver-{uuid.uuid4().hex}"
    model = save_tiny(tmp_path / "model", tiny_model())
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(model)],
        env=os.environ | {"PYTHONPATH": str(ROOT), MARKER: mark},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        assert_parts(mark)
        assert ray_folders(driver.pid)
        driver.send_signal(signal.SIGINT)
        driver.communicate(timeout=SECONDS)
        assert not wait_gone(marked(mark), 60), [command_line(p) for p in marked(mark)]
        assert not ray_folders(driver.pid)
    finally:
        driver.kill()
        driver.wait()
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
