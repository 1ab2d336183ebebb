"""Whole runs of one seed, twice: with ``engine.deterministic`` they are the same to the bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from areal_agents.evaluation.evaluate import evaluate
from areal_agents.settings.config import EngineConfig, ModelConfig, RolloutConfig, TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from tests.tiny_models import tiny_chat_model

ENV = "tests.letters_env:Letters"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model") / "m")


def sampled(out: Path, kind: str) -> dict[tuple[int, str], Any]:
    return {
        (r.step, r.trajectory.id): [(t.completion.ids, t.completion.logprobs) for t in r.trajectory.turns]
        for r in read_records(out, kind=kind)
    }


def trained(out: Path, model: Path, *, seed: int = 0, steps: int = 3, concurrency: int = 12) -> dict[Any, Any]:
    tree = {
        "steps": steps, "seed": seed, "out": out, "env": {"id": ENV},
        "model": {"path": str(model), "max_context": 128},
        "engine": {"precision": "fp32", "max_batch": 4, "deterministic": True},
        "learner": {"precision": "fp32", "lr": 3e-3, "minibatches": 2},
        "rollout": {
            "mode": "sync", "groups": 3, "group_size": 4, "concurrency": concurrency, "max_turn_tokens": 16,
        },
        "eval": {"n": 2, "k": 2, "temperature": 1.0, "baseline": False}, "checkpoint": {"every": 1},
        "track": {"tensorboard": False},
    }  # fmt: skip
    asyncio.run(train(TrainConfig.model_validate(tree), resume=out.exists(), console=False))
    return sampled(out, "train") | {("eval", key): turns for key, turns in sampled(out, "eval-after_rl").items()}


@pytest.mark.slow
def test_two_sync_runs_of_one_seed_are_the_same(tmp_path: Path, model: Path) -> None:
    """Tokens, log-probabilities, losses and the last evaluation, although fewer episodes play at once in the second.

    Another seed is another run. A run that is cut after two steps and goes on is the same run.
    """
    one = trained(tmp_path / "one", model)
    two = trained(tmp_path / "two", model, concurrency=5)
    assert len(one) == 3 * 12 + 4
    assert one == two
    losses = [[row["loss"] for row in read_metrics(tmp_path / name, kind="train")] for name in ("one", "two")]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3

    trained(tmp_path / "cut", model, steps=2)
    cut = trained(tmp_path / "cut", model)
    assert {key: turns for key, turns in cut.items() if key[0] != "eval"} == {
        key: turns for key, turns in one.items() if key[0] != "eval"
    }
    assert not set(map(str, one.values())) & set(map(str, trained(tmp_path / "other", model, seed=1).values()))


def test_two_evaluations_of_one_seed_are_the_same(tmp_path: Path, model: Path) -> None:
    def run(name: str, seed: int) -> dict[tuple[int, str], Any]:
        asyncio.run(
            evaluate(
                ENV, model=ModelConfig(path=str(model), max_context=128), n=4, k=3, temperature=1.0, seed=seed,
                out=tmp_path / name, engine=EngineConfig(precision="fp32", max_batch=4, deterministic=True),
                rollout=RolloutConfig(max_turn_tokens=16, group_size=2),
            )
        )  # fmt: skip
        return sampled(tmp_path / name, "eval")

    one, two, other = run("one", 3), run("two", 3), run("other", 4)
    assert len(one) == 12
    assert one == two
    assert not set(map(str, one.values())) & set(map(str, other.values()))  # attempt 1 of 3 is not attempt 0 of 4
