"""Process groups of ``areal_agents.weights.process_group``: made, used, aborted, and with a missing or killed member.

NCCL on GPUs, Gloo on a CPU. Every member is a process of its own, so that one that NCCL's watchdog ends is a result.
NCCL takes no two members on one card: with one card ``pair`` says how it refuses, and ``killed`` and ``round`` are left
out. ``missing`` and ``lost`` need one member alone: the other was called, answered, and never comes, or
dies just before its communicator starts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
from gpu_parts import Row, Settings, ending, main
from torch.distributed import PrefixStore, TCPStore

from areal_agents.engine import WeightsRef
from areal_agents.weights.broadcast import BroadcastWeights, RoundLimits, receive
from areal_agents.weights.process_group import Broadcaster, broadcast, open_group

HOST = "127.0.0.1"
STARTUP = 40.0
"""Seconds for a process to import PyTorch and to begin with CUDA."""


@dataclass(frozen=True)
class Member:
    """One member of one case."""

    case: str
    backend: Broadcaster
    port: int
    rank: int
    world: int
    seconds: float
    """The deadline of the group and of the broadcast."""
    nbytes: int
    bucket: int
    """Bytes of one broadcast."""
    killed: bool = False
    """It is killed after half of the bytes."""


def member_process(member: Member, out: Connection) -> None:
    """Be ``member``; send why, where it fails by something else than what a group raises."""
    try:
        take_part(member, out)
    except Exception as error:  # noqa: BLE001  boundary: the part records it
        out.send({"failed": f"{type(error).__name__}: {error}"[:300]})


def take_part(member: Member, out: Connection) -> None:
    """Send that it began, then the seconds of each step, or what was raised and after how long."""
    if member.backend == "nccl":
        torch.cuda.set_device(member.rank % torch.cuda.device_count())
        torch.cuda.synchronize()
    store = TCPStore(HOST, member.port, None, False, timeout=timedelta(seconds=STARTUP), wait_for_workers=False)
    inside = PrefixStore(member.case, store)
    if member.case == "lost":
        inside.set("met/1", "")  # of a member that is dead by now
    buffer = torch.zeros(member.nbytes, dtype=torch.uint8, pin_memory=member.backend == "nccl")
    if member.rank == 0:
        buffer.fill_(7)
    out.send({"began": True})
    start = time.monotonic()
    steps: dict[str, float] = {}
    try:
        with open_group(member.backend, inside, member.rank, member.world, member.seconds, HOST) as group:
            steps["made"] = time.monotonic() - start
            end = start + member.seconds
            if member.killed:
                broadcast(group, buffer[: member.nbytes // 2], member.bucket, end)
                os.kill(os.getpid(), signal.SIGKILL)
            broadcast(group, buffer, member.bucket, end)
            steps["sent"] = time.monotonic() - start
        steps["ended"] = time.monotonic() - start
    except RuntimeError as error:
        found: Row = {"raised": str(error).splitlines()[0][:300], "after": round(time.monotonic() - start, 3)}
    else:
        found = {"equal": bool((buffer == 7).all())}
    out.send(found | {name: round(taken, 4) for name, taken in steps.items()})


def run_members(members: list[Member]) -> list[Row]:
    """Run ``members`` and return what each sent, or how it ended: by code, by signal, or never.

    A member hangs when it has not sent its result within two of its deadlines; it is killed then.
    """
    context = multiprocessing.get_context("forkserver")
    found: list[Row] = [{"rank": member.rank, "outcome": "did not begin"} for member in members]
    with ExitStack() as stack:
        started = []
        for member in members:
            ours, theirs = context.Pipe()
            process = context.Process(target=member_process, args=(member, theirs))
            process.start()
            theirs.close()
            stack.callback(ours.close)
            stack.callback(process.join)
            stack.callback(process.kill)
            started.append((process, ours))
        for outcome, seconds in (("hung", STARTUP), ("ended well", 2 * members[0].seconds)):
            end = time.monotonic() + seconds
            for row, (process, ours) in zip(found, started, strict=True):
                try:
                    if ours.poll(max(end - time.monotonic(), 0)):
                        row |= ours.recv()
                        row["outcome"] = next((name for name in ("failed", "raised") if name in row), outcome)
                except EOFError:
                    process.join(STARTUP)
                    row["outcome"] = f"ended with {ending(process.exitcode)}"
    return found


def engine(ref: WeightsRef, out: Connection) -> None:
    """Take part in a whole round, as an engine does."""
    if ref.transport == "nccl":
        torch.cuda.set_device(1)
    out.send({"began": True})
    start = time.monotonic()
    with receive(ref, attempts=1) as opened:
        out.send({"seconds": round(time.monotonic() - start, 3), "tensors": len(opened.tensors)})


def round_row(backend: Broadcaster, nbytes: int) -> Row:
    """Time ``BroadcastWeights`` and ``receive``: joins, a group, the bytes, both checksums."""
    weights = {f"w{i}": torch.full((nbytes // 8,), float(i)) for i in range(4)}
    offered = BroadcastWeights(weights, torch.bfloat16, backend, receivers=lambda: 1)
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=engine, args=(offered.fill(weights, 1), theirs))
    process.start()
    theirs.close()
    try:
        row: Row = {"case": "round", "gb": round(offered.nbytes / 1e9, 3)}
        for _ in range(2):
            if not ours.poll(STARTUP):
                return row | {"outcome": "hung", "failures": offered.failures}
            row |= ours.recv()
        return row | {"outcome": "ended well", "failures": offered.failures}
    except EOFError:
        return row | {"outcome": "ended early", "failures": offered.failures}
    finally:
        process.kill()
        process.join()
        offered.close()


def rows(settings: Settings) -> Iterator[Row]:
    nccl = settings.device == "cuda"
    backend: Broadcaster = "nccl" if nccl else "gloo"
    cards = torch.cuda.device_count() if nccl else 0
    nbytes, missing, patience = (1 << 26, 2.0, 20.0) if settings.tiny else (1 << 30, 10.0, 15.0)
    bucket = min(RoundLimits().bucket, nbytes // 4)
    store = TCPStore(HOST, 0, None, True, timeout=timedelta(seconds=STARTUP), wait_for_workers=False)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["areal_agents.weights.broadcast"])

    def members(case: str, present: int, world: int) -> list[Row]:
        limit = missing if case in ("missing", "lost") else patience
        chosen = [
            Member(
                case, backend, store.port, rank, world, limit, nbytes, bucket,
                killed=case == "killed" and rank == 1,
            )
            for rank in range(present)
        ]  # fmt: skip
        return [{"case": case, "deadline": limit, **row} for row in run_members(chosen)]

    yield from members("alone", 1, 1)
    yield from members("alone again", 1, 1)
    yield from members("missing", 1, 2)
    yield from members("lost", 1, 2)
    yield from members("pair", 2, 2)
    if not nccl or cards > 1:
        yield from members("killed", 2, 2)
        yield round_row(backend, nbytes)
    else:
        yield {"case": "killed", "outcome": "left out: one card"}
        yield {"case": "round", "outcome": "left out: one card"}


if __name__ == "__main__":
    main(rows)
