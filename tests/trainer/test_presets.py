"""Each preset trains: real engine process, real learner, a tiny random model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from areal_agents.settings.config import TrainConfig
from areal_agents.settings.presets import PRESETS
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.loop import train
from tests.tiny_models import tiny_chat_model


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_trains(tmp_path: Path, name: str) -> None:
    config = TrainConfig.model_validate(
        {
            "steps": 2,
            "out": tmp_path / "run",
            "model": {"path": str(tiny_chat_model(tmp_path / "model")), "max_context": 256},
            "env": {"id": "tests.letters_env:Letters"},
            "engine": {"precision": "fp32", "max_batch": 16},
            "algorithm": name,
            "rollout": {"groups": 4, "group_size": 4, "concurrency": 16, "max_turn_tokens": 4},
            "learner": {"lr": 1e-3, "precision": "fp32"},
            "eval": {"n": 2, "baseline": False},
        }
    )
    asyncio.run(train(config, console=False))
    rows = read_metrics(tmp_path / "run", kind="train")
    assert [r["step"] for r in rows] == [1, 2]
    assert all(r["grad_norm"] > 0 and r["skipped"] == 0 for r in rows)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
