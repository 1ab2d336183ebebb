"""A user who goes on talking, and tools that a task has by itself."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.envs.declared_tool import DeclaredTool
from areal_agents.envs.dialogue import Dialogue
from areal_agents.errors import EnvError
from areal_agents.reward import Episode
from areal_agents.tool import ToolSpec, call_text, tool
from areal_agents.types import AssistantMessage, Task, user
from areal_agents.utils.sync import run_sync
from tests.envs.test_games import played, task_of


@tool()
async def ping() -> str:
    """Ping."""
    return "pong"


@tool()
async def dong() -> str:
    """Ring."""
    return "dang"


def polite(episode: Episode) -> float:
    return float(episode.answer == "bye")


class Talk(Dialogue):
    """A user who says what the task lists, and from the second message on lets another tool be called."""

    max_turns = 4
    rubric = polite

    def prompt(self, task: Task) -> str:
        return str(task.payload["says"][0])

    def new_state(self, task: Task) -> list[str]:
        return list(task.payload["says"][1:])

    def tools_of(self, task: Task) -> Sequence[ToolSpec]:
        return (ping,)

    async def reply(self, action: AssistantMessage) -> str | None:
        self.offer((ping, dong))
        return self.state.pop(0) if self.state else None


TASK = task_of({"says": ["hello", "more", "last"]})


def test_a_message_without_calls_is_answered_until_the_user_is_done() -> None:
    assert played(Talk(), TASK, ["hi", "yes", "bye"]) == (
        [0.0, 0.0, 1.0],
        "",
        {"stop_reason": "answer", "components": {"polite": 1.0}},
    )
    env = Talk()
    assert env.reset(seed=0, options={"task": TASK})[0] == (user("hello"),)
    assert env.step("hi")[0] == (user("more"),)
    assert [m.text for m in env.step(call_text("ping"))[0]] == ["pong"]
    assert env.step("and?")[0] == (user("last"),)
    env.close()


def test_the_rubric_sees_what_the_user_said() -> None:
    seen: list[Episode] = []

    def watch(episode: Episode) -> float:
        seen.append(episode)
        return 0.0

    class Seen(Talk):
        rubric = watch

    played(Seen(), TASK, ["hi", call_text("ping"), "yes", "bye"])
    texts = [m.text for m in seen[0].messages]
    assert texts == ["hello", "hi", "more", call_text("ping"), "pong", "yes", "last", "bye"]


def test_a_message_that_was_cut_is_not_answered() -> None:
    env = Talk()
    env.reset(seed=0, options={"task": TASK})
    cut = replace(parse_text("hi, I"), finish="length")
    observation, reward, terminated, truncated, info = env.step(cut)
    assert (observation, reward, terminated, truncated, info["stop_reason"]) == ((), 0.0, False, True, "length")
    assert env.state == ["more", "last"]
    env.close()


def test_the_turn_limit_ends_a_talk() -> None:
    env = Talk(max_turns=2)
    env.reset(seed=0, options={"task": TASK})
    assert env.step("hi")[2:4] == (False, False)
    assert env.step("bye")[1:4] == (0.0, False, True)
    env.close()


def test_tools_of_a_task_are_offered_anew_in_each_episode() -> None:
    env = Talk()
    for _ in range(2):
        env.reset(seed=0, options={"task": TASK})
        assert [t.name for t in env.tools] == ["ping"]
        assert "no tool 'dong'" in env.step(call_text("dong"))[0][0].text
        env.step("hi")
        assert [t.name for t in env.tools] == ["ping", "dong"]
        assert env.step(call_text("dong"))[0][0].text == "dang"
    env.close()
    assert tuple(env.tools_of(TASK)) == (ping,)


def test_two_tools_of_one_name_are_refused() -> None:
    env = Talk()
    with pytest.raises(EnvError, match="two tools have the same name: ping, ping"):
        env.offer((ping, ping))
    with pytest.raises(EnvError, match="no episode is running"):
        run_sync(env.astep(parse_text("hi")))


def test_a_reply_that_is_no_text_is_named() -> None:
    class Silent(Talk):
        async def reply(self, action: AssistantMessage) -> Any:
            return 7

    env = Silent()
    env.reset(seed=0, options={"task": TASK})
    with pytest.raises(EnvError, match=r"Silent.reply returned 7, which is not a text"):
        env.step("hi")


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "s": {"type": "string"},
        "b": {"type": "boolean"},
        "a": {"type": "array", "items": {"type": "string"}},
        "o": {"type": "object"},
        "any": {},
    },
    "required": ["n"],
}
DECLARED = DeclaredTool("f", "Do.", SCHEMA)


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"n": 3}, {"n": 3}),
        ({"n": "3"}, {"n": 3}),
        ({"n": 3.0}, {"n": 3}),
        ({"n": 3.5}, {"n": 3.5}),  # the benchmark's own function says what is wrong
        ({"n": "ticket_001"}, {"n": "ticket_001"}),
        ({"n": True}, {"n": True}),
        ({"n": 1, "x": 2}, {"n": 1, "x": 2}),
        ({"n": 1, "x": "2.5"}, {"n": 1, "x": 2.5}),
        ({"n": "3.0"}, {"n": 3}),
        ({"n": 1, "x": "nan"}, {"n": 1, "x": "nan"}),
        ({"n": 1, "x": "NaN"}, {"n": 1, "x": "NaN"}),  # which Python's reader takes for a number
        ({"n": 1, "x": "1e999"}, {"n": 1, "x": "1e999"}),
        ({"n": 1, "s": "3"}, {"n": 1, "s": "3"}),
        ({"n": 1, "b": "True"}, {"n": 1, "b": True}),
        ({"n": 1, "b": "1"}, {"n": 1, "b": "1"}),
        ({"n": 1, "a": '["x"]'}, {"n": 1, "a": ["x"]}),
        ({"n": 1, "o": '{"k": 1}'}, {"n": 1, "o": {"k": 1}}),
        ({"n": 1, "any": [None]}, {"n": 1, "any": [None]}),
    ],
)
def test_arguments_are_converted_where_nothing_is_lost(given: dict[str, Any], got: dict[str, Any]) -> None:
    checked = DECLARED.validate(given)
    assert checked == {"arguments": got}
    assert isinstance(checked, dict)
    assert list(map(type, checked["arguments"].values())) == list(map(type, got.values()))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "'n' is missing"),
        ({"n": 1, "m": 2}, "'m' is not a parameter"),
        ({"n": [1]}, r"'n': \[1\] is no integer"),
        ({"n": 1, "s": {"k": 1}}, "'s': .* is no string"),
        ({"n": 1, "a": "x"}, "'a': 'x' is no array"),
        ({"n": 1, "a": {}}, "'a': {} is no array"),
        ({"n": 1, "o": None}, "'o': None is no object"),
        ({"n": 1, "a": "[" * 100_000}, "'a': .* is no array"),
    ],
)
def test_arguments_that_say_something_else_are_refused(given: dict[str, Any], says: str) -> None:
    text = DECLARED.validate(given)
    assert isinstance(text, str)
    assert re.search(says, text), text


def test_what_is_offered_pickles() -> None:
    assert pickle.loads(pickle.dumps(ping)) == ping
