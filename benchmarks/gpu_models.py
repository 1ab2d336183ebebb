"""For the GPU's parts: random models in the shapes of Qwen2.5, rows for them, their operations, clocks, memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from gpu_parts import Settings, is_attention
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.learner.packing import Pack
from areal_agents.utils.memory import peak_mib

T = TypeVar("T")
GROUP = 8
"""Rows that share a prompt."""
_SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "3B": {
        "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    },
}  # fmt: skip


def sizes(settings: Settings, full: Sequence[str], quick: Sequence[str]) -> Sequence[str]:
    """Return the names of the models to measure."""
    return ("tiny",) if settings.tiny else quick if settings.quick else full


def model_config(name: str, **changes: Any) -> Qwen2Config:
    """Return the configuration of Qwen2.5 of that size, or of a tiny one, with tied embeddings."""
    return Qwen2Config(
        **(_SHAPES[name] | {"tie_word_embeddings": True, "max_position_embeddings": 131_072} | changes),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def random_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a model whose weights are drawn on ``device``, the same for the same arguments."""
    torch.manual_seed(0)
    with device:
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config(name, **changes), dtype=dtype, attn_implementation="sdpa"
        )
    return made.eval()


def random_rows(tokens: int, vocabulary: int, *, grouped: bool, prompt: int, seed: int = 0) -> tuple[Row, ...]:
    """Return rows that make one pack of ``tokens``: one row, or ``GROUP`` rows behind one ``prompt``."""
    rng = np.random.default_rng(seed)
    rows = GROUP if grouped else 1
    start, length = rng.integers(1, vocabulary, prompt), (tokens - prompt) // rows
    made = []
    for i in range(rows):
        # Another first token each: rows that went on alike would share more than the prompt.
        sampled = np.concatenate([[i % vocabulary], rng.integers(1, vocabulary, length - 1)])
        mask = np.arange(prompt + length) >= prompt
        made.append(
            Row(
                ids=np.concatenate([start, sampled]).astype(np.int64),
                mask=mask,
                logprobs=np.where(mask, -np.log(vocabulary), 0).astype(np.float32),
                versions=np.where(mask, 0, -1).astype(np.int64),
                turns=np.where(mask, 0, -1).astype(np.int64),
                advantages=np.where(mask, 1.0 if i % 2 else -1.0, 0).astype(np.float32),
                episode=i,
            )
        )
    return tuple(made)


def random_batch(packs: int, tokens: int, vocabulary: int, *, version: int) -> Batch:
    """Return a batch of ``packs`` groups, each a pack of ``tokens``, an eighth of it their prompt."""
    rows: list[Row] = []
    for i in range(packs):
        group = random_rows(tokens, vocabulary, grouped=True, prompt=tokens // 8, seed=1000 * version + i)
        rows += [Row(**(vars(row) | {"episode": len(rows) + k})) for k, row in enumerate(group)]
    return Batch(tuple(rows), len(rows), version, 1.0)


def operations(config: Qwen2Config, packs: Sequence[Pack], scored: int) -> float:
    """Return the operations of one forward and backward pass; a backward pass counts twice a forward one.

    Those of the model: what gradient checkpointing computes again is not in it. ``scored``: positions with logits.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    heads, shared = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = config.hidden_size * (2 * heads + 2 * shared) + 3 * config.hidden_size * config.intermediate_size
    forward = 0.0
    for pack in packs:
        pairs = 0
        for segment in pack.segments:
            n = segment.stop - segment.start
            pairs += n * sum(pack.segments[p].stop - pack.segments[p].start for p in segment.path) + n * (n + 1) // 2
        forward += config.num_hidden_layers * (2 * layer * pack.tokens + 4 * heads * pairs)
    return 3 * (forward + 2 * config.vocab_size * config.hidden_size * scored)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object], *, repeats: int = 3, warm: int = 1) -> float:
    """Return the median of the seconds that ``work`` takes, its work on the device included."""
    taken = []
    for i in range(warm + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if i >= warm:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Return the most memory that tensors took on the GPU since ``reset_peak``; on a CPU the process, ever."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(peak_mib() / 1024, 3)


def unless_too_large(work: Callable[[], T]) -> T | None:
    """Return what ``work`` returns, or None where the GPU's memory does not suffice; free what it left."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # its traceback holds tensors until here
    free(torch.device("cuda"))
    return None


def free(device: torch.device) -> None:
    """Give back what nothing uses: models are full of cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernels(device: torch.device, work: Callable[[], object], *, most: int = 12) -> tuple[list[list[Any]], float]:
    """Return what takes longest in ``work``, and the seconds of all: kernels, or on a CPU operations.

    The ``most`` longest, and all of attention, each [name, calls, milliseconds].
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as prof:
        work()
        synchronize(device)
    found = []
    for event in prof.key_averages():
        if not on_gpu:
            found.append([event.key, event.count, event.self_cpu_time_total / 1e3])
        elif event.device_type == DeviceType.CUDA:
            found.append([event.key, event.count, event.self_device_time_total / 1e3])
    found.sort(key=lambda item: -item[2])
    total = sum(item[2] for item in found) / 1e3
    kept = found[:most] + [item for item in found[most:] if is_attention(item[0])]
    return [[name[:120], calls, round(ms, 3)] for name, calls, ms in kept], total
