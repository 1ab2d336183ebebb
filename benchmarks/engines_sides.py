"""The sides of ``benchmarks/engines.py``, each in a process of its own:

    python engines_sides.py vllm|transformers|async_llm|generate MODEL PRECISION THREADS

``vllm`` and ``transformers`` are this project's engines as the trainer uses them, ``async_llm`` is vLLM's own
``AsyncLLM`` with the same engine arguments, asked for the same log-probabilities, and ``generate`` is transformers'.
A request with ``update`` decodes and updates the weights in the middle.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine_sides import Generate
from measured_process import serve

Ids = list[int]
MAX_BATCH = 64
SETTINGS: dict[str, Any] = {"max_batch": MAX_BATCH, "kv_tokens": 32_768, "max_context": 512}


class Engine:
    """One of this project's engines, started once; every request is a conversation of one or two turns."""

    def __init__(self, kind: str, model: str, precision: Any, threads: int) -> None:
        self._kind, self._model, self._precision, self._threads = kind, model, precision, threads
        self._runner = asyncio.Runner()
        self._engine: Any = None
        self._weights: list[Any] = []
        self._version = 0
        self._calls = 0

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._runner.run(self._answer(asked))

    async def _start(self) -> None:
        from areal_agents.engines.cpu.engine import TransformersEngine
        from areal_agents.engines.vllm.engine import VLLMEngine

        cls: Any = {"vllm": VLLMEngine, "transformers": TransformersEngine}[self._kind]
        self._engine = await cls.start(self._model, precision=self._precision, threads=self._threads, **SETTINGS)

    async def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._engine is None:
            await self._start()
        self._calls += 1
        names = [f"{self._calls}/{i}" for i in range(len(asked["prompts"]))]
        start = time.perf_counter()
        update = asyncio.create_task(self._update(asked["update"])) if asked.get("update") else None
        sampled = await asyncio.gather(
            *(
                self._conversation(name, prompt, n, asked["suffix"])
                for name, prompt, n in zip(names, asked["prompts"], asked["lengths"], strict=True)
            )
        )
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "tokens": sum(map(len, sampled))}
        if update is not None:
            answer |= await update
        await asyncio.gather(*(self._engine.release(name) for name in names))
        await self._engine.health()
        return answer

    async def _conversation(self, session: str, prompt: Ids, n: int, suffix: Ids | None) -> Ids:
        from areal_agents.engine import Sampling
        from areal_agents.types import Prompt

        context, sampled = tuple(prompt), []
        for more in [None] if suffix is None else [None, suffix]:
            context += tuple(more or ())
            done = await self._engine.generate(Prompt(context), Sampling(n), session=session, deadline=600)
            context += done.ids
            sampled += done.ids
        return sampled

    async def _update(self, asked: dict[str, Any]) -> dict[str, Any]:
        """After ``asked["after"]`` seconds, the same weights as a new version."""
        fill = self._buffers()
        await asyncio.sleep(asked["after"])
        self._version += 1
        start = time.perf_counter()
        ref = await asyncio.to_thread(fill, self._version)
        filled = time.perf_counter()
        report = await self._engine.update_weights(ref, mode=asked["mode"], kv=asked["kv"])
        return {
            "publish_seconds": filled - start, "update_seconds": time.perf_counter() - filled,
            "stopped_seconds": report.seconds, "tokens_recomputed": report.tokens_recomputed,
            "requests_in_flight": report.requests_in_flight,
        }  # fmt: skip

    def _buffers(self) -> Any:
        from safetensors.torch import load_file

        from areal_agents.utils.precision import resolve_precision
        from areal_agents.weights.shared_memory import SharedWeights

        tensors = load_file(f"{self._model}/model.safetensors")
        if not self._weights:
            self._weights = [SharedWeights(tensors, resolve_precision(self._precision)) for _ in range(2)]
        return lambda version: self._weights[version % 2].fill(tensors, version)

    def close(self) -> None:
        if self._engine is not None:
            self._runner.run(self._engine.close())
        for buffer in self._weights:
            buffer.close()
        self._runner.close()


class Bare:
    """vLLM's ``AsyncLLM`` and nothing else, in this process."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        self._settings = (model, precision, threads)
        self._runner = asyncio.Runner()
        self._llm: Any = None
        self._calls = 0

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._runner.run(self._answer(asked))

    async def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._llm is None:
            self._start()
        self._calls += 1
        start = time.perf_counter()
        tokens = await asyncio.gather(
            *(
                self._conversation(f"{self._calls}/{i}", prompt, n, asked["suffix"])
                for i, (prompt, n) in enumerate(zip(asked["prompts"], asked["lengths"], strict=True))
            )
        )
        return {"seconds": time.perf_counter() - start, "tokens": sum(tokens)}

    def _start(self) -> None:
        """With our engine's arguments and environment; it blocks the loop for as long as it takes."""
        from areal_agents.engines import protocol
        from areal_agents.engines.vllm import engine as vllm

        model, precision, threads = self._settings
        self._sockets = tempfile.TemporaryDirectory(prefix="areal-bare-")
        os.environ.update(vllm._environment(model, Path(self._sockets.name), bind="nobind", threads=threads))
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from areal_agents.engines.vllm import worker as vllm_worker

        given = SETTINGS | {"model": model, "precision": precision, "seed": 0}
        settings = protocol.VLLMSettings(
            **given, block_size=None, enforce_eager=None, gpu_memory_utilization=0.9, tensor_parallel_size=1
        )
        arguments, _ = vllm_worker.engine_args(settings, cpu=current_platform.is_cpu())
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def _conversation(self, name: str, prompt: Ids, n: int, suffix: Ids | None) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=1.0, max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        context, tokens = list(prompt), 0
        for turn, more in enumerate([None] if suffix is None else [None, suffix]):
            context += more or []
            async for output in self._llm.generate({"prompt_token_ids": context}, params, f"{name}/{turn}"):
                ids = list(output.outputs[0].token_ids)
            context += ids
            tokens += len(ids)
        return tokens

    def close(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
        self._runner.close()


def main() -> None:
    name, model, precision, threads = sys.argv[1:]
    if name == "generate":
        serve(Generate(model, precision, int(threads)))
        return
    side = Bare(model, precision, int(threads)) if name == "async_llm" else Engine(name, model, precision, int(threads))
    try:
        serve(side)
    finally:
        side.close()


if __name__ == "__main__":
    main()
