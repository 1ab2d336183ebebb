"""A connection to Ray, either to a private one on this machine or to one that runs already.

    async with cluster() as ray_cluster:            # starts gcs_server, raylet and workers; ends them all
    async with cluster("auto") as ray_cluster:      # joins; leaves it running

A private Ray has no dashboard, sends no usage statistics, and its object store has a cap. Its files lie in a folder
below the temporary one, with a path short enough for its sockets. They go when it ends. Where the driver is killed, the
kernel ends Ray's first processes with it. A reaper (``cluster.ray_processes``) ends the rest and removes the folder.

Workers import what the driver can, because ``sys.path`` travels as their PYTHONPATH. On a cluster of several machines
those folders must exist on each of them (one file system, or one image).

ray is imported here only once ``cluster`` is entered. Ray's calls block, and the processes that it starts end with the
*thread* that started them. So the calls run on a thread of this context.

Waits for / unblocked by: entering waits for Ray's start or for the connection, at most ``connect_seconds``. Leaving
waits for Ray's end, at most ``_STOP_SECONDS``. Then its processes are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from areal_agents.cluster import ray_processes
from areal_agents.errors import ConfigError
from areal_agents.utils.packages import require_package

T = TypeVar("T")

_STOP_SECONDS = 30.0
_PREFIX = "areal-ray"
_LOCK = "areal.lock"
_SOCKETS = len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.12345")
_SOCKET_PATH = 107
"""Longest path of a Unix socket on Linux."""
_LEAST_STORE = 0.08
"""The smallest object store in GiB. Ray refuses less than 75 MiB."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray that this process is connected to."""

    address: str
    """``host:port`` of its GCS, with which others join."""
    node: str
    """Ray's id of the node that this process is on."""
    private: bool
    """Whether it was started here and ends here."""


@asynccontextmanager
async def cluster(
    address: str = "",
    *,
    object_store_gib: float = 1.0,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    env: Mapping[str, str] | None = None,
    connect_seconds: float = 120.0,
) -> AsyncIterator[Cluster]:
    """Start or join Ray, and leave or end it.

    Amounts of a private Ray are accounts, not limits, so more CPUs than cores are allowed.

    Args:
        address: the Ray to connect to. Empty starts a private one. ``"auto"`` joins the one that runs on this machine
            or is named by RAY_ADDRESS. ``"host:port"`` joins that one, of which this machine must be a node. Ray Client
            (``ray://``) is refused, because the engine pool runs on the driver's node and a client has none.
        object_store_gib: cap of a private Ray's object store in GiB. A joined one has its own.
        num_cpus: CPUs that a private Ray has to give. None means those of the machine.
        num_gpus: GPUs that a private Ray has to give. None means those of the machine.
        resources: other resources that a private Ray has to give, by name. None means those of the machine.
        env: environment variables of every worker, beside PYTHONPATH.
        connect_seconds: deadline of the start or of the connection.

    Raises:
        ConfigError: the extra ``ray`` is not installed, the address is bad or nobody answers there, this process is
            connected to Ray already, or ``connect_seconds`` have passed.
    """
    require_package("ray", "cluster.backend = 'ray'", "set cluster.backend = 'local'")
    if object_store_gib < _LEAST_STORE:
        raise ConfigError(f"cluster.object_store_gib = {object_store_gib:g} is less than Ray's least, {_LEAST_STORE:g}")
    variables = {"PYTHONPATH": _python_path(), **(env or {})}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": variables},
        "namespace": f"{_PREFIX}-{os.getpid()}",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    async with contextlib.AsyncExitStack() as stack:
        folder = None
        if address:
            await _reach(address, connect_seconds)
            options["address"] = address
        else:
            folder = stack.enter_context(_private_folder())  # entered first, so that it goes after Ray's end
            variables[ray_processes.MARKER] = str(folder)
            options |= _private_options(folder, object_store_gib) | {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "resources": dict(resources or {}) or None,
            }
        thread = _Thread()
        stack.callback(thread.stop)
        await _require_unconnected(thread, connect_seconds)
        stack.push_async_callback(_leave, thread, folder)
        yield await _enter(thread, options, address, connect_seconds)


def _private_options(folder: Path, object_store_gib: float) -> dict[str, Any]:
    """Return the options of a Ray that is started here, apart from what it has to give."""
    return {
        "address": "local",  # whatever RAY_ADDRESS says
        "object_store_memory": int(object_store_gib * 2**30),
        "include_dashboard": False,
        "_temp_dir": str(folder),
        "_system_config": {"worker_niceness": 0},  # else they yield to everything else on this machine
    }


async def _require_unconnected(thread: _Thread, seconds: float) -> None:
    def connected() -> bool:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        return bool(ray.is_initialized())

    if await thread.run(connected, seconds):
        raise ConfigError("this process is connected to a Ray cluster already: leave that one first")


async def _enter(thread: _Thread, options: dict[str, Any], address: str, seconds: float) -> Cluster:
    def init() -> Cluster:
        import ray

        try:
            ray.init(**options)
        except (OSError, RuntimeError, ValueError):
            raise
        except Exception as error:  # boundary: a wrong token is a RayError, and a node that starts too slowly no class
            raise ConnectionError(str(error)) from error
        context = ray.get_runtime_context()
        return Cluster(str(context.gcs_address), context.get_node_id(), not address)

    what = f"the Ray cluster at cluster.address = {address!r}" if address else "a private Ray"
    try:
        return await thread.run(init, seconds)
    except TimeoutError as error:
        raise ConfigError(f"{what} did not answer within {seconds:g} s") from error
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        hint = "start one with `ray start --head`, or leave cluster.address empty" if address else "see its message"
        raise ConfigError(f"{what} could not be entered: {error}: {hint}") from error


async def _leave(thread: _Thread, folder: Path | None) -> None:
    def shutdown() -> None:
        import ray

        ray.shutdown()

    with contextlib.suppress(TimeoutError):
        await thread.run(shutdown, _STOP_SECONDS)
    if folder is not None:
        await asyncio.to_thread(ray_processes.reap, str(folder))


async def _reach(address: str, seconds: float) -> None:
    """Raise ConfigError where nobody listens at ``address``.

    Ray itself would try for minutes, or end the process.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
        if address in ("", "auto"):
            return  # Ray looks for it in its own files
    if address.startswith("ray://"):
        raise ConfigError(
            f"cluster.address = {address!r} is Ray Client's, which has no node to run the engine pool and write files "
            "on: start the run on a node of the cluster, with cluster.address = 'auto'"
        )
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65_536:
        raise ConfigError(f"cluster.address = {address!r} is none of '', 'auto' and 'host:port'")
    try:
        async with asyncio.timeout(min(seconds, 30.0)):
            _, writer = await asyncio.open_connection(found[1].strip("[]"), int(found[2]))
    except (OSError, TimeoutError) as error:
        reason = str(error) or "no answer"
        raise ConfigError(
            f"nobody answers at cluster.address = {address!r} ({reason}): start Ray there with `ray start --head`, or "
            "leave it empty for a private one"
        ) from error
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _python_path() -> str:
    """Return the driver's ``sys.path`` without what every interpreter of this kind has."""
    own = {os.path.realpath(p) for p in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix)}
    found = [os.path.abspath(p or ".") for p in sys.path]
    kept = [p for p in dict.fromkeys(found) if os.path.isdir(p) and not _standard(os.path.realpath(p), own)]
    return os.pathsep.join(kept)


def _standard(path: str, own: set[str]) -> bool:
    return path in own or os.path.basename(path) == "lib-dynload"


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder for a private Ray's files, and remove it at the end.

    First it removes the folders that a crash of the whole machine left, when no reaper could.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) + len(f"/{_PREFIX}-{os.getpid()}-00000000") + _SOCKETS > _SOCKET_PATH:
        parent = Path("/tmp")
    for stale in parent.glob(f"{_PREFIX}-*-*"):
        pid = stale.name.split("-")[2]
        with contextlib.suppress(OSError):
            if pid.isdigit() and not Path(f"/proc/{pid}").exists() and _left(stale):
                shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-", dir=parent))
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    reaper = ray_processes.start_reaper(str(folder))
    try:
        yield folder
    finally:
        assert reaper.stdin is not None
        reaper.stdin.close()  # which tells it to begin
        try:
            reaper.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            reaper.kill()
            reaper.wait()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _left(folder: Path) -> bool:
    """Say whether ``folder`` is this user's and no process holds its lock.

    Its owner's pid tells too little, because a process in another container has no pid here.
    """
    if folder.stat().st_uid != os.getuid():
        return False
    with contextlib.suppress(FileNotFoundError), (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


class _Thread:
    """A daemon thread that runs one call after another, for as long as Ray's processes live."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="ray", daemon=True).start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    async def run(self, work: Callable[[], T], seconds: float) -> T:
        """Run ``work()`` on the thread and return its result.

        Raises what it raises. Raises TimeoutError after ``seconds``, when ``work`` goes on but nobody hears of it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(error: BaseException | None, value: T | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)  # type: ignore[arg-type]

        def call() -> None:
            error, value = None, None
            try:
                value = work()
            except BaseException as raised:  # noqa: BLE001  boundary: it is raised on the loop
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, error, value)

        self._calls.put(call)
        async with asyncio.timeout(seconds):
            return await future

    def stop(self) -> None:
        """End the thread after the calls so far."""
        self._calls.put(None)
