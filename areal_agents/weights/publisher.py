"""Publishing: the learner's weights in one of two buffers, and what a model with them says to a probe prompt.

    weights ─▶ cast ─▶ one of two buffers (``WeightsBuffer``: memory, disk, broadcast) ─▶ WeightsRef with its Probe

A buffer is filled again at the earliest when the context that handed it out has closed, and the two are filled in
turn: what was published last stays whole until the publish after the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from areal_agents.engine import Probe, Transport, WeightsRef
from areal_agents.errors import ConfigError
from areal_agents.learner.forward import Decoder
from areal_agents.learner.packing import pack_rows
from areal_agents.weights.base import SharedWeights

PROBE_TOKENS = 32


def master_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by state-dict name, not copied; of tied tensors the first name alone."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            out[name] = tensor
    return out


class WeightsBuffer(Protocol):
    """Room for one version of the weights; its calls block."""

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> WeightsRef:
        """Put ``tensors`` in, cast, in the place of those before. Raises EngineError where that cannot be done."""
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
    """Two buffers for ``tensors`` in ``dtype``.

    weights_dir: of ``disk``, a folder that the learner's and the engines' nodes share. host, receivers: of ``nccl``
    and ``gloo``, see ``BroadcastWeights``. Raises ConfigError where the transport cannot be had here.
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


class Publisher:
    """Hands out two buffers in turn. ``publish`` waits while both are out, until one of those contexts closes."""

    def __init__(
        self, buffers: Sequence[WeightsBuffer], run: Callable[[Callable[[], WeightsRef]], Awaitable[WeightsRef]]
    ) -> None:
        """run: does a blocking call in the thread that the weights belong to."""
        self._buffers, self._run = buffers, run
        self._free: asyncio.Queue[WeightsBuffer] = asyncio.Queue()
        for buffer in buffers:
            self._free.put_nowait(buffer)

    @asynccontextmanager
    async def publish(self, write: Callable[[WeightsBuffer], WeightsRef]) -> AsyncIterator[WeightsRef]:
        """The reference that ``write`` made by filling a buffer, which is not filled again while the context is open.

        Raises what ``write`` raises; the other buffer is untouched then.
        """
        buffer = await self._free.get()
        try:
            yield await self._run(lambda: write(buffer))
        finally:
            self._free.put_nowait(buffer)

    def close(self) -> None:
        """Free the buffers; a thread that reads shared memory already goes on with it."""
        for buffer in self._buffers:
            buffer.close()


def probe_ids(vocabulary: int, seed: int, n: int = PROBE_TOKENS) -> tuple[int, ...]:
    """``n`` token ids of 0 … vocabulary - 1, the same for the same arguments; special tokens may be among them."""
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, vocabulary, n))


@torch.no_grad()
def probe(decoder: Decoder, ids: tuple[int, ...], dtype: torch.dtype) -> Probe:
    """What the model says to ``ids`` with its weights rounded to ``dtype``, as they are published.

    Computed in fp32, whatever the learner's precision: a difference to it is the engine's rounding, or other weights.
    Each module's weights are rounded while it computes, so the copy is of one module at a time. Costs one forward of
    ``len(ids)`` tokens and a pass over the weights.
    """
    row = np.asarray(ids, np.int64)
    (pack,) = pack_rows([row], token_budget=len(ids), shared=decoder.shared)
    with _rounded(decoder.model, dtype):
        hidden = decoder.hidden(pack).reshape(len(ids), -1)
        head = decoder.head
        targets = torch.from_numpy(row[1:]).to(hidden.device)
        weight = _round(head.weight, dtype)
        bias = None if head.bias is None else _round(head.bias, dtype)
        logits = nn.functional.linear(hidden[:-1].float(), weight, bias)
    logprobs_T = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return Probe(ids, tuple(logprobs_T.tolist()))


def _round(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).to(tensor.dtype)


@contextmanager
def _rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While open, every module computes with its own parameters rounded to ``dtype``."""
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def before(module: nn.Module, args: Any) -> None:
        kept[module] = [(p, p.data) for p in module._parameters.values() if p is not None]
        for parameter, data in kept[module]:
            parameter.data = _round(data, dtype)

    def after(module: nn.Module, *args: Any) -> None:
        for parameter, data in kept.pop(module, []):
            parameter.data = data

    owners = [m for m in model.modules() if any(p is not None and p.dtype != dtype for p in m._parameters.values())]
    hooks = [m.register_forward_pre_hook(before) for m in owners] + [m.register_forward_hook(after) for m in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(kept):  # where a forward raised
            after(module)
