"""A process group for one broadcast, beside torch.distributed's default group and its list of groups.

Gloo between CPUs, NCCL between GPUs. Of NCCL the parts that one GPU can show were run on one
(benchmarks/results/gpu.json): groups of one, and members that are missing. **Two GPUs were not.**
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, Work  # type: ignore[attr-defined]  # not in its __all__

Broadcaster = Literal["nccl", "gloo"]
_LAST_SECONDS = 5.0
_POLL = 0.005


class BroadcastGroup(Protocol):
    """The part of PyTorch's process groups that is used here."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> Work: ...
    def rank(self) -> int: ...
    def abort(self) -> None: ...


@contextlib.contextmanager
def open_group(
    backend: Broadcaster, store: Store, rank: int, world: int, seconds: float, host: str
) -> Iterator[BroadcastGroup]:
    """Open a process group outside torch.distributed's own list.

    Its connections end with the context.

    Args:
        backend: nccl or gloo.
        store: the store by which the members find each other.
        rank: the rank of this member, 0 for the sender.
        world: the number of members.
        seconds: deadline of forming the group, and of each of its operations.
        host: the address of this machine that the others reach.

    Raises:
        RuntimeError: the group is not formed within ``seconds``.
    """
    # PyTorch's annotations of these classes lack some of their attributes, so they are Any here.
    gloo: Any = dist.ProcessGroupGloo
    if backend == "gloo":
        options = gloo._Options()
        options._timeout = timedelta(seconds=seconds)
        options._devices = [gloo.create_device(hostname=host)]
        options._threads = 2
        yield gloo(store, rank, world, options)
        _part(store, world)
        return
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=seconds)
    # A communicator whose start blocks knows no deadline, and cannot be aborted from another thread either.
    options.config.blocking = 0
    # Read when the process's first such communicator starts, in seconds; half an hour where nobody says it.
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(math.ceil(seconds)))
    with _environment(TORCH_NCCL_BLOCKING_WAIT="1", TORCH_NCCL_ENABLE_MONITORING="0"):
        # A failed round must raise in the thread that waits for it; by default NCCL's watchdog ends the process.
        group: Any = dist.ProcessGroupNCCL(store, rank, world, options)
    try:
        _meet(store, rank, world, seconds)
        yield group
        _part(store, world)
    finally:
        _abort(group)


def broadcast(
    group: BroadcastGroup, buffer: Tensor, bucket: int, end: float,
    stopping: threading.Event | None = None,
) -> None:  # fmt: skip
    """Bring rank 0's ``buffer`` to all members, one bucket after the other.

    Args:
        group: the members.
        buffer: flat uint8 of the same size everywhere, filled at rank 0.
        bucket: bytes of one broadcast.
        end: when the deadline is, by the monotonic clock.
        stopping: ends the broadcast before its next bucket, once it is set.

    Raises:
        RuntimeError: ``end`` has passed, ``stopping`` is set, or a member is lost.
    """
    nccl = isinstance(group, dist.ProcessGroupNCCL) if dist.is_nccl_available() else False
    for start in range(0, buffer.numel(), bucket):
        if stopping is not None and stopping.is_set():
            raise RuntimeError("the sender was closed")
        left = end - time.monotonic()
        if left <= 0:
            raise RuntimeError(f"the round's deadline passed after {start} of {buffer.numel()} bytes")
        part = buffer[start : start + bucket]
        staged = part.cuda() if nccl and not part.is_cuda else part
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=left)
        group.broadcast([staged], options).wait(timedelta(seconds=left))
        if nccl:
            if staged is not part and group.rank() != 0:
                part.copy_(staged)
            torch.cuda.synchronize()  # before the staging memory goes and before the checksum


def _meet(store: Store, rank: int, world: int, seconds: float) -> None:
    """Wait until all members are here, so that none starts a communicator with one that never comes.

    Raises RuntimeError after ``seconds``.
    """
    store.set(f"met/{rank}", "")
    store.wait([f"met/{other}" for other in range(world)], timedelta(seconds=seconds))


def _abort(group: Any) -> None:
    """Close the connections of ``group``, in a thread of its own.

    Raises RuntimeError where that takes more than seconds: the caller goes on, and the thread is left behind.
    """
    thread = threading.Thread(target=group.abort, name="nccl-abort", daemon=True)
    thread.start()
    thread.join(_LAST_SECONDS)
    if thread.is_alive():
        raise RuntimeError(f"NCCL did not close the connections of a round within {_LAST_SECONDS:g} s")


def _part(store: Store, world: int) -> None:
    """Keep the connections until all members have everything, for the last bytes may still be on their way to some.

    It does not wait for ever. Who is missing then has failed by itself, and its checksum would tell.
    """
    end = time.monotonic() + _LAST_SECONDS
    store.add("done", 1)
    while store.add("done", 0) < world and time.monotonic() < end:
        time.sleep(_POLL)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables that a constructor reads, and restore the old ones afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
