"""Weights on their way out of the GPU: the buffers of ``areal_agents.weights`` filled, copies, checksums, and CUDA IPC.

Every row has ``what``; GB are 10⁹ bytes of the weights as they are published, in bf16. CUDA IPC, the candidate for an
engine on the learner's card, hands another process the memory itself; on a CPU the same rows use shared memory.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing  # gives pickle the reductions of tensors to handles
from gpu_models import random_model, seconds, sizes, synchronize
from gpu_parts import Row, Settings, main
from torch import Tensor

from areal_agents.engine import WeightsRef
from areal_agents.weights.base import checksum, layout, views
from areal_agents.weights.broadcast import BroadcastWeights
from areal_agents.weights.publisher import master_weights
from areal_agents.weights.shared_memory import SharedWeights
from areal_agents.weights.transports import open_weights

DEADLINE = 60.0
FORMAT = torch.bfloat16


def rate(nbytes: int, taken: float) -> Row:
    return {"seconds": round(taken, 5), "gb_per_s": round(nbytes / taken / 1e9, 2)}


def fill_rows(device: torch.device, tensors: dict[str, Tensor]) -> Iterator[Row]:
    """The two buffers that a GPU's learner may publish by, allocated and filled, and the checksum in it."""
    start = time.perf_counter()
    shared = SharedWeights(tensors, FORMAT)
    made = time.perf_counter() - start
    first, again = (seconds(device, lambda: shared.fill(tensors, 1), repeats=1, warm=0) for _ in range(2))
    summed = seconds(device, lambda: checksum(memoryview(shared._map)[: shared.nbytes]), repeats=1, warm=0)
    yield {
        "what": "fill shared memory", "gb": round(shared.nbytes / 1e9, 3), "allocate_seconds": round(made, 5),
        "first_seconds": round(first, 4), **rate(shared.nbytes, again),
    }  # fmt: skip
    yield {"what": "checksum on the processor", **rate(shared.nbytes, summed)}
    yield read_row(device, shared.fill(tensors, 2))
    shared.close()
    backend: Any = "nccl" if device.type == "cuda" else "gloo"
    start = time.perf_counter()
    offered = BroadcastWeights(tensors, FORMAT, backend)
    made = time.perf_counter() - start
    first, again = (seconds(device, lambda: offered.fill(tensors, 1), repeats=1, warm=0) for _ in range(2))
    offered.close()
    yield {
        "what": f"fill the buffer of {backend}", "pinned": backend == "nccl", "allocate_seconds": round(made, 5),
        "first_seconds": round(first, 4), **rate(offered.nbytes, again),
    }  # fmt: skip


def read_row(device: torch.device, ref: WeightsRef) -> Row:
    """Time what an engine does with a reference: map, check, copy to its device."""
    start = time.perf_counter()
    with open_weights(ref) as opened:
        checked = time.perf_counter() - start
        copies = {name: tensor.to(device, copy=True) for name, tensor in opened.tensors.items()}
        synchronize(device)
        copied = time.perf_counter() - start - checked
        last = next(reversed(copies))
        equal = torch.equal(copies[last].cpu(), opened.tensors[last])
    return {"what": "read shared memory to the device", "check_seconds": round(checked, 4), "equal": equal,
            **rate(ref.nbytes, copied)}  # fmt: skip


def copy_rows(device: torch.device, tensors: dict[str, Tensor]) -> Iterator[Row]:
    """The steps of a fill alone: the cast on the device, and flat copies through pinned and pageable memory."""
    manifest, nbytes = layout(tensors.items(), FORMAT)
    flat = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    inside = views(flat, manifest)

    def cast() -> None:
        for name, target in inside.items():
            target.copy_(tensors[name])

    yield {"what": "cast on the device", "tensors": len(inside), **rate(nbytes, seconds(device, cast))}
    summed = seconds(device, lambda: int(flat.view(torch.int64).sum()))
    yield {"what": "a sum over the bytes on the device", **rate(nbytes, summed)}
    for pinned in (True, False) if device.type == "cuda" else (False,):
        host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        kind = "pinned" if pinned else "pageable"
        out = seconds(device, lambda host=host: host.copy_(flat, non_blocking=True))
        back = seconds(device, lambda host=host: flat.copy_(host, non_blocking=True))
        yield {"what": f"device to {kind} memory", **rate(nbytes, out)}
        yield {"what": f"{kind} memory to device", **rate(nbytes, back)}


def reader(connection: Connection) -> None:
    """The other process: takes handles, answers with the sum of the bytes, until there are no more."""
    while (flat := connection.recv()) is not None:
        start = time.perf_counter()
        total = int(flat.view(torch.int64).sum())
        own = torch.empty_like(flat)
        own.copy_(flat)
        synchronize(flat.device)
        connection.send((total, time.perf_counter() - start))
        del flat, own


def ipc_rows(device: torch.device, nbytes: int) -> Iterator[Row]:
    """Hand a flat buffer to another process three times, changed in between. Raises RuntimeError where it dies."""
    flat = torch.randint(0, 256, (nbytes // 8 * 8,), dtype=torch.uint8, device=device)
    if device.type == "cpu":
        flat.share_memory_()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=reader, args=(theirs,))
    process.start()
    theirs.close()
    try:
        for turn in range(3):
            flat[:8] = turn
            synchronize(device)
            wanted = int(flat.view(torch.int64).sum())
            start = time.perf_counter()
            ours.send(flat)
            if not ours.poll(DEADLINE):
                raise RuntimeError(f"the other process did not answer within {DEADLINE:.0f} s")
            try:
                total, inside = ours.recv()
            except EOFError:
                process.join(DEADLINE)
                raise RuntimeError(f"the other process ended with code {process.exitcode}") from None
            yield {
                "what": "handed to another process", "turn": turn, "equal": total == wanted,
                "round_trip_seconds": round(time.perf_counter() - start, 4), "sum_and_copy_seconds": round(inside, 4),
            }  # fmt: skip
        ours.send(None)
        process.join(DEADLINE)
    finally:
        process.kill()
        process.join()
        ours.close()


def rows(settings: Settings) -> Iterator[Row]:
    device = torch.device(settings.device)
    for name in sizes(settings, ("1.5B", "3B"), ("1.5B",)):
        tensors = master_weights(random_model(name, device))
        for row in (*fill_rows(device, tensors), *copy_rows(device, tensors)):
            yield row | {"model": name}
        del tensors
    yield from ipc_rows(device, 1 << 20 if settings.tiny else 1 << 30)


if __name__ == "__main__":
    main(rows)
