"""Processes that read, offer or leave weights in the middle, for ``test_transports``; light to import."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import BroadcastOptions

from areal_agents.engine import WeightsRef
from areal_agents.errors import EngineError
from areal_agents.weights import broadcast
from areal_agents.weights.disk import DiskWeights
from areal_agents.weights.transports import open_weights


def read(ref: WeightsRef, attempts: int, out: Connection) -> None:
    """Send the tensors as lists, or the text of the EngineError."""
    try:
        with broadcast.receive(ref, attempts=attempts) if attempts else open_weights(ref) as opened:
            out.send({name: tensor.double().tolist() for name, tensor in opened.tensors.items()})
    except EngineError as error:
        out.send(str(error))


def die_in_a_round(ref: WeightsRef, out: Connection) -> None:
    """Take part in a round and be killed after the first bucket."""

    def half(group: Any, buffer: torch.Tensor, bucket: int, end: float) -> None:
        options = BroadcastOptions()
        options.rootRank = 0
        group.broadcast([buffer[:bucket]], options).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    vars(broadcast)["broadcast"] = half
    broadcast.receive(ref)


def leave_on_disk(folder: Path, out: Connection) -> None:
    """Write a version and wait to be killed."""
    made = DiskWeights({"a": torch.ones(3)}, torch.float32, folder)
    out.send(made.fill({"a": torch.ones(3)}, 1))
    time.sleep(60)
