"""A message that was cut is no answer: how its episode ends, what it is paid, and what is still a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import AgentEnv
from areal_agents.errors import EnvError
from areal_agents.reward import Episode, Verdict, VerdictStatus, boxed_number
from areal_agents.rollout.cut_messages import after_cut
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.env_results import Returned
from areal_agents.rollout.episode import EpisodeDriver, Policy, Said
from areal_agents.rollout.token_policy import TokenPolicy
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Cut,
    Finish,
    Info,
    Observation,
    Prompt,
    StopReason,
    Task,
    Trajectory,
    user,
)
from tests.scripted import FMT, LIMITS, ScriptedPolicy
from tests.tiny_tokenizer import OPENS_THINKING, tiny

CALL = '<tool_call>{"name": "double", "arguments": {"x": 2}}</tool_call>'
OPEN = '<tool_call>{"name": "double", "arg'
RIGHT = r"\boxed{4}"
TASK = Task.make("t", split="train", seed=0, payload={"answer": "4"})


@tool()
async def double(x: int) -> str:
    return str(2 * x)


class Sums(ToolEnv):
    tools = (double,)
    rubric: ClassVar[Any] = boxed_number()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [TASK]

    def prompt(self, task: Task) -> str:
        return "2 + 2"


class Lenient(Sums):
    scores_cut_messages = True


SEEN: list[tuple[StopReason, str | None, int]] = []


async def partly(episode: Episode) -> Verdict:
    """Pay a little for an episode without an answer, and note what it was."""
    SEEN.append((episode.stop_reason, episode.answer, episode.turns))
    return Verdict(0.0, {}, tuple(0.5 if k else 0.25 for k in range(episode.turns)))


class Partial(Sums):
    rubric: ClassVar[Any] = partly


class Submits(Sums):
    """Ends at a call, as environments do whose answer is a tool."""

    def is_final(self, action: AssistantMessage) -> bool:
        return bool(action.tool_calls)

    def answer(self, action: AssistantMessage) -> str:
        return RIGHT


class Game(AgentEnv):
    """Three moves in text; a move that begins with "go" pays 1, the last one ends the game."""

    pay: ClassVar[float] = 1.0
    replays: ClassVar[int] = 0
    ends: ClassVar[tuple[bool, bool]] = (True, False)
    info: ClassVar[Info] = {}

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.k = 0
        return (user("start"),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self.k += 1
        reward = self.pay if action.text.startswith("go") else 0.0
        if self.k < 3:
            return (user("next"),), reward, False, False, {"sandbox_replays": self.replays}
        return (), reward, *self.ends, self.info

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.5, {"stop_reason": reason}


class Chatty(Policy):
    """Says texts, each with how it ended."""

    def __init__(self, *said: tuple[str, Finish]) -> None:
        self.said = list(said)

    async def say(self, episode: EpisodeDriver) -> Said:
        text, finish = self.said[len(episode.turns)]
        return Said.as_text(parse_text(text, finish), len(episode.turns))


def play(make: Callable[[], AgentEnv], policy: Policy, max_turns: int = 8) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        try:
            episode = EpisodeDriver(make, TASK, policy, host, "e", 0, 60.0, max_turns)
            await episode.play()
            return episode.trajectory("g")
        finally:
            await host.close()

    return asyncio.run(main())


def ending(t: Trajectory) -> tuple[bool, bool, StopReason, float]:
    return t.terminated, t.truncated, t.stop_reason, t.reward


# --- environments with tools and a rubric ----------------------------------------------------------------------------


@pytest.mark.parametrize("finish", ["length", "content_filter", "empty"])
def test_a_cut_final_message_is_truncated_and_no_answer(finish: Cut) -> None:
    assert ending(play(Sums, Chatty((RIGHT, "stop")))) == (True, False, "answer", 1.0)
    assert ending(play(Sums, Chatty((RIGHT, finish)))) == (False, True, finish, 0.0)
    assert ending(play(Sums, Chatty((CALL, "stop"), (RIGHT, finish)))) == (False, True, finish, 0.0)


def test_the_environment_may_say_that_it_is_an_answer() -> None:
    assert ending(play(Lenient, Chatty((RIGHT, "length")))) == (True, True, "length", 1.0)
    assert ending(play(Lenient, Chatty((RIGHT, "stop")))) == (True, False, "answer", 1.0)


def test_the_rubric_scores_what_exists_without_an_answer() -> None:
    SEEN.clear()
    t = play(Partial, Chatty((CALL, "stop"), (RIGHT, "length")))
    assert [turn.reward for turn in t.turns] == [0.25, 0.5]  # what the rubric pays for a cut episode is its own affair
    assert SEEN == [("length", None, 2)]
    assert "reward_withheld" not in t.metrics


def test_a_cut_message_with_a_whole_call_is_a_turn() -> None:
    t = play(Sums, Chatty((CALL + " and", "length"), (RIGHT, "stop")))
    assert ending(t) == (True, False, "answer", 1.0)
    assert [m.text for m in t.turns[1].observation] == ["4"]
    t = play(Sums, Chatty((CALL + OPEN, "length"), (RIGHT, "stop")))  # the whole call runs, the cut one is told
    assert [r.status for r in t.turns[0].tool_results] == ["ok", "malformed"]
    assert t.reward == 1.0
    t = play(Sums, Chatty((OPEN, "length"), (RIGHT, "stop")))
    assert [call.status for call in t.turns[0].message.tool_calls] == ["unclosed"]
    assert ending(t) == (True, False, "answer", 1.0)


def test_an_answer_that_is_a_whole_call_is_one_whatever_was_cut_after_it() -> None:
    assert ending(play(Submits, Chatty((CALL + " so", "length")))) == (True, False, "answer", 1.0)
    assert ending(play(Submits, Chatty((OPEN, "length")))) == (False, True, "length", 0.0)
    unknown = CALL.replace("double", "submit")
    assert ending(play(Submits, Chatty((unknown, "length")))) == (False, True, "length", 0.0)


@pytest.mark.parametrize(("stated", "flags"), [(False, (False, True)), (True, (True, False))])
def test_the_environments_own_limit_stays_its_reason(stated: bool, flags: tuple[bool, bool]) -> None:
    class Two(Sums):
        turn_limit_stated = stated

    t = play(lambda: Two(max_turns=2), Chatty((CALL, "stop"), (OPEN, "length")))
    assert ending(t) == (*flags, "max_turns", 0.0)


def test_gymnasiums_facade_ends_too() -> None:
    env = Sums()
    env.reset(options={"task": TASK})
    _, reward, terminated, truncated, info = env.step(parse_text(RIGHT, "length"))
    assert (reward, terminated, truncated, info["stop_reason"]) == (0.0, False, True, "length")
    with pytest.raises(EnvError, match="no episode is running"):
        env.step("more")


# --- other environments -----------------------------------------------------------------------------------------------


GO: tuple[str, Finish] = ("go", "stop")


def variant(**values: Any) -> type[Game]:
    return type("Variant", (Game,), values)


def test_a_cut_move_is_a_move() -> None:
    assert ending(play(Game, Chatty(("go", "length"), ("go", "length"), GO))) == (True, False, "answer", 3.0)
    t = play(Game, Chatty(("go", "length"), GO), max_turns=2)
    assert ending(t) == (False, True, "max_turns", 2.5)


def test_the_message_that_ends_a_task_earns_nothing_where_it_was_cut() -> None:
    t = play(Game, Chatty(GO, GO, ("go", "length")))
    assert ending(t) == (False, True, "length", 2.0)
    assert t.metrics["reward_withheld"] == 1.0
    kept = play(variant(scores_cut_messages=True), Chatty(GO, GO, ("go", "length")))
    assert ending(kept) == (True, True, "length", 3.0)
    assert "reward_withheld" not in kept.metrics


def test_components_of_a_reward_that_is_not_paid_say_so() -> None:
    parts = {"info": {"components": {"correct": 1.0, "brief": 0.5}}}
    cut = play(variant(**parts), Chatty(GO, GO, ("go", "length")))
    assert (cut.turns[-1].reward, cut.turns[-1].components) == (0.0, {"withheld/correct": 1.0, "withheld/brief": 0.5})
    for paid in (
        play(variant(**parts), Chatty(GO, GO, GO)),
        play(variant(scores_cut_messages=True, **parts), Chatty(GO, GO, ("go", "length"))),
        play(variant(pay=-1.0, **parts), Chatty(GO, GO, ("go", "length"))),  # it is paid as it is
    ):
        assert paid.turns[-1].components == {"correct": 1.0, "brief": 0.5}


def test_what_it_costs_stays() -> None:
    t = play(variant(pay=-1.0), Chatty(GO, GO, ("go", "length")))
    assert ending(t) == (False, True, "length", -3.0)


def test_rewards_that_the_end_assigns_are_not_raised_by_a_cut_answer() -> None:
    spread = variant(info={"turn_rewards": [2.0, -1.0, 2.0]})
    t = play(spread, Chatty(GO, GO, ("go", "length")))
    assert [turn.reward for turn in t.turns] == [1.0, -1.0, 0.0]
    assert t.metrics["reward_withheld"] == 3.0
    assert [turn.reward for turn in play(spread, Chatty(GO, GO, GO)).turns] == [2.0, -1.0, 2.0]


@pytest.mark.parametrize(
    ("ends", "info", "expected"),
    [
        ((False, True), {}, (False, True, "length", 3.0)),  # it ended the episode and does not say why
        ((False, True), {"stop_reason": "length"}, (False, True, "length", 3.0)),  # it knows of the cut itself
        ((True, False), {"stop_reason": "length"}, (False, True, "length", 3.0)),
        ((False, True), {"stop_reason": "max_turns"}, (False, True, "max_turns", 3.0)),
        ((True, False), {"stop_reason": "time_budget"}, (True, False, "time_budget", 3.0)),
        ((False, True), {"stop_reason": "answer"}, (False, True, "length", 2.0)),
    ],
)
def test_what_the_environment_says_of_its_end_is_heard(
    ends: tuple[bool, bool], info: Info, expected: tuple[bool, bool, StopReason, float]
) -> None:
    assert ending(play(variant(ends=ends, info=info), Chatty(GO, GO, ("go", "length")))) == expected


def test_a_flag_that_is_none_is_the_environments_fault() -> None:
    with pytest.raises(EnvError, match="scores_cut_messages is 'yes': it must be True or False"):
        play(variant(scores_cut_messages="yes"), Chatty(GO))


def test_a_turn_that_goes_on_is_as_it_was() -> None:
    got = Returned((user("x"),), 1.0)
    assert after_cut(got, "tokens", [], scored=False) is got


# --- which limit it was -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_turn_tokens": 4}, "length"),
        ({"max_episode_tokens": 4}, "tokens"),
        ({"max_context": 4}, "context"),  # and the prompt
        ({"max_turn_tokens": 4, "max_episode_tokens": 4, "max_context": 4}, "context"),
    ],
)
def test_the_limit_that_was_met_is_the_stop_reason(changes: dict[str, int], reason: StopReason) -> None:
    ids = FMT.encode_turn(f"the answer is {RIGHT}")
    whole = ScriptedPolicy(ids, limits=replace(LIMITS, max_turn_tokens=100))
    assert ending(play(Sums, whole)) == (True, False, "answer", 1.0)
    if "max_context" in changes:
        changes = changes | {"max_context": len(whole.prompts[0]) + changes["max_context"]}
    limits = replace(replace(LIMITS, max_turn_tokens=100), **changes)
    t = play(Sums, ScriptedPolicy(ids, limits=limits))
    assert len(t.turns[0].completion.ids) == 4
    assert ending(t) == (False, True, reason, 0.0)


# --- what else is counted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "metric"), [("unverifiable", "unverifiable"), ("timeout", "verdict_timeout"), ("ok", None)]
)
def test_an_odd_verdict_is_a_metric_of_its_episode(status: VerdictStatus, metric: str | None) -> None:
    class Odd(Sums):
        rubric: ClassVar[Any] = staticmethod(lambda episode: Verdict(0.5, status=status))

    for said, turns in ((RIGHT, 8), (CALL, 1)):  # by an answer, and by afinish
        metrics = play(Odd, Chatty((said, "stop")), max_turns=turns).metrics
        assert {k: v for k, v in metrics.items() if k != "env_seconds"} == ({metric: 1.0} if metric else {})


def test_sandbox_replays_are_counted_once() -> None:
    """The environment tells the count so far with every turn."""
    t = play(variant(replays=2), Chatty(GO, GO, GO))
    assert t.metrics["sandbox_replays"] == 2.0


# --- open thoughts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "in_thought", "spoken"),
    [
        (RIGHT, False, RIGHT),
        (RIGHT, True, ""),  # the prompt opened the thought, and it never ended
        (f"4? {RIGHT}</think>so 4", True, "so 4"),
        (f"so</think>{RIGHT}<think>or", True, RIGHT),
        (f"<think>{RIGHT}", False, ""),
    ],
)
def test_text_inside_an_open_thought_is_never_an_answer(text: str, in_thought: bool, spoken: str) -> None:
    message = replace(parse_text(text), in_thought=in_thought)
    assert message.spoken == spoken
    env = Sums()
    env.reset(options={"task": TASK})
    _, reward, terminated, *_ = env.step(message)
    assert (reward, terminated) == (float(RIGHT in spoken), True)


class Sampled(TokenPolicy):
    """Says one text as a model would, under a template whose prompt opens a thought."""

    def __init__(self, text: str) -> None:
        super().__init__(ChatFormat(tiny(OPENS_THINKING)), replace(LIMITS, max_turn_tokens=100))
        self.text = text

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        ids = self.fmt.encode_turn(self.text)
        return Completion(ids, (-1.0,) * len(ids), (0,) * len(ids), "stop")


def test_the_prompt_that_opened_the_thought_is_asked() -> None:
    t = play(Sums, Sampled(RIGHT))
    assert t.turns[0].message.in_thought
    assert ending(t) == (True, False, "answer", 0.0)
    assert ending(play(Sums, Sampled(f"hm</think>{RIGHT}"))) == (True, False, "answer", 1.0)
