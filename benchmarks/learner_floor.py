"""What a learner's step could not go below: its matrix products at the best rate that this machine has for them.

    python learner_floor.py MODEL THREADS bf16|fp32          # one JSON object

Counted are the products of all linear layers: forward, and in the backward pass the gradient of the input and that of
the weight, 6 operations a weight and token in all. A decoder's layers see every token that must be computed, a prompt
that rows share once and no padding; the head sees the tokens that train. Each product is timed in the given precision
as PyTorch computes it alone, in the model's own shapes, and its best rate counts. Not counted, so that the floor is
below what can be reached: attention, norms, activations, the softmax, casts of weights, clipping and AdamW.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BODY_ROWS, HEAD_ROWS = (1024, 2048), (256, 512)
"""Tokens of a product: the best rate of these counts."""
REPEATS = 4

Linear = tuple[int, int, int]
"""How many, inputs, outputs."""


def linears(config: Mapping[str, Any]) -> tuple[list[Linear], Linear]:
    """Return the linear layers of a Llama's decoder, and its head."""
    hidden, inner, n = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, shared = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    body = [(n, hidden, heads), (2 * n, hidden, shared), (n, heads, hidden), (2 * n, hidden, inner), (n, inner, hidden)]
    return body, (1, hidden, config["vocab_size"])


def weights(layers: Sequence[Linear]) -> int:
    return sum(n * a * b for n, a, b in layers)


def least_tokens(groups: Sequence[Mapping[str, Any]]) -> int:
    """Return how many tokens a model must compute: each prompt once, and every completion."""
    return sum(len(g["prompt"]) + sum(map(len, g["completions"])) for g in groups)


def floor_seconds(measured: Mapping[str, float], *, tokens: int, scored: int, of: str = "seconds") -> float:
    """Return the seconds of the products for so many tokens in the decoder, and in the head.

    ``of`` is ``cpu_seconds`` for those of all processors, which depend less on what else a machine does.
    """
    return tokens * measured[f"body_{of}_a_token"] + scored * measured[f"head_{of}_a_token"]


def best(work: Callable[[], object]) -> tuple[float, float]:
    """Return the least seconds of some calls, and the least seconds of all processors."""
    work()
    taken, used = [], []
    for _ in range(REPEATS):
        start, cpu = time.perf_counter(), time.process_time()
        work()
        taken.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
    return min(taken), min(used)


def seconds_a_token(layers: Sequence[Linear], rows: Sequence[int], precision: str) -> tuple[float, float]:
    """Return the seconds of one token in these layers, forward and backward, at the best rate of each product.

    They are those of the clock, and those of all processors.
    """
    import torch
    from torch.nn.functional import linear

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    totals = [0.0, 0.0]
    for n, inputs, outputs in layers:
        found = []
        for m in rows:
            x, g = (torch.randn(m, size, dtype=dtype) for size in (inputs, outputs))
            w = torch.randn(outputs, inputs, dtype=dtype)
            products: list[Callable[[], object]] = [
                lambda x=x, w=w: linear(x, w), lambda g=g, w=w: g @ w, lambda g=g, x=x: g.t() @ x
            ]  # type: ignore[misc]  # fmt: skip
            found.append([[seconds / m for seconds in best(product)] for product in products])
        for clock in range(2):
            totals[clock] += n * sum(min(of[clock] for of in product) for product in zip(*found, strict=True))
    return totals[0], totals[1]


def main() -> None:
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    body, head = linears(json.loads((Path(sys.argv[1]) / "config.json").read_text()))
    (decoder, decoder_cpu), (scoring, scoring_cpu) = (
        seconds_a_token(body, BODY_ROWS, sys.argv[3]),
        seconds_a_token([head], HEAD_ROWS, sys.argv[3]),
    )
    print(json.dumps({
        "body_seconds_a_token": decoder, "head_seconds_a_token": scoring,
        "body_cpu_seconds_a_token": decoder_cpu, "head_cpu_seconds_a_token": scoring_cpu,
        "body_weights": weights(body), "head_weights": weights([head]),
        "body_gflop_per_s": round(6 * weights(body) / decoder / 1e9, 1),
        "head_gflop_per_s": round(6 * weights([head]) / scoring / 1e9, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
