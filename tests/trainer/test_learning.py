"""The whole loop learns: real engine process, real learner, asynchronous rollouts, a tiny random model."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest

from areal_agents.algorithms import advantages
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.loop import train
from tests.tiny_models import tiny_chat_model


def config(tmp_path: Path, **rollout: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "steps": 14,
            "out": tmp_path / "run",
            "model": {"path": str(tiny_chat_model(tmp_path / "model")), "max_context": 256},
            "env": {"id": "tests.letters_env:Letters"},
            "engine": {"precision": "fp32", "max_batch": 32},
            "rollout": {
                "groups": 4, "group_size": 8, "concurrency": 32, "max_turn_tokens": 8, "max_staleness": 1,
            }
            | rollout,
            "learner": {"lr": 5e-3, "precision": "fp32"},
            "eval": {"n": 8, "temperature": 1.0},
        }
    )  # fmt: skip


def rewards(tmp_path: Path, **rollout: object) -> list[float]:
    asyncio.run(train(config(tmp_path, **rollout), console=False))
    rows = read_metrics(tmp_path / "run", kind="train")
    assert [r["step"] for r in rows] == list(range(1, 15))
    assert max(r["age_max"] for r in rows) <= 1
    return [r["reward"] for r in rows]


def rise(values: list[float]) -> float:
    return sum(values[-3:]) / 3 - sum(values[:3]) / 3


@pytest.mark.slow
def test_reward_rises(tmp_path: Path) -> None:
    assert rise(rewards(tmp_path)) > 0.2


@pytest.mark.slow
def test_reward_rises_in_sync_mode_with_on_policy_tokens_alone(tmp_path: Path) -> None:
    assert rise(rewards(tmp_path, mode="sync")) > 0.2
    rows = read_metrics(tmp_path / "run", kind="train")
    assert {r["age_max"] for r in rows} == {0.0}


@pytest.mark.slow
def test_reward_falls_when_the_advantage_has_the_wrong_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = advantages.turn_return

    @functools.wraps(right)
    def wrong(*args: object, **kwargs: object) -> object:
        return [-a for a in right(*args, **kwargs)]  # type: ignore[arg-type]

    monkeypatch.setattr("areal_agents.algorithms.advantages.turn_return", wrong)
    assert rise(rewards(tmp_path)) < -0.05
