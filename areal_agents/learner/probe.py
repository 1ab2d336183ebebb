"""The probe, which is what a model with the published weights says to a fixed prompt.

An engine proves with it that it has loaded these weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from areal_agents.engine import WeightsProbe
from areal_agents.learner.forward import Decoder
from areal_agents.learner.other_weights import NONE, Merges, in_fp32, rounded
from areal_agents.learner.packing import pack_rows

PROBE_TOKENS = 32


def probe_ids(vocabulary: int, seed: int, n: int = PROBE_TOKENS) -> tuple[int, ...]:
    """Draw ``n`` token ids of 0 … vocabulary - 1.

    They are the same for the same arguments. Special tokens may be among them.
    """
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, vocabulary, n))


@torch.no_grad()
def probe(decoder: Decoder, ids: tuple[int, ...], dtype: torch.dtype, merges: Merges = NONE) -> WeightsProbe:
    """Compute what the model says to ``ids`` with its weights rounded to ``dtype``, as they are published.

    It computes in fp32, whatever the learner's precision. A difference to it is therefore the engine's rounding, or
    other weights. The cost is one forward of ``len(ids)`` tokens and a pass over the weights.

    Args:
        decoder: the model.
        ids: the prompt.
        dtype: the format that the weights are published in.
        merges: layers that are published with another weight than they have. Their adapters must be disabled.
    """
    row = np.asarray(ids, np.int64)
    (pack,) = pack_rows([row], token_budget=len(ids), shared=decoder.shared)
    with in_fp32(decoder.model, dtype, merges):
        hidden = decoder.hidden(pack).reshape(len(ids), -1)
        head = decoder.head
        targets = torch.from_numpy(row[1:]).to(hidden.device)
        bias = None if head.bias is None else rounded(head.bias, dtype)
        logits = nn.functional.linear(hidden[:-1].float(), rounded(head.weight, dtype), bias)
    logprobs_T = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    return WeightsProbe(ids, tuple(logprobs_T.tolist()))
