"""The choice of a number format and a device to compute on, made once by the engine and by the learner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from areal_agents.errors import ConfigError

if TYPE_CHECKING:
    import torch  # seconds: a process that only starts an engine does without

Precision = Literal["auto", "bf16", "fp32"]
Format = Literal["bf16", "fp32"]

SLOWER = "3 to 30 times"
"""How much slower bf16 is than fp32 where it is computed in software."""
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@cache
def cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """Return the instruction-set flags of the first CPU, or none where the kernel does not list them."""
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
    """Say whether matrix products in bfloat16 run in hardware (AVX512-BF16 or AMX).

    Only then are they faster than in float32.
    """
    return not _BF16_FLAGS.isdisjoint(cpu_flags() if flags is None else flags)


def is_slow(precision: Precision, *, gpu: bool = False) -> bool:
    """Say whether bf16 was asked for by name where the CPU computes it in software.

    Where the kernel does not list what the CPU has (one that is no x86), nothing is known, and this is False.
    """
    return precision == "bf16" and not gpu and bool(cpu_flags()) and not has_bf16_cpu()


def slow_format_note(settings: Sequence[str]) -> str:
    """Write, as a line for people, what the ``settings`` cost that ask for bf16 where ``is_slow`` says so."""
    named, verb = " and ".join(settings), "is" if len(settings) == 1 else "are"
    return (
        f"note: {named} {verb} bf16, which this processor computes in software (it has neither AVX512-BF16 nor "
        f"AMX-BF16), {SLOWER} slower than fp32: set it to auto, which is fp32 here, or to fp32"
    )


def number_format(precision: Precision = "auto", *, gpu: bool = False) -> Format:
    """Return the format to compute in, and choose one for ``auto``.

    ``auto`` is bf16 on a GPU and where the CPU computes in it, else fp32. Raises ConfigError for any other name.
    """
    if precision == "auto":
        return "bf16" if gpu or has_bf16_cpu() else "fp32"
    if precision in ("bf16", "fp32"):
        return precision
    raise ConfigError(f"precision must be auto, bf16 or fp32, got {precision!r}")


def resolve_precision(precision: Precision = "auto", *, gpu: bool = False) -> torch.dtype:
    """Return ``number_format`` as a dtype of torch, bfloat16 or float32."""
    import torch

    return torch.bfloat16 if number_format(precision, gpu=gpu) == "bf16" else torch.float32


def resolve_device(device: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """Return the device to compute on, and choose one for ``auto``.

    ``auto`` is the first GPU that this process may use, else the CPU. Raises ConfigError for a GPU that is not there.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "learner.device = 'cuda', but torch sees no GPU here: use 'cpu', or install torch's CUDA build and check "
            "nvidia-smi"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
