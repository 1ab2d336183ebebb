"""A run with a kept proximal policy, a measured mask and an off-policy baseline, stopped and resumed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from torch import Tensor

from areal_agents.algorithms.offpolicy import Correction, keeps_proximal, kept
from areal_agents.algorithms.registry import Choice, kept_decay
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


@keeps_proximal("beta")
def own_average(proximal_T: Tensor, behaviour_T: Tensor, *, beta: float = 0.9) -> Correction:
    """Keep a policy by a rule that is not ours."""
    return kept(proximal_T, behaviour_T, decay=beta, scope=None)


@keeps_proximal("beta")
def perhaps(proximal_T: Tensor, behaviour_T: Tensor, *, beta: float | None = None) -> Correction:
    return own_average(proximal_T, behaviour_T, beta=beta or 0.9)


@keeps_proximal("gamma")
def no_such_parameter(proximal_T: Tensor, behaviour_T: Tensor, *, beta: float = 0.9) -> Correction:
    return own_average(proximal_T, behaviour_T, beta=beta)


def test_room_is_asked_for_the_kept_policy_too_whoever_keeps_it(tmp_path: Path) -> None:
    model = tiny_chat_model(tmp_path / "model")
    n, sizes = count_parameters(model), []
    for i, kind in enumerate(("bypass", "decoupled", "kept", f"{__name__}:own_average")):
        tree = {"algorithm": {"correction": kind}, "learner": {"minibatches": 2}}
        c = TrainConfig.model_validate(tree)
        with RunFolder(tmp_path / str(i)) as folder:
            _require_room(c, folder, model, Commit())
            sizes.append(folder.checkpoint_bytes)
    keeps = 12 * n + 12 * (n // 3)
    assert sizes == [12 * n, 12 * n, keeps, keeps]


def test_a_rule_that_keeps_names_its_own_parameter() -> None:
    assert kept_decay(Choice(f"{__name__}:own_average", {"beta": 0.25})) == 0.25
    assert kept_decay(Choice(f"{__name__}:perhaps")) is None  # nothing is kept, and p computed anew
    with pytest.raises(ConfigError, match=r"@keeps_proximal\('gamma'\) names none of its parameters, which are beta"):
        kept_decay(Choice(f"{__name__}:no_such_parameter"))


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
