"""``TransformersEngine``: the Llama family on the CPU, decoded by a process of its own.

    generate ──frames──▶ worker: continuous batching, KV between turns ──frames──▶ reader task ─▶ futures

``areal_agents.engines.process`` says what it waits for, and until when.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from areal_agents.engines import protocol as p
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.process import EngineProcess, environment, require_positive
from areal_agents.utils.precision import Precision, number_format


class TransformersEngine(EngineProcess):
    """An ``Engine`` that decodes the Llama family on the CPU.

    Start it with ``start``. It is an async context manager that closes itself, and belongs to the event loop that
    started it.
    """

    name = "the transformers engine"
    module = "areal_agents.engines.cpu.worker"

    @classmethod
    async def start(
        cls,
        model: str | Path,
        *,
        precision: Precision = "auto",
        max_batch: int = 48,
        kv_tokens: int = 65_536,
        max_context: int = 2048,
        threads: int = 1,
        seed: int = 0,
        deterministic: bool = False,
        shape: Shape | None = None,
    ) -> TransformersEngine:
        """Start a worker that serves ``model`` (a local folder or a hub id) as version 0.

        The batch's KV is address space of max_batch x max_context tokens. A page costs memory once it was used.

        Args:
            model: a local folder or a hub id.
            precision: number format of the products and the KV.
            max_batch: sequences decoded at once.
            kv_tokens: bound on tokens whose KV is kept, running requests (prompt and max_tokens) and idle sessions
                together.
            max_context: longest prompt plus completion in tokens, cut to what the model's positions and the KV allow.
            threads: cores of the worker.
            seed: of the seeds of requests without their own.
            deterministic: compute ``max_batch`` tokens in every pass, so that a turn's tokens and log-probabilities do
                not depend on what else runs, to the bit.
            shape: the model's, for a caller who has read it with this ``max_context``. Only reading it takes
                transformers.

        Raises:
            ConfigError: a setting is out of range.
            ModelError: the model cannot be loaded or computed, or not deterministically on this processor.
            EngineError: the worker does not start.
        """
        require_positive(max_batch=max_batch, kv_tokens=kv_tokens, max_context=max_context, threads=threads)
        number = number_format(precision)
        if shape is None:
            shape = await asyncio.to_thread(Shape.read, model, max_context)
        settings = p.Settings(
            str(model), shape, number, max_batch, kv_tokens, max_context, threads, seed, deterministic
        )
        return await cls.launch(settings, _environment(threads))


def _environment(threads: int) -> dict[str, str]:
    """Return the worker's environment, in which buffers of a step are reused instead of mapped anew."""
    return environment(
        OMP_NUM_THREADS=str(threads), MALLOC_MMAP_THRESHOLD_=str(1 << 28), MALLOC_TRIM_THRESHOLD_=str(1 << 29)
    )
