"""How far the engines' log-probabilities are from the learner's, on tokens that the engines sampled.

    python benchmarks/mismatch.py [--json benchmarks/results/mismatch.json]     # after `make vllm`; a few minutes
    python benchmarks/mismatch.py --quick                                       # fewer tokens

Each engine samples conversations of two turns at temperature 1, in fp32 and in bf16; the second turn goes on with the
KV of the first. The learner computes the same tokens' log-probabilities with the same weights, in the same precision.
Recorded: |Δ log p| in nats, its mean, 99th percentile and maximum. Goal: at most 1e-3 in fp32; bf16 is reported.
It does not matter what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
from measure import Progress, table
from record import Check, write
from workload import Case, Prompts

from areal_agents.algorithms.batch import Batch, rows_of
from areal_agents.engine import Sampling
from areal_agents.engines.spec import EngineSpec
from areal_agents.learner.learner import TorchLearner
from areal_agents.models import resolve
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.types import AssistantMessage, Prompt, Task, Trajectory, Turn
from areal_agents.utils.precision import resolve_precision

GOAL = 1e-3
KINDS = ("vllm", "transformers")
PRECISIONS = ("fp32", "bf16")
SETTINGS: dict[str, Any] = {
    "max_batch": 16,
    "kv_tokens": 16_384,
    "max_context": 512,
    "threads": len(os.sched_getaffinity(0)),
}
TASK = Task.make("mismatch", split="train", seed=0, payload={})


async def sampled(spec: EngineSpec, prompts: Prompts, n: int, tokens: int) -> list[Trajectory]:
    """``n`` conversations of two turns of ``tokens`` each."""
    engine = await spec.start(0)

    async def talk(index: int, first: list[int]) -> Trajectory:
        turns: list[Turn] = []
        context: tuple[int, ...] = ()
        for k, suffix in enumerate((tuple(first), tuple(prompts.suffix()))):
            context += suffix
            done = await engine.generate(Prompt(context), Sampling(tokens), session=f"s{index}", deadline=600)
            context += done.ids
            turns.append(Turn(suffix, done, AssistantMessage(()), 0.0, parent=None if k == 0 else k - 1))
        return Trajectory(f"e{index}", TASK, "g", tuple(turns), True, False, "answer")

    try:
        return await asyncio.gather(*(talk(i, ids) for i, ids in enumerate(prompts.first(Case(n, turns=2)))))
    finally:
        await engine.close()


async def gaps(model: str, precision: Any, played: list[Trajectory]) -> list[float]:
    """|log p of the learner - log p of the engine| of every sampled token, in nats."""
    learner = TorchLearner(
        model, learner=LearnerConfig(precision=precision), algorithm=AlgorithmConfig(), total_steps=1,
        publish_dtype=resolve_precision(precision),
    )  # fmt: skip
    try:
        rows = tuple(row for i, t in enumerate(played) for row in rows_of(t, [0.0] * len(t.turns), episode=i))
        found = await learner.logprobs(Batch(rows, len(played), 0, 1.0))
    finally:
        await learner.close()
    apart = [np.abs(ours - row.logprobs)[row.mask] for ours, row in zip(found, rows, strict=True)]
    return [float(x) for x in np.concatenate(apart)]


def summarize(kind: str, precision: str, apart: list[float]) -> dict[str, Any]:
    """One row of the table."""
    values = np.array(apart)
    return {
        "engine": kind, "precision": precision, "tokens": len(apart), "mean": float(f"{values.mean():.3g}"),
        "p99": float(f"{np.quantile(values, 0.99):.3g}"), "max": float(f"{values.max():.3g}"),
    }  # fmt: skip


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    return [
        Check(f"max |Δ log p| of {r['engine']} to the learner in fp32", r["max"], f"<= {GOAL:g}", r["max"] <= GOAL)
        for r in rows
        if r["precision"] == "fp32"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    model = str(resolve(options.model))
    prompts = Prompts(model)
    n, tokens = (4, 16) if options.quick else (16, 64)
    progress = Progress(len(KINDS) * len(PRECISIONS))
    rows, raw = [], []
    for kind in KINDS:
        for precision in PRECISIONS:
            spec = EngineSpec(kind, model, SETTINGS | {"precision": precision})
            apart = asyncio.run(gaps(model, precision, asyncio.run(sampled(spec, prompts, n, tokens))))
            rows.append(summarize(kind, precision, apart))
            raw.append({"engine": kind, "precision": precision, "gaps": [float(f"{x:.3g}") for x in apart]})
            progress(f"{kind}, {precision}: max {rows[-1]['max']:g}")
    print(table(rows))
    found = checks(rows)
    write(options.json, "mismatch", raw, found, rows=rows)
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
