"""A vLLM engine with the model it serves, and what transformers says about its tokens."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from areal_agents.engine import UpdateReport, WeightsProbe, WeightsRef
from areal_agents.engines.vllm.engine import VLLMEngine
from areal_agents.types import Completion
from areal_agents.weights.shared_memory import SharedWeights
from tests.served import Served, ids_of
from tests.tiny_models import forward_logprobs, vllm_model

BLOCK = 32
"""Tokens a KV block: what later turns reuse is whole blocks."""


def serve(folder: Path, kind: str = "llama", **options: Any) -> Served:
    tied = options.pop("tied", False)
    model = vllm_model(kind, tie_word_embeddings=tied)
    # A model's own sampling defaults, which vLLM would apply to every request: no log-probability would be right.
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.2)
    settings = {"kv_tokens": 2400, "block_size": BLOCK} | options
    return Served(model, folder, VLLMEngine.start, **settings)


def like(it: Served, seed: int) -> Any:
    """Another random model of the served one's shape."""
    config = it.model.config
    return vllm_model(config.model_type, seed=seed, tie_word_embeddings=config.tie_word_embeddings)


def probed(ref: WeightsRef, model: Any, *, off: float = 0.0) -> WeightsRef:
    """``ref`` with what ``model`` says to a probe prompt, ``off`` nats besides the truth."""
    ids = ids_of(40, 999)
    return replace(ref, probe=WeightsProbe(ids, tuple(x + off for x in forward_logprobs(model, ids).tolist())))


async def update(
    it: Served, model: Any, version: int, *, after: Awaitable[None] | None = None, **how: Any
) -> UpdateReport:
    """Publish ``model`` with its probe and serve it. after: what to wait for between the two."""
    shared, ref = publish(model, version)
    try:
        ref = probed(ref, model)
        if after is not None:
            await after
        report: UpdateReport = await it.engine.update_weights(ref, **how)
    finally:
        shared.close()
    it.model = model
    return report


def publish(model: Any, version: int, dtype: torch.dtype = torch.float32) -> tuple[SharedWeights, WeightsRef]:
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shared = SharedWeights(state, dtype)
    return shared, shared.fill(state, version)


async def sampling(it: Served, tokens: int, seconds: float = 60.0) -> None:
    """Wait until ``tokens`` more than before were sampled."""
    start = (await it.engine.health()).sampled_tokens
    end = time.monotonic() + seconds
    while (await it.engine.health()).sampled_tokens < start + tokens:
        assert time.monotonic() < end, "the engine samples nothing"


def gaps(model: Any, prompt: tuple[int, ...], done: Completion, temperature: float = 1.0) -> torch.Tensor:
    """|Δ log p| of each sampled token to a full forward pass of transformers."""
    want = forward_logprobs(model, prompt + done.ids, temperature)[len(prompt) - 1 :]
    return (torch.tensor(done.logprobs) - want).abs()
