"""Which number format to compute in, and on what: asked once by the engine and by the learner."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

from areal_agents.errors import ConfigError

Precision = Literal["auto", "bf16", "fp32"]

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@cache
def cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """Instruction-set flags of the first CPU; empty where the kernel does not list them."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def has_bf16_cpu(flags: frozenset[str] | None = None) -> bool:
    """Whether matrix products in bfloat16 run in hardware (AVX512-BF16 or AMX) and are faster than float32."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags() if flags is None else flags)


def resolve_precision(precision: Precision = "auto", *, gpu: bool = False) -> torch.dtype:
    """``bf16`` and ``fp32`` as asked; ``auto`` is bfloat16 on a GPU and where the CPU computes in it, else float32.

    Raises ConfigError for any other name.
    """
    if precision == "auto":
        return torch.bfloat16 if gpu or has_bf16_cpu() else torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp32":
        return torch.float32
    raise ConfigError(f"precision must be auto, bf16 or fp32, got {precision!r}")


def resolve_device(device: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """``auto``: the first GPU it may use, else the CPU. Raises ConfigError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "learner.device = 'cuda', but torch sees no GPU here: use 'cpu', or install torch's CUDA build and check "
            "nvidia-smi"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
