"""PPO with a critic, whole: real engine process, real learner, a tiny model; V is learned, and so is the task."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from areal_agents import settings
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.types import AssistantMessage, Info, Observation, Task
from tests import doc_blocks
from tests.letters_env import Letters
from tests.trainer.test_learning import config, rise


class Priced(Letters):
    """Letters, where half of the tasks pay 1 more at their end, and say so in the prompt."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        words = {0: "fox fox fox", 1: "dog dog dog"}
        return [
            Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": words[price], "price": price, "of": split})
            for i, price in enumerate((0, 1) * 4)
        ]

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = await super().astep(action)
        return observation, reward + terminated * self.task.payload["price"], terminated, truncated, info


def ppo(tmp_path: Path, *, advantage: Any = "gae", **changes: Any) -> TrainConfig:
    """``changes`` are of the critic's settings, and under ``run`` of the top level."""
    top = {"steps": 20, "env": {"id": f"{__name__}:Priced"}} | changes.pop("run", {})
    algorithm = {"advantage": advantage, "normalize": "batch", "critic": {"kind": "own", "lr": 3e-3} | changes}
    tree = config(tmp_path).model_dump()
    tree["eval"] |= {"n": 2, "baseline": False}
    rollout = tree["rollout"] | top.pop("rollout", {})
    return TrainConfig.model_validate(tree | top | {"algorithm": algorithm, "rollout": rollout})


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    return list(read_metrics(config.out, kind="train"))


@pytest.mark.slow
def test_the_critic_and_the_policy_learn(tmp_path: Path) -> None:
    c = ppo(tmp_path, kind="trunk", lr=1e-2, coefficient=1.0)
    asyncio.run(train(c, console=False))
    explained = [r.get("critic/explained_variance", 0.0) for r in metrics(c)]
    assert explained[0] == 0.0, "V = 0 at first"
    assert max(explained[-6:]) > 0.4, "V knows which tasks pay more"
    # The price is the task's, and no credit of the policy: letters alone must have risen.
    letters: list[list[float]] = [[] for _ in range(c.steps)]
    for record in read_records(c.out, kind="train"):
        letters[record.step - 1].append(record.trajectory.reward - record.trajectory.task.payload["price"])
    assert rise([sum(values) / len(values) for values in letters]) > 0.08
    assert settings.load(c.out / "config.toml") == c
    written = {name for row in metrics(c) for name in row if name.startswith("critic/")}
    assert set(doc_blocks.first_cells(doc_blocks.section("docs/critics.md", "Metrics"))) == written


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_a_run_that_goes_on_has_its_critic_and_cut_episodes_keep_their_tails(tmp_path: Path, kind: str) -> None:
    more: dict[str, Any] = {"advantage": "turn_gae", "kind": kind, "warmup_steps": 1}
    run = {"rollout": {"max_turns": 1, "groups": 2}, "checkpoint": {"every": 1}}
    asyncio.run(train(ppo(tmp_path, **more, run=run | {"steps": 2}), console=False))
    longer = ppo(tmp_path, **more, run=run | {"steps": 3})
    asyncio.run(train(longer, resume=True, console=False))
    rows = metrics(longer)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert [bool(r["critic/value"]) for r in rows] == [False, True, True], "a new critic would say 0"
    assert [bool(r["grad_norm"]) for r in rows] == [False, True, True], "the first step is the critic's"
    episodes = [r.trajectory for r in read_records(longer.out, kind="train")]
    assert all(t.truncated and t.tail is not None and t.tail.parent == 0 for t in episodes)
    exported, begun = (load_file(folder / "model.safetensors") for folder in (longer.out / "model", tmp_path / "model"))
    assert exported.keys() == begun.keys()
