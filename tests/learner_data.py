"""Batches for the learner's tests, and the same training written naively: one row at a time, full logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.algorithms.registry import CORRECTIONS, LOSSES
from areal_agents.settings.config import AlgorithmConfig
from tests.tiny_models import VOCABULARY


def row_logprobs(model: Any, row: Row, temperature: float) -> Tensor:
    """log π of the row's sampled tokens with gradient, from transformers' own forward over this row alone."""
    logits = model(torch.from_numpy(row.ids)[None], use_cache=False).logits[0, :-1].float()
    every = torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.from_numpy(row.ids[1:, None]))[:, 0]
    return every[torch.from_numpy(row.mask[1:])]


def make_batch(
    model: Any, *, groups: int = 2, size: int = 3, prompt: int = 24, version: int = 0, temperature: float = 0.7,
    noise: float = 0.6, seed: int = 0, versions: Sequence[int] = (0,),
) -> Batch:  # fmt: skip
    """Groups that share prompts, two turns an episode, one forked episode; log μ is log π plus noise.

    Episode 1 has advantages of 0 and the last episode of the batch has no row.
    """
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for episode in range(groups * size):
        if episode % size == 0:
            start = rng.integers(0, VOCABULARY, prompt)
        first, shown = rng.integers(0, VOCABULARY, rng.integers(3, 8)), rng.integers(0, VOCABULARY, 3)
        for fork in range(2 if episode == 2 else 1):
            second = rng.integers(0, VOCABULARY, rng.integers(2, 30))
            ids = np.concatenate([start, first, shown, second])
            mask = np.zeros(len(ids), np.bool_)
            turns = np.full(len(ids), -1, np.int64)
            ends = np.cumsum([prompt, len(first), len(shown), len(second)])
            mask[ends[2] :], turns[ends[2] :] = True, 1 + fork
            if fork == 0:
                mask[ends[0] : ends[1]], turns[ends[0] : ends[1]] = True, 0
            advantage = rng.normal(size=2).astype(np.float32) * (0.0 if episode == 1 else 1.0)
            rows.append(
                Row(
                    ids=ids,
                    mask=mask,
                    logprobs=np.zeros(len(ids), np.float32),
                    versions=np.where(mask, rng.choice(np.asarray(versions), len(ids)), -1),
                    turns=turns,
                    advantages=np.where(mask, advantage[np.clip(turns, 0, 1)], 0).astype(np.float32),
                    episode=episode,
                )
            )
    with torch.no_grad():
        for row in rows:
            found = row_logprobs(model, row, temperature).numpy()
            row.logprobs[row.mask] = found + noise * rng.normal(size=len(found))
    return Batch(tuple(rows), groups * size + 1, version, temperature)


def naive_loss(
    model: Any, batch: Batch, rows: Sequence[int], episodes: int, a: AlgorithmConfig,
    proximal: Sequence[NDArray[np.float32]] | None = None, max_staleness: int | None = None,
) -> Tensor:  # fmt: skip
    """The PPO loss of a minibatch as the formulas say it, without any of the package's functions."""
    low, high, dual = (LOSSES.options(a.loss)[name] for name in ("clip_low", "clip_high", "dual_clip"))
    correction = {"truncate": None, **CORRECTIONS.options(a.correction)}
    truncate, token_mask = correction["truncate"], correction["token_mask"]
    per_episode: dict[int, int] = {}
    for i in rows:
        per_episode[batch.rows[i].episode] = per_episode.get(batch.rows[i].episode, 0) + int(batch.rows[i].mask.sum())
    total = torch.zeros(())
    for i in rows:
        row = batch.rows[i]
        mu, adv = torch.from_numpy(row.logprobs[row.mask]), torch.from_numpy(row.advantages[row.mask])
        pi = row_logprobs(model, row, batch.temperature)
        p = mu if proximal is None else torch.from_numpy(proximal[i][row.mask])
        r = torch.exp(pi - p)
        surrogate = torch.maximum(-r * adv, -r.clamp(1 - low, 1 + high) * adv)
        surrogate = torch.where(adv < 0, torch.minimum(dual * adv.abs(), surrogate), surrogate)
        u = torch.exp((pi if proximal is None else p) - mu).detach()
        weight = torch.ones_like(u) if proximal is None else (u if truncate is None else u.clamp(max=truncate))
        if token_mask is not None:
            weight = weight * ((u >= token_mask[0]) & (u <= token_mask[1]))
        if max_staleness is not None:
            weight = weight * torch.from_numpy(batch.version - row.versions[row.mask] <= max_staleness)
        if a.aggregation == "token":
            total = total + (weight * surrogate).sum() / sum(per_episode.values())
        else:
            total = total + (weight * surrogate).mean() * (len(mu) / per_episode[row.episode]) / episodes
    return total
