"""The engine contract: token ids in, sampled token ids with their exact log-probabilities and versions out.

Implementations: ``engines.cpu.engine`` (laptops and tests) and ``engines.vllm.engine``, each in a process of its own;
``SupervisedEngine`` and ``EnginePool`` around them. Weights never travel through this interface. A ``WeightsRef`` says
where they lie and how to prove that they arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from areal_agents.errors import ConfigError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Completion, Message, Prompt

UpdateMode = Literal["inflight", "interrupt", "drain"]
KVPolicy = Literal["recompute", "keep"]
Transport = Literal["shm", "disk", "nccl", "gloo"]
"""Shared memory of one host, safetensors files on a file system that all share, or a broadcast (GPUs, CPUs)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The way to sample a turn.

    ``temperature`` 0 is greedy (its log-probabilities are those of temperature 1).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    """A sampled id in this set ends the turn and is part of the completion."""
    seed: int | None = None
    """Seeds this request's own generator; None draws from the engine's."""

    def require_trainable(self) -> None:
        """Raise ConfigError where the sampled distribution would not be softmax(logits / T) (rule T8)."""
        filters = {"top_p": self.top_p < 1.0, "top_k": self.top_k > 0, "min_p": self.min_p > 0.0}
        used = [name for name, on in filters.items() if on]
        if used:
            raise ConfigError(
                f"training samples from softmax(logits / temperature) alone, but {', '.join(used)} filters the "
                "distribution: remove it from the rollout's sampling (evaluation may use it)"
            )
        if self.temperature <= 0:
            raise ConfigError(f"training needs temperature > 0, got {self.temperature}: greedy turns have no gradient")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor inside a flat weights buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A torch dtype's name, ``"bfloat16"``."""
    offset: int
    """Bytes from the start of the buffer."""


@dataclass(frozen=True, slots=True)
class WeightsProbe:
    """The log-probabilities that a model with these weights gives a prompt.

    An engine that serves them must say nearly the same. How nearly is the engine's to decide: it depends on the format
    that the engine computes in.
    """

    ids: tuple[int, ...]
    """The probe prompt."""
    logprobs: tuple[float, ...]
    """[len(ids) - 1]: log-probability of each of ``ids[1:]`` given those before it, at temperature 1, in nats."""


WeightsKind = Literal["full", "lora"]
"""All weights of a model, or LoRA adapters: for a linear layer ``NAME`` of the base model, ``NAME.lora_A.weight``
[rank, in] and ``NAME.lora_B.weight`` [out, rank], of which its weight is W + B·A."""


@dataclass(frozen=True, slots=True)
class WeightsRef:
    """The place of one version of the weights.

    It never holds tensors, and is picklable.
    """

    version: int
    locator: str
    manifest: tuple[TensorEntry, ...]
    checksum: str
    nbytes: int
    transport: Transport = "shm"
    probe: WeightsProbe | None = None
    kind: WeightsKind = "full"


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """The cost of one update of the weights."""

    version: int
    seconds: float
    """Time in which no token could be sampled."""
    requests_in_flight: int
    tokens_recomputed: int
    """Tokens whose KV was thrown away by this update."""


@dataclass(frozen=True, slots=True)
class Health:
    """The state of an engine at one moment."""

    ok: bool
    version: int
    running: int
    waiting: int
    kv_tokens: int
    sampled_tokens: int
    """Total since the start."""
    detail: str = ""


class Engine(Protocol):
    """A server of one policy, which samples turns from it."""

    @property
    def version(self) -> int:
        """The lowest version that any replica serves."""
        ...

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """Sample one turn.

        Cancelling aborts the request and frees its KV.

        Args:
            prompt: the whole context of the turn.
            sampling: how to sample.
            session: turns of one session may reuse its KV, until ``release``.
            deadline: seconds from now.

        Raises:
            EngineError: past the deadline, when the engine is dead, or when the prompt does not fit.
        """
        ...

    async def release(self, session: str) -> None:
        """Drop the session's KV.

        Unknown sessions are ignored.
        """
        ...

    async def update_weights(self, ref: WeightsRef, *, mode: UpdateMode, kv: KVPolicy) -> UpdateReport:
        """Serve ``ref`` from now on.

        Returns after the engine acknowledged it.
        """
        ...

    async def health(self) -> Health: ...
    async def close(self) -> None: ...


@runtime_checkable
class Bounded(Protocol):
    """An engine that says how long a conversation may be."""

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens. 0 where it is not known."""
        ...


def shortest_context(asked: int, engine: Engine) -> int:
    """Return ``asked``, or less where ``engine`` takes no conversation of so many tokens."""
    takes = engine.max_context if isinstance(engine, Bounded) else 0
    return min(asked, takes) if takes else asked


class ChatModel(Protocol):
    """A model that is only talked to: judges, user simulators, evaluation of remote models."""

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AssistantMessage: ...
