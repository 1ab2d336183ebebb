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
from areal_agents.learner.contract import Metrics
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.optim import learning_rate
from areal_agents.learner.passes import Objective, Scored
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.utils.memory import peak_mib


class FinetuneLearner(TorchLearner):
    """A ``TorchLearner`` that imitates sequences, and prefers some to others."""

    def __init__(self, model: Path, *, learner: LearnerConfig, total_steps: int, seed: int, threads: int) -> None:
        """Load a local model folder, to compute on ``threads`` cores. Raises ModelError where it cannot be trained."""
        super().__init__(
            model, learner=learner, algorithm=AlgorithmConfig(), total_steps=total_steps, seed=seed,
            threads=threads,
        )  # fmt: skip

    async def imitate(self, batch: Sequence[Sequences]) -> Metrics:
        """Take one optimizer step on the mean cross-entropy of all targets of the batch."""
        return await self._run(lambda: self._imitate([row for said in batch for row in said.rows]))

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
        rows, reference = _paired(batch), torch.from_numpy(reference_E)
        return await self._run(lambda: self._prefer(rows, reference, beta, label_smoothing))

    async def sums(self, batch: Sequence[Sequences]) -> NDArray[np.float64]:
        """Compute log π of each sequence, the sum over its targets, [E], without a gradient."""
        rows = [replace(row, episode=i) for i, said in enumerate(batch) for row in said.rows]
        found = await self._run(lambda: self._passes.logprobs(rows, 1.0)[0])
        out = np.zeros(len(batch))
        for row, logprobs in zip(rows, found, strict=True):
            out[row.episode] += float(logprobs[row.mask].astype(np.float64).sum())
        return out

    def _imitate(self, rows: Sequence[Row]) -> Metrics:
        start, total = time.perf_counter(), sum(int(r.mask.sum()) for r in rows)

        def imitation(scored: Scored, tokens: Tokens) -> Tensor:
            loss_T = losses.cross_entropy(scored.logprobs_T)
            return losses.token_mean(loss_T, torch.ones_like(loss_T, dtype=torch.bool), tokens=total)

        loss, forwarded = self._passes.backward(rows, None, 1.0, Objective(imitation))
        return self._stepped(rows, start, forwarded) | {"loss": loss}

    def _prefer(self, rows: Sequence[Row], reference_E: Tensor, beta: float, label_smoothing: float) -> Metrics:
        start, pairs = time.perf_counter(), len(reference_E) // 2
        seen: list[PreferenceTerms] = []

        def preferences(scored: Scored, tokens: Tokens) -> Tensor:
            pair_P, at_T = torch.unique(tokens.episodes, return_inverse=True)
            sums_E = torch.zeros(2 * len(pair_P), dtype=torch.float64)
            worse_T = (tokens.advantages < 0).long()
            sums_E = sums_E.index_add(0, 2 * at_T + worse_T, scored.logprobs_T.double())
            chosen = torch.stack([2 * pair_P, 2 * pair_P + 1], dim=1).flatten()
            terms = preference(sums_E, reference_E[chosen], beta=beta, label_smoothing=label_smoothing)
            seen.append(terms)
            return terms.loss_P.sum() / pairs

        _, forwarded = self._passes.backward(rows, None, 1.0, Objective(preferences, scope="episode"))
        whole = PreferenceTerms(*(torch.cat(column).detach() for column in zip(*seen, strict=True)))
        return self._stepped(rows, start, forwarded) | preference_metrics(whole)

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


def _paired(batch: Sequence[Sequences]) -> list[Row]:
    """Return the rows of chosen, rejected, chosen, …: a pair is an episode, its better side has advantages of 1."""
    return [
        replace(row, episode=i // 2, advantages=np.where(row.mask, 1.0 - 2.0 * (i % 2), 0.0).astype(np.float32))
        for i, said in enumerate(batch)
        for row in said.rows
    ]
