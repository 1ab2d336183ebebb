"""Where the time of one decode step goes, and what it could not go below.

    python engine_profile.py MODEL THREADS          # one JSON object

The decoder runs in this process with clocks around its linear layers, its attention and the sampler; what is left of
a step is norms, rotary positions, activations, residuals and Python. Two floors are measured on the same machine: the
bytes of the weights over the memory's read bandwidth, and the linear layers' operations over the best rate of the same
packed product on many rows.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from areal_agents.engine import Sampling
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.cpu.decoder import CPUDecoder, RowSegment, Weights, pack_linear
from areal_agents.engines.cpu.sampler import sample
from areal_agents.engines.cpu.scheduler import uniform

PROMPT, STEPS, BATCHES = 150, 24, (1, 8, 32)


class Clock:
    """Adds up the seconds inside wrapped functions, by class."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start

        return timed


class TimedDecoder(CPUDecoder):
    """A decoder whose attention is timed."""

    clock: Clock | None = None

    def _forward(self, ids: Tensor, position: Tensor, rows: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        return super()._forward(ids, position, rows, self.clock.wrap("attention", attend) if self.clock else attend)


def timed_weights(weights: Weights, clock: Clock) -> Weights:
    """The same weights with a clock around each linear layer."""
    kinds = ("qkv", "out", "gate_up", "down")
    layers = []
    for layer in weights.layers:
        timed: dict[str, Any] = {kind: clock.wrap("linear", getattr(layer, kind)) for kind in kinds}
        layers.append(replace(layer, **timed))
    return replace(weights, layers=tuple(layers), head=clock.wrap("linear", weights.head))


def step_seconds(decoder: CPUDecoder, batch: int, start: int, clock: Clock | None) -> list[float]:
    """Seconds of each step: decode, then sample."""
    samplings = [Sampling(64)] * batch
    draw = clock.wrap("sampling", sample) if clock else sample
    ids, times = [5] * batch, []
    for i in range(STEPS):
        begin = time.perf_counter()
        uniforms = [uniform(row, i) for row in range(batch)]
        ids, _ = draw(decoder.decode(ids, [start + i] * batch), samplings, uniforms)
        times.append(time.perf_counter() - begin)
    return times


def profile(decoder: TimedDecoder, batch: int) -> dict[str, Any]:
    """One batch size: the plain step, then each class's share of a step with clocks."""
    segments = [RowSegment(row, 0, [7 + row] * PROMPT) for row in range(batch)]
    for i in range(0, batch, 4):
        decoder.prefill(segments[i : i + 4])
    clock, weights = Clock(), decoder.weights
    step_seconds(decoder, batch, PROMPT, None)  # warm-up
    plain = statistics.median(step_seconds(decoder, batch, PROMPT, None))
    decoder.clock, decoder.weights = clock, timed_weights(weights, clock)
    clocked = statistics.mean(step_seconds(decoder, batch, PROMPT, clock))
    decoder.clock, decoder.weights = None, weights
    ms = {kind: 1000 * seconds / STEPS for kind, seconds in clock.seconds.items()}
    ms["norms, rotary, activations, Python"] = 1000 * clocked - sum(ms.values())
    return {
        "batch": batch, "step_ms": round(1000 * plain, 2), "step_with_clocks_ms": round(1000 * clocked, 2),
        "ms": {kind: round(value, 2) for kind, value in ms.items()},
    }  # fmt: skip


def best(function: Callable[[], Any], repeats: int = 7) -> float:
    """Shortest seconds of ``repeats`` calls."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def linear_shapes(shape: Shape) -> list[tuple[int, int, int]]:
    """(how many, inputs, outputs) of the linear layers that one step computes."""
    keyed = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    n, hidden, inner = shape.layers, shape.hidden, shape.parameters["model.layers.0.mlp.gate_proj.weight"][0]
    return [
        (n, hidden, keyed), (n, shape.heads * shape.head_dim, hidden), (n, hidden, 2 * inner), (n, inner, hidden),
        (1, hidden, shape.vocabulary),
    ]  # fmt: skip


def floors(shape: Shape) -> dict[str, Any]:
    """Read bandwidth, the best rate of packed products, and the two floors of a step in milliseconds."""
    big = torch.ones(1 << 27)  # 512 MiB: more than any cache
    bandwidth = big.numel() * 4 / best(big.sum)
    x = torch.randn(2048, 1024, dtype=torch.bfloat16)
    product = pack_linear(torch.randn(3072, 1024), None, torch.bfloat16)
    rate = 2 * 2048 * 1024 * 3072 / best(lambda: product(x))
    weights = sum(n * a * b for n, a, b in linear_shapes(shape))
    rows = [
        {
            "batch": b, "weights_ms": round(1000 * 2 * weights / bandwidth, 2),
            "operations_ms": round(1000 * 2 * weights * b / rate, 2),
        }
        for b in BATCHES
    ]  # fmt: skip
    for row in rows:
        row["floor_ms"] = max(row["weights_ms"], row["operations_ms"])
    return {
        "weights_mib": round(2 * weights / 2**20, 1), "read_gb_per_s": round(bandwidth / 1e9, 1),
        "product_gflop_per_s": round(rate / 1e9, 1), "by_batch": rows,
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    shape = Shape.read(model, 512)
    tensors = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    weights = Weights.build(shape, tensors, torch.bfloat16)
    decoder = TimedDecoder(shape, weights, torch.bfloat16, max_batch=max(BATCHES), max_context=512)
    print(json.dumps({"steps": [profile(decoder, b) for b in BATCHES], "floor": floors(shape)}))


if __name__ == "__main__":
    main()
