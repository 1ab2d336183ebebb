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
    """Make AdamW (1711.05101) over the model's parameters.

    Parameters with fewer than two dimensions have no decay. They are biases and the scales of norms. ``fused`` reads
    and writes each number once, which is what an update costs on a CPU.

    Args:
        model: its parameters that require a gradient are trained.
        lr: the learning rate.
        weight_decay: of parameters with two dimensions or more.
        betas: decay rates of the first and second moments.
        eps: is added to the denominator of an update.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: Schedule) -> float:
    """Return the learning rate of one step.

    The warm-up is peak·(step + 1)/warmup while step < warmup, so that the first step is not lost. After it, with x the
    share of the remaining steps that is done (0 at the first, 1 after the last):

        constant    peak
        linear      peak·(1 − x)
        cosine      peak·(1 + cos πx)/2

    Args:
        step: from 0. Steps past ``total`` get the last step's rate.
        peak: the highest rate.
        total: steps of the whole run, the warm-up included.
        warmup: steps of the warm-up.
        schedule: the course after the warm-up.

    Raises:
        ValueError: the step is negative.
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
