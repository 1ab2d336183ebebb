"""A run with a greedy episode a group, and one that refills groups, from tasks to files, stopped and resumed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_agents.algorithms.registry import Choice
from areal_agents.errors import Interrupted
from areal_agents.evaluation.look import advantages_of
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.settings.config import AlgorithmConfig, TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer import loop
from areal_agents.trainer.loop import train
from areal_agents.types import AssistantMessage, Info, Observation, Task, Trajectory
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model


class HalfFlat(Letters):
    """Every other task pays 1 whatever is said, so that its groups have no signal. Turns name their state."""

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        shown, info = await super().areset(seed=seed, options=options)
        return shown, {**info, "state_key": "first"}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        shown, reward, terminated, truncated, info = await super().astep(action)
        flat = 0.5 if self.task.seed % 2 else reward + 0.001 * len(action.text)
        return shown, flat, terminated, truncated, {**info, "state_key": "second"}

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(8)]


def config(folder: Path, *, steps: int = 3, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "steps": steps, "out": folder / "run", "env": {"id": "tests.trainer.test_greedy_and_refills:HalfFlat"},
        "model": {"path": str(tiny_chat_model(folder / "model")), "max_context": 128},
        "engine": {"precision": "fp32", "max_batch": 8}, "learner": {"precision": "fp32", "lr": 1e-3},
        "rollout": {"groups": 2, "group_size": 2, "concurrency": 9, "max_turn_tokens": 4},
        "eval": {"n": 2, "baseline": False}, "checkpoint": {"every": 0},
    }  # fmt: skip
    for name, value in changes.items():
        tree[name] = tree.get(name, {}) | value
    return TrainConfig.model_validate(tree)


def by_step(out: Path, kind: str) -> dict[int, list[Trajectory]]:
    found: dict[int, list[Trajectory]] = {}
    for record in read_records(out, kind=kind):
        found.setdefault(record.step, []).append(record.trajectory)
    return found


@pytest.mark.slow
def test_remax_is_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(tmp_path, algorithm={"advantage": "remax", "normalize": "batch", "overlong": "mask"})
    usual = loop._step

    async def stopped(run: Any, step: int, *rest: Any) -> None:
        await usual(run, step, *rest)
        if step == 1:
            await run.rollouts.idle()  # whole groups wait in the checkpoint, with their greedy episodes
            run.stop.request(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", stopped)
        with pytest.raises(Interrupted):
            asyncio.run(train(c, console=False))
    asyncio.run(train(c, resume=True, console=False))
    played, greedy = by_step(c.out, "train"), by_step(c.out, "greedy")
    assert {step: len(ts) for step, ts in played.items()} == {1: 4, 2: 4, 3: 4}
    for step, ts in greedy.items():
        assert {t.id for t in ts} == {f"{t.group}/greedy" for t in played[step]}
        assert {(t.group, t.task.id) for t in ts} == {(t.group, t.task.id) for t in played[step]}
    rows = read_metrics(c.out, kind="train")
    assert [r["episodes"] for r in rows] == [4.0] * 3
    for row in rows:
        ts = greedy[row["step"]]
        assert row["greedy_reward"] == pytest.approx(sum(t.reward for t in ts) / 2)
        assert row["greedy_tokens"] == sum(t.sampled_tokens for t in ts)
        assert row["overlong_masked"] == sum(not t.terminated for t in played[row["step"]]) / 4
    run = SavedRun.open(c.out)
    for record in read_records(c.out, kind="train"):
        assert advantages_of(run, record)[1] == ""


@pytest.mark.slow
def test_a_greedy_episode_is_the_likeliest_one_of_its_weights(tmp_path: Path) -> None:
    """All groups of step 1 are of the first weights: tasks that come twice have one greedy episode."""
    c = config(
        tmp_path, steps=1, rollout={"groups": 12, "concurrency": 3, "mode": "sync"}, algorithm={"advantage": "remax"},
        engine={"deterministic": True},
    )  # fmt: skip
    asyncio.run(train(c, console=False))
    said: dict[str, set[tuple[tuple[int, ...], ...]]] = {}
    for t in by_step(c.out, "greedy")[1]:
        said.setdefault(t.task.id, set()).add(tuple(turn.completion.ids for turn in t.turns))
    assert len(said) == 8  # twelve groups
    assert all(len(ways) == 1 for ways in said.values())
    sampled = {tuple(turn.completion.ids for turn in t.turns) for t in by_step(c.out, "train")[1]}
    assert len(sampled) > 8  # chance does differ


@pytest.mark.slow
def test_groups_without_signal_are_replaced_in_a_run(tmp_path: Path) -> None:
    c = config(
        tmp_path, rollout={"dynamic_sampling": True, "max_refills": 30, "max_turn_tokens": 6},
        algorithm={"advantage": {"kind": "gigpo", "normalize": False}},
    )  # fmt: skip
    asyncio.run(train(c, console=False))
    rows = read_metrics(c.out, kind="train")
    refilled = [r["refilled"] for r in rows]
    assert refilled == sorted(refilled)
    assert refilled[-1] > 0
    assert [r["groups_without_signal"] for r in rows] == [0.0] * 3
    assert all(t.task.seed % 2 == 0 for ts in by_step(c.out, "train").values() for t in ts)
    events = (c.out / "events.jsonl").read_text()
    assert events.count('"group_refilled"') >= refilled[-1]
    assert [r["anchor_size/turn_0"] for r in rows] == [2.0] * 3
    assert all(1.0 <= r["anchor_size"] <= 2.0 and 0.0 < r["anchors_shared"] <= 1.0 for r in rows)


def test_the_settings_are_kept(tmp_path: Path) -> None:
    c = config(tmp_path, rollout={"dynamic_sampling": True}, algorithm={"advantage": "opo", "overlong": "mask"})
    assert c.algorithm == AlgorithmConfig(advantage=Choice("opo"), overlong="mask")
    assert (c.rollout.dynamic_sampling, c.rollout.max_refills, c.algorithm.normalize) == (True, 24, "none")
