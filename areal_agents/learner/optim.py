"""AdamW's parameter groups and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


def adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (1711.05101) over the model's parameters; those with fewer than two dimensions have no decay.

    One-dimensional parameters are biases and the scales of norms. ``fused`` reads and writes each number once, which
    is what an update costs on a CPU.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: Schedule) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``.

    Warm-up: peak·(step + 1)/warmup while step < warmup, so that the first step is not lost. After it, with x the share
    of the remaining steps that is done (0 at the first, 1 after the last): ``linear`` peak·(1 − x), ``cosine``
    peak·(1 + cos πx)/2. Steps past ``total`` get the last step's rate. Raises ValueError for a negative step.
    """
    if step < 0:
        raise ValueError(f"step = {step} must not be negative")
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (min(step, total - 1) - warmup) / max(total - warmup, 1)
    done = max(done, 0.0)
    return peak * (1.0 - done) if schedule == "linear" else peak * 0.5 * (1.0 + math.cos(math.pi * done))
