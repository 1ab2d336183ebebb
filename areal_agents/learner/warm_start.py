"""The warm start: imitation of demonstrations, before any reward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from areal_agents.algorithms import losses
from areal_agents.algorithms.batch import Row
from areal_agents.algorithms.objective import Tokens
from areal_agents.learner.contract import Metrics
from areal_agents.learner.passes import Objective, Passes, Scored
from areal_agents.utils.memory import peak_mib


class WarmStart:
    """Imitation with an optimizer of its own, as its moments say nothing about rewards."""

    def __init__(
        self,
        passes: Passes,
        new_optimizer: Callable[[float], torch.optim.AdamW],
        apply: Callable[[torch.optim.AdamW, float], float | None],
    ) -> None:
        """Take the learner's parts.

        Args:
            passes: the way through the policy.
            new_optimizer: makes one for a learning rate.
            apply: steps with an optimizer at a learning rate, and returns the gradient's norm, None where it is not
                finite.
        """
        self._passes, self._new_optimizer, self._apply = passes, new_optimizer, apply
        self._optimizer: torch.optim.AdamW | None = None

    def step(self, rows: Sequence[Row], lr: float) -> Metrics:
        """Take one step on the mean cross-entropy of the masked tokens. Raises ValueError where there is none."""
        start = time.perf_counter()
        total = sum(int(r.mask.sum()) for r in rows)
        if total == 0:
            raise ValueError("the warm start got rows without a masked token: there is nothing to imitate")
        if self._optimizer is None:
            self._optimizer = self._new_optimizer(lr)

        def imitation(scored: Scored, tokens: Tokens) -> Tensor:
            loss_T = losses.cross_entropy(scored.logprobs_T)
            return losses.token_mean(loss_T, torch.ones_like(loss_T, dtype=torch.bool), tokens=total)

        loss, forwarded = self._passes.backward(rows, None, 1.0, Objective(imitation))
        norm = self._apply(self._optimizer, lr)
        return {
            "loss": loss,
            "grad_norm": 0.0 if norm is None else norm,
            "lr": lr,
            "skipped": float(norm is None),
            "tokens": float(total),
            "rows": float(len(rows)),
            "tokens_forward": float(forwarded),
            "seconds": time.perf_counter() - start,
            "memory_peak_mb": peak_mib(),
        }

    def end(self) -> None:
        """Drop the optimizer."""
        self._optimizer = None
