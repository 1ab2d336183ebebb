"""The messages between an engine's client and its worker, as length-prefixed pickles over two pipes.

Both ends are one program, as the worker is the client's own child. So pickles are safe here and nowhere else.

    client → worker   Generate · Cancel · Release · Update · AskHealth · Close
    worker → client   Ready · Fatal · Lost · Done · Failed · Updated · HealthReport
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from areal_agents.engine import Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.types import Completion, Ids

if TYPE_CHECKING:
    from areal_agents.engines.cpu.architecture import Shape

HEADER = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Settings:
    """The first message that the CPU worker reads, with all that it needs to start."""

    model: str
    shape: Shape
    precision: Literal["bf16", "fp32"]
    max_batch: int
    kv_tokens: int
    max_context: int
    threads: int
    seed: int
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class VLLMSettings:
    """The first message that the vLLM worker reads, with all that it needs to start."""

    model: str
    precision: Literal["bf16", "fp32"]
    max_batch: int
    kv_tokens: int
    max_context: int
    seed: int
    block_size: int | None
    enforce_eager: bool | None
    """None means True on a CPU and False elsewhere."""
    gpu_memory_utilization: float
    tensor_parallel_size: int
    lora_rank: int = 0
    """Rank of the adapters that updates bring. 0: they bring whole weights."""
    lora_targets: tuple[str, ...] = ()
    """The ends of the names of adapted layers. None: every linear layer of the decoder."""


AnySettings = Settings | VLLMSettings


@dataclass(frozen=True, slots=True)
class Generate:
    id: int
    session: str
    ids: Ids
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Cancel:
    id: int
    """The ``Generate`` to abort. Unknown ids are ignored, because it had finished."""


@dataclass(frozen=True, slots=True)
class Release:
    session: str


@dataclass(frozen=True, slots=True)
class Update:
    id: int
    ref: WeightsRef
    mode: UpdateMode
    kv: KVPolicy


@dataclass(frozen=True, slots=True)
class AskHealth:
    id: int


@dataclass(frozen=True, slots=True)
class Close:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    max_context: int
    """The asked one, cut to what the model's positions and the KV allow."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """The last message of a worker that cannot serve the model."""

    message: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The last message of a worker that cannot go on, or of which a child cannot."""

    message: str


@dataclass(frozen=True, slots=True)
class Done:
    id: int
    completion: Completion


@dataclass(frozen=True, slots=True)
class Failed:
    id: int
    message: str


@dataclass(frozen=True, slots=True)
class Updated:
    id: int
    report: UpdateReport


@dataclass(frozen=True, slots=True)
class HealthReport:
    id: int
    health: Health


WorkerCommand = Generate | Cancel | Release | Update | AskHealth | Close
Reply = Ready | Fatal | Lost | Done | Failed | Updated | HealthReport


def encode(message: AnySettings | WorkerCommand | Reply) -> bytes:
    """Return ``message`` as one frame, which is an 8-byte length and a pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def decode(body: bytes) -> Reply:
    """Return the reply in the body of one frame."""
    return cast(Reply, pickle.loads(body))


def read_frame(stream: BinaryIO) -> object | None:
    """Read the next message of a blocking stream.

    Returns None at the end of the stream, also in the middle of a frame.
    """
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    (size,) = HEADER.unpack(head)
    body = stream.read(size)
    if len(body) < size:
        return None
    message: object = pickle.loads(body)
    return message
