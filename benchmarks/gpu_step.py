"""A whole learner step: ``TorchLearner`` on groups of rows, by the size of its chunks and packs, and what fits.

A step is two packs, each a group of 8 rows behind a prompt that is an eighth of the pack. The first step of a learner
makes AdamW's moments, the second is measured.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_models import (
    free,
    kernels,
    operations,
    peak_gib,
    random_batch,
    random_model,
    reset_peak,
    sizes,
    synchronize,
    unless_too_large,
)
from gpu_parts import Row, Settings, main

from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.packing import pack_rows
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig

PACKS = 2


def saved_model(name: str, folder: Path, device: torch.device) -> Path:
    """Write a random model in bf16, as models are shared."""
    model = random_model(name, device, torch.bfloat16)
    model.save_pretrained(folder / name)
    del model
    free(device)
    return folder / name


def step_row(made: TorchLearner, device: torch.device, tokens: int, *, profiled: bool) -> Row:
    """One measured step with packs of ``tokens``. Raises torch.OutOfMemoryError."""

    def batch() -> Any:
        return random_batch(PACKS, tokens, made._model.config.vocab_size, version=made.version)

    asyncio.run(made.step(batch()))
    synchronize(device)
    reset_peak(device)
    chosen = batch()
    start = time.perf_counter()
    metrics = asyncio.run(made.step(chosen))
    synchronize(device)  # its own clock stops before the last update has
    taken = time.perf_counter() - start
    packs = pack_rows([row.ids for row in chosen.rows], token_budget=tokens, shared=made._decoder.shared)
    scored = int(sum(row.mask.sum() for row in chosen.rows))
    row: Row = {
        "fits": True, "seconds": round(taken, 4), "packs": len(packs), "scored": scored,
        "tokens_per_s": round(metrics["tokens_forward"] / taken), "peak_gib": peak_gib(device),
        "tflops": round(operations(made._model.config, packs, scored) / taken / 1e12, 3),
        "loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "skipped": metrics["skipped"],
        "tree_chosen": made._decoder.shared,
    }  # fmt: skip
    if profiled:
        again = batch()
        slowest, busy = kernels(device, lambda: asyncio.run(made.step(again)))
        row |= {"kernel_seconds": round(busy, 4), "kernels": slowest}
    return row


def learner_rows(
    name: str, folder: Path, device: torch.device, *, checkpointing: bool, chunks: tuple[int, ...],
    packs: tuple[int, ...], profiled: bool,
) -> Iterator[Row]:  # fmt: skip
    """Rows of one learner: each chunk with the smallest pack, then larger packs until one does not fit."""
    made = TorchLearner(
        folder, algorithm=AlgorithmConfig(), total_steps=1000, seed=0,
        learner=LearnerConfig(device=device.type, gradient_checkpointing=checkpointing, token_budget=packs[0]),
    )  # fmt: skip
    about = {"model": name, "gradient_checkpointing": checkpointing}
    largest, refused = 0, None
    for chunk, tokens in [(c, packs[0]) for c in chunks] + [(chunks[0], t) for t in packs[1:]]:
        made.config = made.config.model_copy(update={"logprob_chunk": chunk, "token_budget": tokens})
        wanted = profiled and (chunk, tokens) == (chunks[0], packs[0])
        found = unless_too_large(lambda tokens=tokens, wanted=wanted: step_row(made, device, tokens, profiled=wanted))
        yield {"what": "step", **about, "chunk": chunk, "pack": tokens, **(found or {"fits": False})}
        if found is None:
            made._optimizer.zero_grad(set_to_none=True)  # what the step left
            free(device)
        if chunk == chunks[0]:
            largest, refused = (tokens, None) if found else (largest, tokens)
            if refused:
                break
    yield {"what": "largest pack", **about, "pack": largest, "next": refused}
    asyncio.run(made.close())


def rows(settings: Settings) -> Iterator[Row]:
    device = torch.device(settings.device)
    chunks = (16, 64) if settings.tiny else (512, 4096) if settings.quick else (512, 2048, 8192)
    packs = (320, 640) if settings.tiny else (8192, 16_384, 32_768, 65_536)
    with tempfile.TemporaryDirectory() as folder:
        for name in sizes(settings, ("1.5B", "0.5B", "3B"), ("1.5B",)):
            source = saved_model(name, Path(folder), device)
            for checkpointing in (True, False):
                yield from learner_rows(
                    name, source, device, checkpointing=checkpointing, chunks=chunks, packs=packs,
                    profiled=name == "1.5B" and device.type == "cuda",
                )  # fmt: skip
                free(device)


if __name__ == "__main__":
    main(rows)
