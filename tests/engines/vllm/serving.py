"""vLLM engines under test, and what they are compared with. A start takes half a minute of a core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from areal_agents.engines.process_group_reaper import members
from areal_agents.types import Completion
from tests.served import ServedModel
from tests.supervised import Engines, ReusedVLLM
from tests.tiny_models import forward_logprobs

BLOCK = 32
"""Tokens a KV block: what later turns reuse is whole blocks."""
_LIMITS: dict[str, Any] = {"context": 2048, "kv_tokens": 3600, "block": BLOCK, "long": 300, "atol": 2e-4}


def vllm_engines(folder: Path, model: ServedModel) -> Engines:
    """Engines that serve ``model``, which lies in ``folder``."""
    return Engines(ReusedVLLM.start, folder, model, settings={"block_size": BLOCK}, **_LIMITS)


def greedy_by_default(model: Any) -> Any:
    """``model`` with sampling defaults of its own: were vLLM to apply them, no log-probability would be right."""
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.2)
    return model


def core(pid: int) -> int:
    """The process of an engine's group that vLLM calls EngineCore."""
    for member in members(pid):
        if "EngineCore" in Path(f"/proc/{member}/cmdline").read_bytes().decode(errors="replace"):
            return member
    raise ProcessLookupError(f"no EngineCore in the group of {pid}")


def gaps(model: Any, prompt: tuple[int, ...], done: Completion, temperature: float = 1.0) -> torch.Tensor:
    """|Δ log p| of each sampled token to a full forward pass of transformers."""
    want = forward_logprobs(model, prompt + done.ids, temperature)[len(prompt) - 1 :]
    return (torch.tensor(done.logprobs) - want).abs()
