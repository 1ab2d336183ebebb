"""Runs that train adapters: they learn, go on, and leave a model behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from areal_agents.cli.main import main
from areal_agents.errors import ConfigError
from areal_agents.learner.checkpoint import count_adapters, count_parameters
from areal_agents.settings.config import EngineConfig, LearnerConfig, TrainConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.backend import engine_spec_of, learner_settings
from areal_agents.trainer.loop import train
from tests.trainer.test_learning import config, rise


def with_lora(c: TrainConfig, *, steps: int, resume: bool = False, rank: int = 8, **changes: object) -> TrainConfig:
    tree = c.model_dump(mode="json") | {"steps": steps}
    tree["learner"] |= {"lr": 2e-2, "lora": {"rank": rank, "alpha": 16.0} | changes}
    return TrainConfig.model_validate(tree)


def sharpen(folder: Path) -> None:
    """Make the frozen head's rows long enough that a state can choose one of them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_a_run_with_adapters_learns_goes_on_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = with_lora(config(tmp_path), steps=7)
    sharpen(Path(c.model.path))
    asyncio.run(train(c, console=False))
    saved = sorted((c.out / "checkpoints").glob("step-*/learner/*"))
    assert [f.name for f in saved] == ["adapter_config.json", "adapter_model.safetensors", "learner.pt"]

    for other in (with_lora(c, steps=24, rank=4), with_lora(c, steps=24, targets=["q_proj"])):
        with pytest.raises(ConfigError, match=r"learner\.lora\.(rank|targets) was .*the checkpoint of step 7 used it"):
            asyncio.run(train(other, resume=True, console=False))
    c = with_lora(c, steps=24)
    asyncio.run(train(c, resume=True, console=False))
    rows = read_metrics(c.out, kind="train")
    assert [r["step"] for r in rows] == list(range(1, 25))
    assert rise([r["reward"] for r in rows]) > 0.2
    # What the transformers engine sampled with merged weights, the learner says of its own.
    assert max(r["off_policy/abs_dlogp"] for r in rows if r["age_max"] == 0 and r["off_policy/tokens"]) < 1e-4

    out, base = c.out / "model", AutoModelForCausalLM.from_pretrained(c.model.path)
    merged = AutoModelForCausalLM.from_pretrained(out)
    moved = {n for n, t in merged.state_dict().items() if not torch.equal(t, base.state_dict()[n])}
    assert moved == {n for n in base.state_dict() if n.endswith("_proj.weight")}
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
    flags = ["--eval.n", "8", "--model.max_context", "256", "--rollout.max_turn_tokens", "8"]
    code = main(["eval", "tests.letters_env:Letters", "--model", str(out), "--out", str(tmp_path / "eval"), *flags])
    assert code == 0
    assert json.loads((tmp_path / "eval" / "evaluation.json").read_text())


def test_a_checkpoint_takes_the_room_of_what_trains(tmp_path: Path) -> None:
    c = config(tmp_path)
    model = Path(c.model.path)
    # hidden 64, intermediate 128, 2 layers, keys of 32; the embedding's matrix counts too
    vocabulary = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    matrices = 2 * ((64 + 64) * 2 + (32 + 64) * 2 + (64 + 128) * 3) + vocabulary + 64
    assert count_adapters(model, 3) == 3 * matrices
    assert count_parameters(model) > count_adapters(model, 3)


@pytest.mark.parametrize(
    ("engine", "gpu", "lora", "adapters"),
    [
        ("transformers", True, {"rank": 8}, False),
        ("vllm", False, {"rank": 8}, False),
        ("vllm", True, {"rank": 8}, True),
        ("vllm", True, {"rank": 512}, True),
        ("vllm", True, {"rank": 513}, False),
        ("vllm", True, {"rank": 8, "publish": "merged"}, False),
        ("vllm", False, {"rank": 8, "publish": "adapter"}, True),
        ("vllm", True, {}, False),
    ],
)
def test_what_engines_get_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, gpu: bool, lora: dict[str, object], adapters: bool
) -> None:
    """vLLM on a GPU gets adapters, and is started for them; its build for processors is slow with them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    c = config(tmp_path)
    c = c.model_copy(
        update={
            "engine": EngineConfig.model_validate({"kind": engine, "precision": "fp32"}),
            "learner": LearnerConfig(lora=LoraConfig.model_validate(lora)),
        }
    )
    options = engine_spec_of(c, Path(c.model.path), threads=1).options
    assert learner_settings(c, "shm", threads=1)["publish_adapters"] is adapters
    assert (options.get("lora_rank", 0) > 0) is adapters
