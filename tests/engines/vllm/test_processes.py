"""The vLLM worker's processes end with their parent; and a real model, in bf16."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import WeightsProbe
from areal_agents.engines.process_group_reaper import members
from areal_agents.engines.vllm.engine import VLLMEngine
from areal_agents.weights.shared_memory import SharedWeights
from tests.engines.vllm.serving import gaps
from tests.processes import wait_gone
from tests.served import SECONDS, ask
from tests.tiny_models import forward_logprobs, save_tiny, vllm_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

_PARENT = """
import asyncio, sys
from areal_agents.engines.vllm.engine import VLLMEngine

async def main():
    engine = await VLLMEngine.start(sys.argv[1], precision="fp32", max_batch=2, max_context=256, kv_tokens=512,
                                    bind="auto")
    print(engine.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_all_processes_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, vllm_model())
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", _PARENT, str(folder)]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        pids = members(group)
        assert len(pids) >= 4  # the worker, its guard, EngineCore, vLLM's worker, which binds threads
        parent.kill()
    wait_gone(pids, SECONDS)
    assert not members(group)


@pytest.mark.slow
def test_the_embedded_model_in_bf16(smollm2: Path) -> None:
    """|Δ log p| to transformers in fp32; an update with a probe, whose first load sets the bound for later ones."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    rounded = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shared = SharedWeights(rounded, torch.bfloat16)
    prompt = tuple(range(100, 190))
    probe = WeightsProbe(prompt, tuple(forward_logprobs(model, prompt).tolist()))

    async def work() -> Any:
        options: dict[str, Any] = {"precision": "bf16", "max_batch": 8, "kv_tokens": 4096, "max_context": 512}
        async with await VLLMEngine.start(smollm2, **options) as engine:
            for version in (1, 2):
                await engine.update_weights(replace(shared.fill(rounded, version), probe=probe))
            return await asyncio.gather(*[ask(engine, prompt, 64, f"b{i}") for i in range(4)])

    done = asyncio.run(asyncio.wait_for(work(), SECONDS))
    shared.close()
    found = torch.cat([gaps(model, prompt, each) for each in done])
    print("bf16", {"mean": float(found.mean()), "p99": float(found.quantile(0.99)), "max": float(found.max())})
    assert all(each.versions == (2,) * len(each.ids) for each in done)
    assert float(found.mean()) < 0.1
    assert float(found.max()) < 1.0
