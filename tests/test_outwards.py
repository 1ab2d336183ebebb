"""Our environments in others' hands: Gymnasium's vector environments, and the contract of TRL's environment_factory."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import areal_agents
from areal_agents import Task, ToolEnv, boxed_number, registry, tool
from areal_agents.tool import ToolSpec
from tests.test_examples import example


def vector(*more: Any, **settings: Any) -> Any:
    return example("gymnasium_vector").vector(*more, **settings)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_vector_environment_plays_as_single_ones_do(asynchronous: bool) -> None:
    policy = example("gymnasium_vector").largest_heap
    envs = vector("areal/Nim-v0", 3, asynchronous=asynchronous, sandbox=None)
    alone = [areal_agents.make("areal/Nim-v0", sandbox=None) for _ in range(3)]
    try:
        shown, _ = envs.reset(seed=[4, 5, 6])
        expected = [env.reset(seed=seed)[0] for env, seed in zip(alone, (4, 5, 6), strict=True)]
        ended = 0
        for _ in range(6):
            assert list(shown) == expected
            actions = [policy(seen) for seen in shown]
            shown, rewards, terminated, truncated, infos = envs.step(actions)
            for i, (env, action) in enumerate(zip(alone, actions, strict=True)):
                seen, reward, done, cut, info = env.step(action)
                assert (rewards[i], terminated[i], truncated[i]) == (reward, done, cut)
                if done or cut:  # the last observation and info are not lost
                    assert infos["final_obs"][i] == seen
                    assert infos["final_info"]["stop_reason"][i] == info["stop_reason"] == "answer"
                    assert infos["final_info"]["components"]["won"][i] == info["components"]["won"]
                    ended += 1
                    seen = env.reset()[0]
                expected[i] = seen
        assert ended >= 3
    finally:
        envs.close()
        for env in alone:
            env.close()


def test_the_default_mode_shows_the_last_observation_and_resets_at_the_next_step() -> None:
    task = registry.spec("areal/Questions-v0").tasks("train")[0]
    envs = SyncVectorEnv([lambda: areal_agents.make("areal/Questions-v0")] * 2)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    envs.reset(options={"task": task})
    gold = registry.spec("areal/Questions-v0").gold(task)
    _, rewards, terminated, _, _ = envs.step([gold, "?"])
    assert (rewards.tolist(), terminated.tolist()) == ([1.0, 0.0], [True, True])
    shown, rewards, terminated, _, _ = envs.step(["?", "?"])
    assert (rewards.tolist(), terminated.tolist()) == ([0.0, 0.0], [False, False])
    assert all(seen[-1].role == "user" for seen in shown)
    envs.close()


def test_the_vector_example_plays() -> None:
    envs = vector("areal/Nim-v0", 4, asynchronous=False, sandbox=None)
    rewards = example("gymnasium_vector").play(envs, 40)
    envs.close()
    assert len(rewards) == 40
    assert 0.1 < np.mean(rewards) < 0.8  # measured: 0.41 is what the docs say of this policy


class Shop(ToolEnv):
    """Prices, and an answer at the end."""

    rubric = boxed_number()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        return [
            Task.make(f"{split}-{n}", split=split, seed=n, payload={"item": n, "answer": str(10 * n)}) for n in (1, 2)
        ]

    def prompt(self, task: Task) -> str:
        return f"What does item {task.payload['item']} cost?"

    @tool()
    async def price(self, item: int, unit: typing.Literal["cent", "euro"] = "cent", note: str | None = None) -> str:
        """Look up a price.

        Args:
            item: the number of the item
            unit: what to count in
        """
        self.reward_turn(0.25)
        return f"{10 * item} {unit}"


class Bare(ToolEnv):
    """Nothing to call."""

    rubric = boxed_number()
    tasks = Shop.tasks


class Each(Bare):
    """Tools that are each task's own."""

    def tools_of(self, task: Task) -> Sequence[ToolSpec]:
        return Shop.tools


def test_a_class_for_trl_keeps_its_contract() -> None:
    """As TRL 1.16 looks at it: functions of the class, their hints and docstrings, ``reset(**row)``."""
    trl = example("trl_environment")
    made = trl.trl_environment("tests.test_outwards:Shop", sandbox=None)
    names = [n for n, _ in inspect.getmembers(made, inspect.isfunction) if not n.startswith("_")]
    assert names == ["price", "reset"]
    env = made()
    hints, signature = typing.get_type_hints(env.price), inspect.signature(env.price)
    assert hints["item"] is int
    assert hints["unit"] == typing.Literal["cent", "euro"]
    assert hints["return"] is str
    assert {n: p.default is p.empty for n, p in signature.parameters.items()} == {
        "item": True,
        "unit": False,
        "note": False,
    }
    lines = (inspect.getdoc(env.price) or "").splitlines()
    assert lines[:4] == ["Look up a price.", "", "Args:", "    item: the number of the item"]

    rows = trl.rows("tests.test_outwards:Shop", 5, sandbox=None)
    assert rows[1] == {"prompt": [{"role": "user", "content": "What does item 2 cost?"}], "task": 1}
    envs = [made() for _ in range(4)]
    assert [env.reset(**rows[1]) for env in envs] == [None] * 4
    assert envs[0].price(item=2) == "20 cent"
    assert envs[0].price(item=3, unit="euro") == "30 euro"
    assert "invalid arguments" in envs[1].price(item="two")
    final = [{"role": "assistant", "content": r"\boxed{20}"}]
    half = [{"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "content": "20"}]
    unseen = [{"role": "assistant", "content": "<tool_call>{</tool_call>"}]
    assert trl.score(completions=[final, final, half, unseen], environments=envs, task=[1] * 4) == [1.5, 1.0, 0.0, 0.0]
    assert envs[0].price(item=2) == "The episode is over."
    envs[0].reset(**rows[0])
    assert trl.score([final], [envs[0]]) == [0.0]


def test_what_trl_could_not_play_is_refused() -> None:
    trl = example("trl_environment")
    with pytest.raises(ValueError, match="has no tools: TRL's environments are played by tools alone"):
        trl.trl_environment("tests.test_outwards:Bare", sandbox=None)
    with pytest.raises(ValueError, match="has other tools for each task, and TRL asks for them before"):
        trl.trl_environment("tests.test_outwards:Each", sandbox=None)


def test_a_game_that_a_tool_ends_is_scored_by_its_end() -> None:
    trl = example("trl_environment")
    env = trl.trl_environment("areal/HiddenNumber-v0", difficulty=0.0, sandbox=None)()
    task = registry.spec("areal/HiddenNumber-v0").tasks("train", difficulty=0.0)[0]
    env.reset(**trl.rows("areal/HiddenNumber-v0", 1, difficulty=0.0, sandbox=None)[0])
    assert env.guess(number=task.payload["number"]) == "Found."
    assert trl.score([[{"role": "assistant", "content": "Done."}]], [env]) == [pytest.approx(1.0)]
