"""What of the vLLM engine needs no vLLM: proofs, checkpoints' shapes, sizes, the guard, the error without it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.engine import TensorEntry, WeightsProbe, WeightsRef
from areal_agents.engines import process_group_reaper
from areal_agents.engines.vllm import cpu_build
from areal_agents.engines.vllm import engine as engine_module
from areal_agents.engines.vllm.adapters import adapter_misfit
from areal_agents.engines.vllm.engine import VLLMEngine
from areal_agents.engines.vllm.worker import engine_args, kv_blocks, kv_bytes
from areal_agents.engines.vllm.worker_extension import expected, misfit
from areal_agents.engines.weights_proof import FIRST_MEAN, Mismatch, Prover
from areal_agents.errors import ConfigError, EngineError
from tests.tiny_models import tiny_config, vllm_model

TRUTH = (-1.0, -2.0, -3.0, -4.0)
REF = WeightsRef(3, "", (), "", 0, probe=WeightsProbe((1, 2, 3, 4, 5), TRUTH))


def off(*gaps: float) -> list[float]:
    return [a + b for a, b in zip(TRUTH, gaps, strict=True)]


def test_fp32_is_held_to_the_largest_difference() -> None:
    prover = Prover("fp32")
    assert prover.check(REF, off(0, 9e-4, 0, -5e-4)).max == pytest.approx(9e-4)
    with pytest.raises(EngineError, match=r"does not serve weights v3: .* max .* above 0\.001"):
        prover.check(REF, off(0, 0, 0, 1.1e-3))
    with pytest.raises(EngineError, match="not finite"):
        prover.check(REF, off(0, 0, 0, float("nan")))
    with pytest.raises(EngineError, match="has 0 log-probabilities, the engine computed 0"):
        Mismatch.of([], [])


def test_bf16_is_held_to_the_mean_difference_of_its_first_load() -> None:
    prover = Prover("bf16")
    with pytest.raises(EngineError, match="mean"):
        prover.check(REF, off(*[FIRST_MEAN * 1.1] * 4))
    prover.check(REF, off(0.02, -0.02, 0.02, 0.02))
    prover.check(REF, off(*[0.07] * 4))
    with pytest.raises(EngineError, match=r"mean .* above 0\.08"):
        prover.check(REF, off(*[0.09] * 4))
    prover.check(REF, off(0.07, 0.07, 0.07, 0.07)[:3])  # a probe longer than the engine's context is cut


def manifest(model: Any) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(name, tuple(p.shape), "float32", 0) for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_complete_or_refused(tied: bool) -> None:
    model = vllm_model("qwen2", tie_word_embeddings=tied)
    shapes, groups = expected(model.config)
    whole = replace(REF, manifest=manifest(model))
    assert misfit(whole, shapes, groups) == ""
    assert ("lm_head.weight" in {entry.name for entry in whole.manifest}) == (not tied)
    text = misfit(replace(whole, manifest=whole.manifest[2:]), shapes, groups)
    assert "2 missing, first" in text
    other = TensorEntry("model.norm.weight", (7,), "float32", 0)
    text = misfit(replace(whole, manifest=(*whole.manifest[:-1], other)), shapes, groups)
    assert "1 of another shape, first model.norm.weight (7,) for (128,)" in text
    text = misfit(replace(whole, manifest=(*whole.manifest, replace_name(other, "x"))), shapes, groups)
    assert text == "they do not fit the served model: 1 unknown, first x"


def test_adapters_fit_the_model_or_are_refused() -> None:
    shapes, groups = expected(vllm_model("qwen2").config)
    known = frozenset({"q_proj", "up_proj"})
    pair = [("lora_A", (4, 128)), ("lora_B", (128, 4))]
    good = tuple(TensorEntry(f"model.layers.0.self_attn.q_proj.{n}.weight", s, "float32", 0) for n, s in pair)

    def said(*entries: TensorEntry, kind: Any = "lora") -> str:
        return adapter_misfit(replace(REF, manifest=entries, kind=kind), shapes, 4, known)

    assert said(*good) == ""
    assert said() == "they hold no adapter"
    assert "whole weights, and this engine was started for adapters" in said(*good, kind="full")
    assert "adapters, and this engine was started for whole" in misfit(replace(REF, kind="lora"), shapes, groups)
    assert said(good[0]).endswith("q_proj has no lora_B")
    other = replace(good[1], shape=(128, 5))
    assert said(good[0], other).endswith("lora_B.weight is (128, 5), and must be (128, 4)")
    foreign = replace_name(good[0], "model.layers.99.self_attn.q_proj.lora_A.weight")
    assert "has no layer of model.layers.99" in said(*good, foreign)
    assert "has no layer of model.norm.weight" in said(*good, replace_name(good[0], "model.norm.weight"))
    unknown = tuple(replace_name(entry, entry.name.replace("q_proj", "o_proj")) for entry in good)
    assert "vLLM has no adapter for model.layers.0.self_attn.o_proj" in said(*good, *unknown)


def replace_name(entry: TensorEntry, name: str) -> TensorEntry:
    return replace(entry, name=name)


def test_the_kv_of_a_cpu_engine_holds_the_asked_tokens_the_probe_and_a_whole_context() -> None:
    assert kv_blocks(1200, 256, 32) == 38 + 8 + 1
    assert kv_blocks(1, 4096, 32) == 128 + 1
    assert kv_bytes(tiny_config(), 4) == 2 * 3 * 2 * 16 * 4
    assert kv_bytes(tiny_config("qwen2"), 2) == 2 * 3 * 2 * 16 * 2


def test_arguments_of_vllm(tmp_path: Path) -> None:
    from areal_agents.engines.protocol import VLLMSettings

    tiny_config().save_pretrained(tmp_path)
    settings = VLLMSettings(str(tmp_path), "fp32", 4, 1200, 4096, 7, None, None, 0.5, 2)
    cpu, _ = engine_args(settings, cpu=True)
    assert (cpu["max_model_len"], cpu["max_num_seqs"], cpu["block_size"]) == (512, 5, 32)
    assert cpu["enforce_eager"]
    assert cpu["kv_cache_memory_bytes"] == kv_blocks(1200, 512, 32) * 32 * 768
    gpu, _ = engine_args(settings, cpu=False)
    assert (gpu["gpu_memory_utilization"], gpu["tensor_parallel_size"], gpu["enforce_eager"]) == (0.5, 2, False)
    assert "kv_cache_memory_bytes" not in gpu
    assert gpu["block_size"] is None
    assert not any("lora" in name for name in gpu)
    adapted, _ = engine_args(replace(settings, lora_rank=17, lora_targets=("layers.0.mlp.up_proj",)), cpu=False)
    assert (adapted["max_lora_rank"], adapted["lora_target_modules"]) == (32, ["up_proj"])
    everywhere, _ = engine_args(replace(settings, lora_rank=512), cpu=True)
    assert "lm_head" not in everywhere["lora_target_modules"]
    assert len(everywhere["lora_target_modules"]) == 7


def test_deterministic_is_vllms_own_mode_on_a_gpu_and_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "vllm")
    monkeypatch.setattr(cpu_build, "is_cpu_build", lambda: True)
    with pytest.raises(ConfigError, match=r"engine\.deterministic with engine\.kind = 'vllm' needs a GPU: .* false"):
        asyncio.run(VLLMEngine.start("anything", deterministic=True))
    monkeypatch.setattr(engine_module, "is_cpu_build", lambda: False)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    for chosen in (True, False):
        env = engine_module._environment("m", Path("sockets"), bind="nobind", threads=1, deterministic=chosen)
        assert env.get("VLLM_BATCH_INVARIANT") == ("1" if chosen else None)


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(ConfigError, match=r"not installed: pip install \"areal-agents\[vllm\]\""):
        asyncio.run(VLLMEngine.start("x"))
    with pytest.raises(ConfigError, match="max_batch must be at least 1, got 0"):
        asyncio.run(VLLMEngine.start("x", max_batch=0))
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization must be in \(0, 1\], got 1\.5"):
        asyncio.run(VLLMEngine.start("x", gpu_memory_utilization=1.5))
    with pytest.raises(ConfigError, match=r"lora_rank must be in 0\.\.512, got 513"):
        asyncio.run(VLLMEngine.start("x", lora_rank=513))


_LEADER = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from process_group_reaper import start_guard
guard = start_guard(sys.argv[2])
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"])
time.sleep(600)
"""


def test_the_guard_ends_a_killed_leaders_children_and_removes_its_folder(tmp_path: Path) -> None:
    source, folder = Path(process_group_reaper.__file__).parent, tmp_path / "sockets"
    folder.mkdir()
    (folder / "one").touch()
    leader = subprocess.Popen([sys.executable, "-S", "-c", _LEADER, source, folder], stdout=subprocess.PIPE, text=True,
                              start_new_session=True)  # fmt: skip
    assert leader.stdout is not None
    with leader:
        assert leader.stdout.readline() == "up\n"
        assert len(process_group_reaper.members(leader.pid)) == 3
        os.kill(leader.pid, signal.SIGKILL)
        leader.wait()
        end = time.monotonic() + 10
        while process_group_reaper.members(leader.pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert process_group_reaper.members(leader.pid) == []
        assert not folder.exists()
