from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from areal_agents.env import AgentEnv, LazyTasks
from areal_agents.errors import EnvError
from areal_agents.types import AssistantMessage, Info, Observation, Task, Text, user


def make_task(index: int, split: str = "train") -> Task:
    return Task.make(f"{split}-{index}", split=split, seed=index, payload={"n": index})


class Countdown(AgentEnv):
    """Say "go" n times; anything else ends it."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return LazyTasks(100, lambda i: make_task(i, split))

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.left = int(self.begin(seed, options).payload["n"])
        return (user(f"{self.left} {self.np_random.integers(1 << 30)}"),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        if action.text != "go":
            return (), 0.0, True, False, {"stop_reason": "answer"}
        self.left -= 1
        return (user(str(self.left)),), 1.0, self.left <= 0, False, {}


class Empty(AgentEnv):
    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return []


def opening(env: AgentEnv, **kwargs: Any) -> str:
    return asyncio.run(env.areset(**kwargs))[0][0].text


@pytest.mark.filterwarnings("error")
def test_gymnasium_accepts_it() -> None:
    gymnasium.register("areal-test/Countdown-v0", entry_point="tests.test_env:Countdown", disable_env_checker=True)
    check_env(gymnasium.make("areal-test/Countdown-v0").unwrapped)


def test_seed_decides_task_and_noise_without_the_global_generators() -> None:
    env = Countdown()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    first = opening(env, seed=5)
    assert opening(Countdown(), seed=5) == first
    assert opening(env, seed=6) != first
    assert opening(env) != opening(env)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state  # type: ignore[index]


def test_the_task_of_the_options_is_used() -> None:
    env = Countdown()
    assert opening(env, seed=1, options={"task": make_task(7)}).split()[0] == "7"
    assert env.task.id == "train-7"
    with pytest.raises(EnvError, match=r"options\['task'\] must be a Task, got int"):
        opening(env, options={"task": 7})
    with pytest.raises(EnvError, match="is empty"):
        Empty().begin(0, None)


def test_the_synchronous_facade_takes_text_and_messages() -> None:
    env = Countdown()
    observation, _ = env.reset(seed=1, options={"task": make_task(2)})
    assert observation in env.observation_space
    assert env.step("go") == ((user("1"),), 1.0, False, False, {})
    assert env.step(AssistantMessage((Text("go"),)))[2]
    env.close()
    env.close()


def test_what_a_subclass_forgot_is_named() -> None:
    env = AgentEnv()
    for coroutine in (env.areset(), env.astep(AssistantMessage(()))):
        with pytest.raises(NotImplementedError, match="AgentEnv must implement"):
            asyncio.run(coroutine)
    with pytest.raises(NotImplementedError, match="AgentEnv must implement tasks"):
        AgentEnv.tasks("train")
    assert AgentEnv.gold(make_task(1)) is None
    assert AgentEnv.expert(make_task(1)) is None
    assert asyncio.run(env.afinish("context")) == (0.0, {"stop_reason": "context"})


def test_vector_environments_work() -> None:
    envs = gymnasium.vector.SyncVectorEnv([Countdown, Countdown])
    envs.reset(seed=[1, 2], options={"task": make_task(3)})
    _, rewards, terminated, _, _ = envs.step(["go", "stop"])
    assert rewards.tolist() == [1.0, 0.0]
    assert terminated.tolist() == [False, True]
    envs.close()


def test_lazy_tasks() -> None:
    made: list[int] = []

    def make(index: int) -> Task:
        made.append(index)
        return make_task(index)

    tasks = LazyTasks(10, make)
    assert (len(tasks), made) == (10, [])
    assert tasks[3].id == "train-3"
    assert tasks[-1].id == "train-9"
    assert [t.id for t in tasks[7:]] == ["train-7", "train-8", "train-9"]
    assert made == [3, 9, 7, 8, 9]
    assert len(list(tasks)) == 10
    for index in (10, -11):
        with pytest.raises(IndexError, match=f"task {index} of 10"):
            tasks[index]
