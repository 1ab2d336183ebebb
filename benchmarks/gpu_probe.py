"""The publish probe on a GPU: how far an engine's bf16 is from it, whether that drifts, and whether fp32 agrees.

The learner scores the probe's tokens in fp32 with its weights rounded to bf16. Who computes the same weights in bf16
differs; here that is transformers' own forward, in an engine's place. ``Prover`` measures the first version and holds
the later ones to it: rows ``version`` change the weights as training does, more than it does, and ask it. Row ``fp32``
compares the device with the processor. Random weights: their log-probabilities lie closer together than a trained
model's, so the gap of a trained model is larger (README: 0.036 nats for SmolLM2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpu_models import random_model, seconds, sizes
from gpu_parts import Row, Settings, main

from areal_agents.engine import Probe, WeightsRef
from areal_agents.engines.weights_proof import Mismatch, Prover
from areal_agents.errors import EngineError
from areal_agents.learner.forward import Decoder
from areal_agents.learner.probe import probe, probe_ids

VERSIONS = 6
SCALE = 0.02
"""Each version changes every weight by this share of its size, at random: some thousand steps' worth."""


@torch.no_grad()
def engines_logprobs(model: Any, ids: tuple[int, ...]) -> list[float]:
    """Return log-probabilities of ``ids[1:]`` by a model that computes in its weights' format."""
    row = torch.tensor([ids], device=model.device)
    logits = model(row, use_cache=False).logits[0, :-1].float()
    found: list[float] = torch.log_softmax(logits, -1).gather(1, row[0, 1:, None])[:, 0].tolist()
    return found


def version_rows(name: str, decoder: Decoder, engine: Any) -> Iterator[Row]:
    """Load each version into ``engine``, a bf16 copy, and have it proved."""
    ids = probe_ids(int(decoder.model.config.vocab_size), 0)
    prover, first = Prover("bf16"), None
    device = decoder.device
    torch.manual_seed(0)
    for version in range(VERSIONS):
        with torch.no_grad():
            for ours, theirs in zip(decoder.model.parameters(), engine.parameters(), strict=True):
                if version:
                    ours.mul_(1 + SCALE * torch.randn_like(ours))
                theirs.copy_(ours)
        found = probe(decoder, ids, torch.bfloat16)
        logprobs = engines_logprobs(engine, ids)
        gap = Mismatch.of(logprobs, found.logprobs)
        first = first or gap
        try:
            prover.check(WeightsRef(version, "", (), "", 0, probe=found), logprobs)
            accepted = ""
        except EngineError as error:
            accepted = str(error)
        yield {
            "what": "version", "model": name, "version": version, "mean": float(f"{gap.mean:.3g}"),
            "max": float(f"{gap.max:.3g}"), "over_first": round(gap.mean / first.mean, 2), "refused": accepted,
        }  # fmt: skip
    taken = seconds(device, lambda: probe(decoder, ids, torch.bfloat16))
    yield {"what": "cost", "model": name, "tokens": len(ids), "seconds": round(taken, 4)}


def fp32_row(name: str, decoder: Decoder) -> Row:
    """Compare the probe computed on the device and on the processor, from the same weights."""
    ids = probe_ids(int(decoder.model.config.vocab_size), 1)
    here = probe(decoder, ids, torch.bfloat16)
    model = decoder.model.cpu()
    model.set_attn_implementation("sdpa")  # as a new model has it
    there: Probe = probe(Decoder(model, torch.float32), ids, torch.bfloat16)
    gap = Mismatch.of(here.logprobs, there.logprobs)
    return {"what": "fp32", "model": name, "mean": float(f"{gap.mean:.3g}"), "max": float(f"{gap.max:.3g}")}


def rows(settings: Settings) -> Iterator[Row]:
    device = torch.device(settings.device)
    for name in sizes(settings, ("0.5B", "1.5B", "3B"), ("0.5B",)):
        decoder = Decoder(random_model(name, device), torch.bfloat16)
        engine = random_model(name, device, torch.bfloat16)
        yield from version_rows(name, decoder, engine)
        del engine
        if name in ("tiny", "0.5B"):
            yield fp32_row(name, decoder)
        del decoder


if __name__ == "__main__":
    main(rows)
