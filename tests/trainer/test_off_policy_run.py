"""A run with a kept proximal policy, a measured mask and an off-policy baseline, stopped and resumed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from areal_agents.errors import ConfigError
from areal_agents.learner.checkpoint import count_parameters
from areal_agents.learner.proximal import PROXIMAL
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.loop import train
from areal_agents.trainer.run import _require_room
from areal_agents.trainer.run_folder import Commit, RunFolder
from tests.tiny_models import tiny_chat_model
from tests.trainer.test_greedy_and_refills import config

CHOSEN = {
    "advantage": "opob", "overlong": "mask", "entropy": 0.01,
    "correction": {"kind": "kept", "decay": 0.5}, "mask": "geometric",
}  # fmt: skip


def test_room_is_asked_for_the_kept_policy_too(tmp_path: Path) -> None:
    model = tiny_chat_model(tmp_path / "model")
    n, sizes = count_parameters(model), []
    for kind in ("bypass", "kept"):
        c = TrainConfig.model_validate({"algorithm": {"correction": kind}})
        with RunFolder(tmp_path / kind) as folder:
            _require_room(c, folder, model, Commit())
            sizes.append(folder.checkpoint_bytes)
    assert sizes == [12 * n, 12 * n + 12 * (n // 3)]


@pytest.mark.slow
def test_it_is_stopped_and_resumed(tmp_path: Path) -> None:
    c = config(tmp_path, steps=2, algorithm=CHOSEN, checkpoint={"every": 1}, learner={"minibatches": 2})
    asyncio.run(train(c, console=False))
    (saved,) = (c.out / "checkpoints").glob(f"*/**/{PROXIMAL}")
    assert saved.stat().st_size > 1000
    asyncio.run(train(c.model_copy(update={"steps": 3}), console=False, resume=True))
    rows = read_metrics(c.out, kind="train")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert len({r["engine_noise"] for r in rows}) == 1
    assert 0.0 <= rows[0]["engine_noise"] < 1e-3, "both compute in fp32"
    assert all(1 <= r["minibatches"] <= 2 for r in rows)
    other = c.model_copy(update={"steps": 4, "algorithm": config(tmp_path, algorithm={"advantage": "opo"}).algorithm})
    with pytest.raises(ConfigError, match=r"algorithm\.correction\.kind was 'kept' and is 'bypass' now"):
        asyncio.run(train(other, console=False, resume=True))
