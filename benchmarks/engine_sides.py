"""The two sides of ``benchmarks/engine.py``, each in a process of its own:

    python engine_sides.py ours|generate MODEL PRECISION THREADS

A request holds prompts, lengths, the batch size and the second turn's suffix; the answer says how long decoding took
and what was sampled. Loading and starting are outside the timed part on both sides.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from typing import Any

from measured_process import serve

Ids = list[int]


class Ours:
    """``TransformersEngine`` as the trainer uses it: log-probabilities and versions of every token included."""

    def __init__(self, model: str, precision: Any, threads: int) -> None:
        self._settings: dict[str, Any] = {"precision": precision, "threads": threads, "max_context": 512}
        self._model = model
        self._runner = asyncio.Runner()
        self._engine: Any = None
        self._batch = 0
        self._calls = 0

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._runner.run(self._answer(asked))

    async def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        from areal_agents.engines.cpu.engine import TransformersEngine

        if self._batch != asked["batch"]:
            if self._engine is not None:
                await self._engine.close()
            self._engine = await TransformersEngine.start(self._model, max_batch=asked["batch"], **self._settings)
            self._batch = asked["batch"]
        self._calls += 1
        names = [f"{self._calls}/{i}" for i in range(len(asked["prompts"]))]
        start = time.perf_counter()
        sampled = await asyncio.gather(
            *(
                self._conversation(name, prompt, n, asked)
                for name, prompt, n in zip(names, asked["prompts"], asked["lengths"], strict=True)
            )
        )
        seconds = time.perf_counter() - start
        await asyncio.gather(*(self._engine.release(name) for name in names))
        await self._engine.health()  # the releases have been read: the next sample finds no KV of this one
        return {"seconds": seconds, "tokens": sum(map(len, sampled)), "ids": sampled}

    async def _conversation(self, session: str, prompt: Ids, n: int, asked: dict[str, Any]) -> Ids:
        from areal_agents.engine import Sampling
        from areal_agents.types import Prompt

        sampling = Sampling(n, temperature=0.0 if asked["greedy"] else 1.0, stop_ids=())
        context, sampled = tuple(prompt), []
        for suffix in [None] if asked["suffix"] is None else [None, asked["suffix"]]:
            context += tuple(suffix or ())
            done = await self._engine.generate(Prompt(context), sampling, session=session, deadline=600)
            context += done.ids
            sampled += done.ids
        return sampled

    def close(self) -> None:
        if self._engine is not None:
            self._runner.run(self._engine.close())
        self._runner.close()


class Generate:
    """transformers' ``generate``: left padding, one batch after the other, each to its longest completion.

    ``cache``: ``dynamic`` (the default), ``static``, or ``compiled`` (static, with the forward pass compiled).
    ``reuse``: the second turn goes on with the first one's KV cache instead of reading everything again.
    """

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
        self._model.generation_config.eos_token_id = None  # lengths are given
        self._pad = 2
        self._plain = self._model.forward
        names = inspect.signature(self._plain).parameters  # the name differs between releases of transformers
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._compiled: Any = None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        import torch

        if asked["cache"] == "compiled":
            self._compiled = self._compiled or torch.compile(self._plain)
        self._model.forward = self._compiled if asked["cache"] == "compiled" else self._plain
        batch, sampled = asked["batch"], []
        start = time.perf_counter()
        with torch.inference_mode():
            for i in range(0, len(asked["prompts"]), batch):
                sampled += self._batch(asked["prompts"][i : i + batch], asked["lengths"][i : i + batch], asked)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": sum(map(len, sampled)), "ids": sampled}

    def _batch(self, prompts: list[Ids], lengths: list[int], asked: dict[str, Any]) -> list[Ids]:
        import torch
        from transformers import DynamicCache

        width, steps = max(map(len, prompts)), max(lengths)
        ids = torch.tensor([[self._pad] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        options: dict[str, Any] = {"max_new_tokens": steps, "do_sample": not asked["greedy"], "pad_token_id": self._pad}
        if not asked["greedy"]:
            options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if asked["cache"] != "dynamic":
            options["cache_implementation"] = "static"
        if asked["reuse"]:
            options[self._cache_name] = DynamicCache(config=self._model.config)
        out = self._model.generate(ids, attention_mask=mask, **options)
        sampled = [row[:n] for row, n in zip(out[:, width:].tolist(), lengths, strict=True)]
        if asked["suffix"] is None:
            return sampled
        suffix = torch.tensor(asked["suffix"]).expand(len(prompts), -1)
        ids = torch.cat([out, suffix], 1)
        mask = torch.cat([mask, torch.ones(len(prompts), ids.shape[1] - width, dtype=mask.dtype)], 1)
        second = self._model.generate(ids, attention_mask=mask, **options)
        return [a + b for a, b in zip(sampled, second[:, ids.shape[1] :].tolist(), strict=True)]


def main() -> None:
    name, model, precision, threads = sys.argv[1:]
    if name == "ours":
        ours = Ours(model, precision, int(threads))
        try:
            serve(ours)
        finally:
            ours.close()
    else:
        serve(Generate(model, precision, int(threads)))


if __name__ == "__main__":
    main()
