"""The whole loop learns: real engine process, real learner, asynchronous rollouts, a tiny random model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from areal_agents import settings
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.loop import train
from tests.algorithms.test_registry import install
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


PACKAGE = """
from areal_agents.algorithms.turn_credit import turn_return
from areal_agents.algorithms.losses import ppo
from areal_agents.algorithms.offpolicy import Correction

def scaled_return(group, *, factor: float):
    return [factor * a for a in turn_return(group)]

def clipped(logprobs_T, old_logprobs_T, advantages_T, *, clip: float = 0.2):
    return ppo(logprobs_T, old_logprobs_T, advantages_T, clip_low=clip, clip_high=clip)

def close(proximal_T, behaviour_T, *, bound: float = 2.0):
    kept_T = (proximal_T - behaviour_T).abs() < bound
    return Correction(kept_T.float(), kept_T)
"""


@pytest.mark.slow
def test_reward_falls_with_an_installed_packages_estimator_of_the_wrong_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss and its correction too: all three by their entry points, and nothing of ours knows them."""
    install(tmp_path, "acme_learning", PACKAGE, {
        "areal_agents.advantages": "scaled_return = acme_learning:scaled_return\n",
        "areal_agents.losses": "clipped = acme_learning:clipped\n",
        "areal_agents.corrections": "close = acme_learning:close\n",
    })  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    algorithm = {
        "advantage": {"kind": "scaled_return", "factor": -1.0}, "loss": "clipped",
        "correction": {"kind": "close", "bound": 3.0},
    }  # fmt: skip
    c = config(tmp_path)
    c = TrainConfig.model_validate({**c.model_dump(), "algorithm": algorithm})
    asyncio.run(train(c, console=False))
    assert rise([r["reward"] for r in read_metrics(tmp_path / "run", kind="train")]) < -0.05
    assert settings.load(tmp_path / "run" / "config.toml") == c
