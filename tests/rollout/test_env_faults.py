"""Whose failure it is: what one task's environment shows or raises costs that task, and never ends the run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from areal_agents.chat_model import ContentFiltered, MessageRefused
from areal_agents.engine import Sampling
from areal_agents.engines.openai.messages import request_messages
from areal_agents.env import AgentEnv
from areal_agents.errors import (
    ArealError,
    CheckError,
    CheckpointError,
    ConfigError,
    FailureBudgetError,
    Interrupted,
    LearnerLost,
    ModelError,
    RegistryError,
    SandboxUnavailable,
    TemplateError,
)
from areal_agents.evaluation.attempts import run_attempts
from areal_agents.rollout.chat_policy import ChatPolicy
from areal_agents.rollout.episode import EpisodeDriver, Policy
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Image, Info, Message, Observation, Task, Text, user
from tests.scripted import FMT, LIMITS, ScriptedPolicy

HI: Observation = (user("hi"),)
GO_ON: Observation = (user("go on"),)
PICTURE = (Message("user", (Image("/tmp/x.png"),)),)
Act = Callable[[], None]
TASK = Task.make("t", split="test", seed=0, payload={})


class Chat:
    """A model that reads what a server would be sent, and whose filter refuses a word."""

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AssistantMessage:
        request_messages(messages)
        if "forbidden" in messages[0].text:
            raise ContentFiltered("the server's filter refused the conversation")
        return AssistantMessage((Text("hello"),))


def ask(task: Task) -> Policy:
    return ChatPolicy(Chat(), Sampling(20), LIMITS)


def sample(task: Task) -> Policy:
    return ScriptedPolicy(FMT.encode_turn("hello"))


def play(
    policy: Callable[[Task], Policy],
    *,
    first: Observation = HI,
    second: Observation = GO_ON,
    act: Act = lambda: None,
) -> tuple[list[float | None], EpisodeRunner]:
    """Play three tasks, of which the middle one shows and does this, and return rewards and the runner."""

    class Env(AgentEnv):
        async def areset(
            self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
        ) -> tuple[Observation, Info]:
            self.begin(seed, options)
            self.k = 0
            return (first if self.task.seed == 1 else HI), {}

        async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
            self.k += 1
            if self.task.seed == 1:
                act()
            if self.k == 2:
                return (), 1.0, True, False, {}
            return (second if self.task.seed == 1 else GO_ON), 0.0, False, False, {}

    async def main() -> tuple[list[float | None], EpisodeRunner]:
        runner = EpisodeRunner(LocalPlayer(Env, policy, LIMITS), FailureBudget(window=64, share=0.25), max_retries=2)
        tasks = [Task.make(f"t{i}", split="test", seed=i, payload={}) for i in range(3)]
        try:
            played = await run_attempts(runner, tasks, k=1, concurrency=1, seed=0, label="test")
        finally:
            await runner.close()
        return [None if t is None else t.reward for _, tries in played for t in tries], runner

    return asyncio.run(main())


@pytest.mark.parametrize("policy", [sample, ask])
@pytest.mark.parametrize("later", [False, True])
def test_an_observation_that_cannot_be_shown_costs_its_task_alone(
    policy: Callable[[Task], Policy], later: bool
) -> None:
    rewards, runner = play(policy, second=PICTURE) if later else play(policy, first=PICTURE)
    assert rewards == [1.0, None, 1.0]
    assert list(runner.left_out) == ["t1"]
    assert ("task t1, turn 1: the observation" if later else "task t1: the first prompt") in runner.left_out["t1"]
    assert runner.budget.kinds.total() == 0


def test_a_first_prompt_that_the_servers_filter_refuses_is_the_tasks() -> None:
    rewards, runner = play(ask, first=(user("forbidden"),))
    assert rewards == [1.0, None, 1.0]
    assert "the server's filter refuses the first prompt" in runner.left_out["t1"]
    assert runner.budget.kinds.total() == 0


def raising(error: ArealError) -> Act:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error", [TemplateError, CheckError, CheckpointError, Interrupted, FailureBudgetError, LearnerLost, MessageRefused]
)
def test_an_error_that_does_not_say_whose_it_is_is_the_environments(error: type[ArealError]) -> None:
    rewards, runner = play(sample, act=raising(error("a judge's")))
    assert rewards == [1.0, None, 1.0]
    assert f"astep (task t1, turn 0) raised {error.__name__}: a judge's" in runner.left_out["t1"]


@pytest.mark.parametrize(
    "error", [ConfigError("no key"), RegistryError("no such"), ModelError("none"), SandboxUnavailable("b", "p", "r")]
)
def test_an_error_of_the_settings_ends_the_run_at_once(error: ArealError) -> None:
    with pytest.raises(type(error)):
        play(sample, act=raising(error))


class OneStep(AgentEnv):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        return HI, {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        return (), 1.0, True, False, {}


def test_a_failing_aclose_costs_no_episode_and_is_told() -> None:
    class Env(OneStep):
        async def aclose(self) -> None:
            raise RuntimeError("still open")

    told: list[tuple[str, dict[str, object]]] = []

    async def main() -> float:
        player = LocalPlayer(Env, sample, LIMITS, event=lambda kind, **fields: told.append((kind, fields)))
        try:
            return (await player.play(TASK, id="e", group="g", seed=0)).reward
        finally:
            await player.close()

    assert asyncio.run(main()) == 1.0
    ((kind, fields),) = told
    assert (kind, fields["episode"], fields["task"]) == ("env_close_failed", "e", "t")
    assert "aclose (task t, turn 0) raised RuntimeError: still open" in str(fields["detail"])


def test_an_episode_that_is_cancelled_while_it_closes_closes_its_environment() -> None:
    """Where one failure ends the run, others have failed too and are closing: what they hold must not stay open."""
    closed: list[str] = []

    class Env(OneStep):
        async def aclose(self) -> None:
            await begun()
            closed.append("begun")
            await asyncio.sleep(0.0)
            closed.append("closed")

    async def begun() -> None:
        """Tell the other loop, and wait until it has cancelled the episode."""
        loop.call_soon_threadsafe(cut)
        await asyncio.to_thread(cancelled.wait)

    def cut() -> None:
        playing.cancel()
        asked.set()

    loop: asyncio.AbstractEventLoop
    asked: asyncio.Event
    playing: asyncio.Task[Any]
    cancelled = threading.Event()

    async def main() -> None:
        nonlocal loop, playing, asked
        loop, asked = asyncio.get_running_loop(), asyncio.Event()
        player = LocalPlayer(Env, sample, LIMITS)
        playing = asyncio.create_task(player.play(TASK, id="e", group="g", seed=0))
        await asked.wait()
        await asyncio.sleep(0)  # the cancellation has reached whoever waits for the environment
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await playing
        await player.close()

    asyncio.run(main())
    assert closed == ["begun", "closed"]


def test_an_episode_that_is_cancelled_while_its_policy_closes_closes_both() -> None:
    """An engine of somebody else's may need a round trip to free a session, and the environment comes after it."""
    done: list[str] = []

    class Env(OneStep):
        async def aclose(self) -> None:
            done.append("environment")

    class Slow(ScriptedPolicy):
        async def close(self, episode: EpisodeDriver) -> None:
            playing.cancel()
            await asyncio.sleep(0)  # a cancellation is raised here, in whoever is cancelled
            done.append("session")

    playing: asyncio.Task[Any]

    async def main() -> None:
        nonlocal playing
        player = LocalPlayer(Env, lambda task: Slow(FMT.encode_turn("hello")), LIMITS)
        playing = asyncio.create_task(player.play(TASK, id="e", group="g", seed=0))
        with pytest.raises(asyncio.CancelledError):
            await playing
        await player.close()

    asyncio.run(main())
    assert done == ["session", "environment"]


def test_an_environment_that_is_made_while_its_episode_is_cancelled_is_closed() -> None:
    """Its constructor holds the host's thread, so that nobody can cancel it, and the driver has no environment yet."""
    done: list[str] = []
    cancelled = threading.Event()
    going_on: list[asyncio.Task[None]] = []

    class Env(OneStep):
        def __init__(self) -> None:
            super().__init__()
            loop.call_soon_threadsafe(cut)
            cancelled.wait()
            done.append("made")

        async def aclose(self) -> None:
            done.append("closed")

    class Policed(ScriptedPolicy):
        async def close(self, episode: EpisodeDriver) -> None:
            going_on.append(asyncio.create_task(go_on()))

    def cut() -> None:
        playing.cancel()

    async def go_on() -> None:
        for _ in range(20):  # the driver looks for an environment meanwhile
            await asyncio.sleep(0)
        cancelled.set()

    loop: asyncio.AbstractEventLoop
    playing: asyncio.Task[Any]

    async def main() -> None:
        nonlocal loop, playing
        loop = asyncio.get_running_loop()
        player = LocalPlayer(Env, lambda task: Policed(FMT.encode_turn("hello")), LIMITS)
        playing = asyncio.create_task(player.play(TASK, id="e", group="g", seed=0))
        with pytest.raises(asyncio.CancelledError):
            await playing
        await asyncio.gather(*going_on)
        await player.close()

    asyncio.run(main())
    assert done == ["made", "closed"]


def test_a_failing_aclose_is_told_also_where_the_episode_is_cancelled_meanwhile() -> None:
    told: list[str] = []

    class Env(OneStep):
        async def aclose(self) -> None:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(cut(), loop))
            raise RuntimeError("still open")

    async def cut() -> None:
        playing.cancel()
        await asyncio.sleep(0)

    loop: asyncio.AbstractEventLoop
    playing: asyncio.Task[Any]

    async def main() -> None:
        nonlocal loop, playing
        loop = asyncio.get_running_loop()
        player = LocalPlayer(
            Env, sample, LIMITS, event=lambda kind, **fields: told.append(f"{kind}: {fields['detail']}")
        )
        playing = asyncio.create_task(player.play(TASK, id="e", group="g", seed=0))
        with pytest.raises(asyncio.CancelledError):
            await playing
        await player.close()

    asyncio.run(main())
    assert told == ["env_close_failed: aclose (task t, turn 0) raised RuntimeError: still open"]
