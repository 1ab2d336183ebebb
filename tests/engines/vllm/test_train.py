"""A whole run with vLLM: the loop, the learner's weights and the engine together. On Ray: tests/cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from tests.engines.vllm.test_server import served_model
from tests.trainer.test_resume import check_lineage, config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def with_vllm(folder: Path, steps: int, **changes: Any) -> TrainConfig:
    """The tests' tiny run, no token older than the learner, with a model that vLLM can serve.

    The model is random: one that is sure of its answers gives all of a group the same reward.
    """
    served_model(folder / "model", teach=False)
    engine = {"kind": "vllm", "precision": "fp32", "max_batch": 8, "kv_tokens": 2048, "hang_timeout": 30.0}
    return config(folder, steps, engine=engine, rollout={"max_staleness": 0}, **changes)


def check_engine(c: TrainConfig, *, after: int = 0) -> None:
    """What vLLM said of its tokens is what the learner computes for them, by versions that do move.

    No token is older than the learner, so every batch is compared unless all its advantages are zero. after: a step
    behind which some must be.
    """
    check_lineage(c, all_tasks=False)
    rows = read_metrics(c.out, kind="train")
    assert {r["age_max"] for r in rows} == {0}
    compared = {r["step"]: r["off_policy/abs_dlogp"] for r in rows if r["off_policy/tokens"]}
    assert len(compared) >= c.steps / 2
    assert max(compared) > after
    assert max(compared.values()) <= 1e-3
    seen = {
        v for r in read_records(c.out, kind="train") for turn in r.trajectory.turns for v in turn.completion.versions
    }
    assert len(seen) > 1


def test_on_this_machine(tmp_path: Path) -> None:
    c = with_vllm(tmp_path, 4)
    asyncio.run(train(c, console=False))
    check_engine(c)
