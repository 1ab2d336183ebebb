"""What travels to other processes: recipes of players and errors; and who gets a place to play at."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.format import ChatFormat
from areal_agents.chat.options import ChatOptions
from areal_agents.cluster.remote_errors import Failure, RemoteCause
from areal_agents.cluster.worker_slots import Places
from areal_agents.engine import Sampling
from areal_agents.env import AgentEnv, Expert
from areal_agents.errors import (
    ArealError,
    ConfigError,
    EnvError,
    FailureBudgetError,
    InfraError,
    RewardError,
    SandboxError,
    SandboxUnavailable,
    TaskError,
    TemplateError,
    WorkerLost,
)
from areal_agents.reward import Episode
from areal_agents.rollout.player import PlayerSpec, env_maker, prove_sandbox, require_prompts
from areal_agents.rollout.retries import FailureBudget
from areal_agents.tool import ToolSpec
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.python import python
from areal_agents.types import Info, Observation, Task, Trajectory, user
from tests.letters_env import Letters
from tests.scripted import LIMITS
from tests.tiny_tokenizer import CHATML, NO_SYSTEM, tiny


def travelled(error: ArealError) -> ArealError:
    failure: Failure = pickle.loads(pickle.dumps(Failure.of(error)))
    return failure.error()


class Talks(Letters):
    """Its expert says letters only."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        _, info = await super().areset(seed=seed, options=options)
        return (user(self.word),), info

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield "abc"
        yield "ab1"


def test_a_spec_travels_and_builds_a_player(tmp_path: Path) -> None:
    tiny(CHATML).save_pretrained(tmp_path)
    env = registry.spec("tests.rollout.test_player:Talks")
    made = PlayerSpec(
        env, tmp_path, LIMITS, Sampling(20, stop_ids=(1,)), sandbox="unsafe_local", kwargs={"word": "go"},
        policy="expert",
    )  # fmt: skip
    again: PlayerSpec = pickle.loads(pickle.dumps(made))
    assert again == made

    async def play(spec: PlayerSpec) -> Trajectory:
        player = spec.build(None)  # type: ignore[arg-type]  # an expert needs no engine
        try:
            return await player.play(env.tasks("train")[0], id="e", group="g", seed=0)
        finally:
            await player.close()

    played = asyncio.run(play(again))
    assert [t.reward for t in played.turns] == [0.5, pytest.approx(1 / 3)]
    assert played.turns[0].observation == (user("go"),)
    with pytest.raises(ConfigError, match=r"has no expert: set warm_start\.demonstrations = 0"):
        asyncio.run(play(replace(again, env=registry.spec("tests.letters_env:Letters"), kwargs={})))


class Fails(Talks):
    """Its expert says one thing and fails."""

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield "abc"
        raise KeyError("lost")


class FailsAtOnce(Talks):
    """Its ``expert`` is no generator and raises when it is called."""

    @classmethod
    def expert(cls, task: Task) -> Expert:
        raise KeyError("lost")


class Lists(Talks):
    @classmethod
    def expert(cls, task: Task) -> Expert:
        return iter(["abc"])  # type: ignore[return-value]


class Stops(Talks):
    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield "abc"


@pytest.mark.parametrize(
    ("env", "message"),
    [("FailsAtOnce", "raised KeyError: 'lost'"), ("Lists", "is <list_iterator .* not a generator")],
)
def test_an_expert_that_cannot_begin_is_the_environments_failure(tmp_path: Path, env: str, message: str) -> None:
    tiny(CHATML).save_pretrained(tmp_path)
    spec = registry.spec(f"tests.rollout.test_player:{env}")
    player = PlayerSpec(spec, tmp_path, LIMITS, Sampling(20), kwargs={"word": "go"}, policy="expert").build(None)  # type: ignore[arg-type]

    async def play() -> None:
        try:
            await player.play(spec.tasks("train")[0], id="e", group="g", seed=0)
        finally:
            await player.close()

    with pytest.raises(EnvError, match=f"the expert of task train-0 {message}") as caught:
        asyncio.run(play())
    assert caught.value.final


@pytest.mark.parametrize(
    ("env", "message"),
    [("Fails", "the expert of task train-0 raised KeyError: 'lost'"), ("Stops", "stopped before the episode ended")],
)
def test_an_expert_that_fails_is_the_environments_failure(tmp_path: Path, env: str, message: str) -> None:
    tiny(CHATML).save_pretrained(tmp_path)
    spec = registry.spec(f"tests.rollout.test_player:{env}")
    player = PlayerSpec(spec, tmp_path, LIMITS, Sampling(20), kwargs={"word": "go"}, policy="expert").build(None)  # type: ignore[arg-type]

    async def play() -> None:
        try:
            await player.play(spec.tasks("train")[0], id="e", group="g", seed=0)
        finally:
            await player.close()

    with pytest.raises(EnvError, match=message) as caught:
        asyncio.run(play())
    assert (caught.value.turns, caught.value.tokens > 0) == (1, True)


def test_an_error_arrives_with_its_class_its_place_and_its_cause() -> None:
    class Authors(SandboxError):
        """Somebody else's subclass: the receiver may not be able to import it."""

    try:
        raise Authors("broken pipe") from OSError("no space left")
    except Authors as error:
        error.tool, error.turns, error.tokens, error.final = "python", 3, 57, True
        arrived = travelled(error)
    assert type(arrived) is SandboxError
    assert isinstance(arrived, InfraError)
    assert (str(arrived), arrived.tool, arrived.turns, arrived.tokens) == ("broken pipe", "python", 3, 57)
    assert arrived.final
    assert isinstance(arrived.__cause__, RemoteCause)
    assert "OSError: no space left" in str(arrived.__cause__)


def test_every_other_error_arrives_too() -> None:
    refused = travelled(SandboxUnavailable("bubblewrap", "no user namespaces", "Install the profile."))
    assert isinstance(refused, SandboxUnavailable)
    assert (refused.backend, refused.probe, refused.remedy) == (
        "bubblewrap", "no user namespaces", "Install the profile.",
    )  # fmt: skip
    for kind in (RewardError, TaskError, EnvError, FailureBudgetError, ConfigError):
        arrived = travelled(kind("why"))
        assert (type(arrived), str(arrived), arrived.__cause__) == (kind, "why", None)
    hung = EnvError("slow")
    hung.blame = "hang"
    arrived = travelled(hung)
    assert isinstance(arrived, EnvError)
    assert arrived.blame == "hang"


def test_a_lost_workers_episodes_are_counted_but_not_charged() -> None:
    budget = FailureBudget(window=4, share=0.25)
    for _ in range(20):
        budget.failure(WorkerLost("rollout worker 0 died"))
    budget.failure(EnvError("first"))
    assert budget.kinds == {"WorkerLost": 20, "EnvError": 1}
    with pytest.raises(FailureBudgetError, match=r"2 of the last 2 .* First failure: first"):
        budget.failure(EnvError("second"))


def test_places_go_to_the_least_loaded_in_the_order_of_asking() -> None:
    async def main() -> None:
        places: Places[str] = Places(2)
        places.add("a")
        places.add("b")
        assert [await places.take() for _ in range(4)] == ["a", "b", "a", "b"]
        first, cancelled, third = (asyncio.create_task(places.take()) for _ in range(3))
        await asyncio.sleep(0)
        cancelled.cancel()
        places.give_back("b")
        assert await first == "b"
        places.remove("a")  # its two are still taken, and no longer offered
        places.give_back("a")
        assert (places.taken("a"), places.taken("b")) == (1, 2)
        await asyncio.sleep(0)
        assert not third.done()
        places.add("c")
        assert await third == "c"
        idle = asyncio.create_task(places.idle("a"))
        await asyncio.sleep(0)
        assert not idle.done()
        places.give_back("a")
        await asyncio.wait_for(idle, 120)

    asyncio.run(main())


def test_a_place_given_to_a_cancelled_taker_goes_on() -> None:
    async def main() -> None:
        places: Places[str] = Places(1)
        places.add("a")
        await places.take()
        one, two = asyncio.create_task(places.take()), asyncio.create_task(places.take())
        await asyncio.sleep(0)
        places.give_back("a")  # handed to the first ...
        one.cancel()  # ... who is cancelled before it wakes up
        assert await asyncio.wait_for(two, 120) == "a"
        await asyncio.gather(one, return_exceptions=True)
        assert one.cancelled()
        places.give_back("a")
        assert places.taken("a") == 0

    asyncio.run(main())


def test_without_hope_whoever_waits_is_told() -> None:
    async def main() -> None:
        places: Places[str] = Places(1)
        waiting = asyncio.create_task(places.take())
        await asyncio.sleep(0)
        places.fail(FailureBudgetError("the last one is gone"))
        for take in (waiting, places.take()):
            with pytest.raises(FailureBudgetError, match="the last one is gone"):
                await take

    asyncio.run(main())
    with pytest.raises(ConfigError, match="at least 1"):
        Places(0)


class Instructed(Talks):
    system_prompt = "Be brief."


def test_a_system_prompt_that_the_template_cannot_show_is_refused_before_anything_starts() -> None:
    spec = registry.spec("tests.rollout.test_player:Instructed")
    with pytest.raises(TemplateError, match=r"set model\.merge_system = true"):
        require_prompts(spec, ChatFormat(tiny(NO_SYSTEM)), LIMITS)
    require_prompts(spec, ChatFormat(tiny(NO_SYSTEM), merge_system=True), LIMITS)
    require_prompts(spec, ChatFormat(tiny(CHATML)), LIMITS)
    require_prompts(registry.spec("tests.rollout.test_player:Talks"), ChatFormat(tiny(NO_SYSTEM)), LIMITS)


def test_a_player_is_built_with_the_chat_options_of_its_spec(tmp_path: Path) -> None:
    tiny(CHATML).save_pretrained(tmp_path)
    spec = PlayerSpec(
        registry.spec("tests.rollout.test_player:Talks"), tmp_path, LIMITS, Sampling(20), kwargs={"word": "go"},
        chat=ChatOptions(template_variables={"thinking": False}),
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(TemplateError, match=r"model\.template_variables\.thinking"):
        spec.build(None)  # type: ignore[arg-type]  # no engine is asked


class Instances(AgentEnv):
    """Has its tools by instance, so that the class tells nothing of them."""

    step_seconds = 5.0

    @property
    def tools(self) -> Sequence[ToolSpec]:  # type: ignore[override]
        return ()


def test_what_a_step_may_take_is_known_from_the_class() -> None:
    sampling = Sampling(8, temperature=0.0)
    spec = PlayerSpec(registry.spec("areal/Arithmetic-v0"), Path("m"), LIMITS, sampling)
    assert spec.step_seconds == 64 * 60  # 64 calls of ``python``, whose limit is 60 s
    unknown = replace(spec, env=registry.spec(f"{__name__}:Instances"))
    assert unknown.step_seconds == 64 * 60 + 5


def nothing(episode: Episode) -> float:
    return 0.0


class HandsOn(ToolEnv):
    """Takes what ``ToolEnv`` takes, as docs/write-an-environment.md has it, and writes down what came."""

    tools = (python,)
    rubric = nothing

    def __init__(self, *, own: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.came = {"own": own, **kwargs}


class HandsOnAgain(HandsOn):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(own=2, **kwargs)


class TakesNone(ToolEnv):
    tools = (python,)
    rubric = nothing

    def __init__(self) -> None:
        super().__init__(sandbox=None)


def test_an_environment_that_hands_its_arguments_on_is_given_the_sandbox_of_the_run() -> None:
    one, two, none = (registry.spec(f"{__name__}:{name}") for name in ("HandsOn", "HandsOnAgain", "TakesNone"))
    made = env_maker(one, sandbox="unsafe_local", kwargs={"own": 1})()
    assert isinstance(made, HandsOn)
    assert made.came == {"own": 1, "sandbox": "unsafe_local"}
    own = env_maker(two, sandbox="unsafe_local", kwargs={"sandbox": None})()
    assert isinstance(own, HandsOn)
    assert own.came == {"own": 2, "sandbox": None}
    assert isinstance(env_maker(none, sandbox="unsafe_local", kwargs={})(), TakesNone)
    for spec in (one, two):  # what it is given is proved before a run
        with pytest.raises(ArealError, match="nowhere"):
            asyncio.run(prove_sandbox(spec, "nowhere"))
    asyncio.run(prove_sandbox(none, "nowhere"))


def test_an_argument_is_taken_where_a_base_names_it_or_not_at_all() -> None:
    takes = registry.takes
    assert [takes(HandsOnAgain, name) for name in ("own", "sandbox", "context", "other")] == [True, True, True, False]
    assert not takes(TakesNone, "sandbox")
    assert not takes(Talks, "sandbox")  # no ToolEnv
    plain = registry.spec("tests.text_games:Registered").env_class()  # a gymnasium.Env, whose wrapper takes anything
    assert not takes(plain, "sandbox")
