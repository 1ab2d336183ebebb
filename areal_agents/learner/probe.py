"""The probe, which is what a model with the published weights says to a fixed prompt.

An engine proves with it that it has loaded these weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from areal_agents.engine import WeightsProbe
from areal_agents.learner.forward import Decoder
from areal_agents.learner.packing import pack_rows

PROBE_TOKENS = 32


def probe_ids(vocabulary: int, seed: int, n: int = PROBE_TOKENS) -> tuple[int, ...]:
    """Draw ``n`` token ids of 0 … vocabulary - 1.

    They are the same for the same arguments. Special tokens may be among them.
    """
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, vocabulary, n))


@torch.no_grad()
def probe(decoder: Decoder, ids: tuple[int, ...], dtype: torch.dtype) -> WeightsProbe:
    """Compute what the model says to ``ids`` with its weights rounded to ``dtype``, as they are published.

    It computes in fp32, whatever the learner's precision. A difference to it is therefore the engine's rounding, or
    other weights. Each module's weights are rounded while it computes, so only one module is copied at a time. The cost
    is one forward of ``len(ids)`` tokens and a pass over the weights.
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
    return WeightsProbe(ids, tuple(logprobs_T.tolist()))


def _round(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).to(tensor.dtype)


@contextmanager
def _rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let every module compute with its own parameters rounded to ``dtype`` while the context is open."""
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
        for module in list(kept):  # where a forward raised: its weights must not stay rounded
            after(module)
