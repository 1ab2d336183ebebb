"""The learner of a fine-tuning: the trainer's own, with a step of imitation and one of preferences.

Both use the learner's one optimizer, whose state its checkpoints hold, and each step is a version. So a checkpoint is
one that training can read, and a training that goes on is the uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_agents.algorithms import losses
from areal_agents.algorithms.batch import Row
from areal_agents.algorithms.objective import Tokens
from areal_agents.algorithms.preference import PreferenceTerms, dpo
from areal_agents.finetune.examples import Sequences
from areal_agents.learner.learner import Metrics, TorchLearner
from areal_agents.learner.optim import learning_rate
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.utils.memory import peak_mib


class FinetuneLearner(TorchLearner):
    """A ``TorchLearner`` that imitates sequences, and prefers some to others."""

    def __init__(self, model: Path, *, learner: LearnerConfig, total_steps: int, seed: int) -> None:
        """Load a local model folder. Raises ModelError where this learner cannot train it."""
        super().__init__(
            model, learner=learner, algorithm=AlgorithmConfig(), total_steps=total_steps, seed=seed,
            threads=learner.threads or None,
        )  # fmt: skip

    async def imitate(self, batch: Sequence[Sequences]) -> Metrics:
        """Take one optimizer step on the mean cross-entropy of all targets of the batch."""
        return await self._run(lambda: self._imitate(_numbered(batch)))

    async def prefer(
        self, batch: Sequence[Sequences], reference_E: NDArray[np.float64], *, beta: float, label_smoothing: float
    ) -> Metrics:
        """Take one optimizer step of DPO on pairs.

        Args:
            batch: chosen, rejected, chosen, rejected, …
            reference_E: log π_ref of each, [E].
            beta: how strongly the policy is held to the reference.
            label_smoothing: the assumed share of pairs whose order is wrong.
        """
        rows, reference = _numbered(batch), torch.from_numpy(reference_E)
        return await self._run(lambda: self._prefer(rows, reference, beta, label_smoothing))

    async def sums(self, batch: Sequence[Sequences]) -> NDArray[np.float64]:
        """Compute log π of each sequence, the sum over its targets, [E], without a gradient."""
        rows = _numbered(batch)
        found = await self._run(lambda: self._logprobs(rows, 1.0)[0])
        out = np.zeros(len(batch))
        for row, logprobs in zip(rows, found, strict=True):
            out[row.episode] += float(logprobs[row.mask].astype(np.float64).sum())
        return out

    def _imitate(self, rows: list[Row]) -> Metrics:
        start, total = time.perf_counter(), sum(int(r.mask.sum()) for r in rows)

        def objective(logprobs_T: Tensor, tokens: Tokens) -> Tensor:
            loss_T = losses.cross_entropy(logprobs_T)
            return losses.token_mean(loss_T, torch.ones_like(loss_T, dtype=torch.bool), tokens=total)

        loss, forwarded = self._backward(rows, None, 1.0, objective)
        return self._stepped(rows, start, forwarded) | {"loss": loss}

    def _prefer(self, rows: list[Row], reference_E: Tensor, beta: float, label_smoothing: float) -> Metrics:
        start = time.perf_counter()
        found, before = self._logprobs(rows, 1.0)
        sums_E = torch.zeros_like(reference_E)
        for row, logprobs in zip(rows, found, strict=True):
            sums_E[row.episode] += float(logprobs[row.mask].astype(np.float64).sum())
        sums_E.requires_grad_()
        terms = preference(sums_E, reference_E, beta=beta, label_smoothing=label_smoothing)
        terms.loss_P.mean().backward()  # type: ignore[no-untyped-call]
        assert sums_E.grad is not None
        grad_E = sums_E.grad.float()

        def objective(logprobs_T: Tensor, tokens: Tokens) -> Tensor:
            # Linear in log π, with the loss's own gradient: each token of a sequence has that of the sequence's sum.
            return (logprobs_T * grad_E[tokens.episodes]).sum()

        _, forwarded = self._backward(rows, None, 1.0, objective)
        return self._stepped(rows, start, before + forwarded) | preference_metrics(terms)

    def _stepped(self, rows: Sequence[Row], start: float, forwarded: int) -> Metrics:
        """Take the optimizer's step, and return what every kind of step measures."""
        c = self.config
        lr = learning_rate(self._version, peak=c.lr, total=self.total_steps, warmup=c.warmup_steps, schedule=c.schedule)
        norm = self._apply(self._optimizer, lr)
        self._version += 1
        seconds = time.perf_counter() - start
        return {
            "grad_norm": 0.0 if norm is None else norm,
            "lr": lr,
            "skipped": float(norm is None),
            "tokens": float(sum(int(r.mask.sum()) for r in rows)),
            "rows": float(len(rows)),
            "tokens_forward": float(forwarded),
            "seconds": seconds,
            "tokens_per_second": forwarded / seconds,
            "memory_peak_mb": peak_mib(),
        }


def preference(sums_E: Tensor, reference_E: Tensor, *, beta: float, label_smoothing: float) -> PreferenceTerms:
    """Compute the DPO loss of sequences that stand as chosen, rejected, chosen, rejected, …"""
    return dpo(
        sums_E[0::2], sums_E[1::2], reference_E[0::2], reference_E[1::2], beta=beta, label_smoothing=label_smoothing
    )


def preference_metrics(terms: PreferenceTerms) -> Metrics:
    """Return the means over pairs. Accuracy is the share whose better sequence gained more than its worse one."""
    margin_P = terms.chosen_P - terms.rejected_P
    return {
        "loss": float(terms.loss_P.detach().mean()),
        "accuracy": float((margin_P > 0).double().mean()),
        "margin": float(margin_P.mean()),
        "reward_chosen": float(terms.chosen_P.mean()),
        "reward_rejected": float(terms.rejected_P.mean()),
    }


def _numbered(batch: Sequence[Sequences]) -> list[Row]:
    return [replace(row, episode=i) for i, said in enumerate(batch) for row in said.rows]
