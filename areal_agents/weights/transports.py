"""Every transport of weights by its name, for readers of a reference and for the buffers of a publisher.

    shm    shared_memory.py     disk    disk.py     nccl, gloo    broadcast.py

This is the only file that knows all of them. Each is imported when it is used, so that an engine's worker starts
without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from areal_agents.engine import Transport, WeightsRef
from areal_agents.errors import ConfigError
from areal_agents.weights.base import OpenWeights
from areal_agents.weights.shared_memory import AttachedWeights, SharedWeights


def open_weights(ref: WeightsRef, *, verify: bool = True) -> OpenWeights:
    """Read ``ref``, whatever its transport.

    It blocks, and every wait in it has a deadline. Shared memory is mapped. ``disk``, ``gloo`` and ``nccl`` copy
    ``ref.nbytes`` into this process's memory.

    ``verify`` compares the checksum (about 1 s for 2 GB). Raises EngineError where the weights are gone, damaged or do
    not arrive in time.
    """
    if ref.transport == "shm":
        return AttachedWeights(ref, verify=verify)
    if ref.transport == "disk":
        from areal_agents.weights.disk import read_disk

        return read_disk(ref, verify=verify)
    from areal_agents.weights.broadcast import receive

    return receive(ref, verify=verify)


class WeightsBuffer(Protocol):
    """Room for one version of the weights.

    Its calls block.
    """

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> WeightsRef:
        """Cast ``tensors`` and put them in the place of those before.

        Returns the reference to them. Raises EngineError where that cannot be done.
        """
        ...

    def close(self) -> None: ...


def weights_buffers(
    transport: Transport,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    weights_dir: Path | None = None,
    host: str = "127.0.0.1",
    receivers: Callable[[], int] | None = None,
) -> list[WeightsBuffer]:
    """Make the two buffers of a publisher.

    Args:
        transport: how the weights travel.
        tensors: names and shapes of the weights.
        dtype: the format that they are published in.
        weights_dir: for ``disk``, a folder that the learner's and the engines' nodes share.
        host: for ``nccl`` and ``gloo``, see ``BroadcastWeights``.
        receivers: for ``nccl`` and ``gloo``, see ``BroadcastWeights``.

    Raises:
        ConfigError: the transport cannot be had here.
    """
    made: list[WeightsBuffer] = []
    try:
        for _ in range(2):
            if transport == "shm":
                made.append(SharedWeights(tensors, dtype))
            elif transport == "disk":
                from areal_agents.weights.disk import DiskWeights

                if weights_dir is None:
                    raise ConfigError('transport = "disk" needs weights_dir: a folder that all nodes share')
                made.append(DiskWeights(tensors, dtype, weights_dir))
            elif transport in ("nccl", "gloo"):
                from areal_agents.weights.broadcast import BroadcastWeights

                made.append(BroadcastWeights(tensors, dtype, transport, host=host, receivers=receivers))
            else:
                raise ConfigError(f"transport must be shm, disk, nccl or gloo, got {transport!r}")
    except BaseException:
        for buffer in made:
            buffer.close()
        raise
    return made
