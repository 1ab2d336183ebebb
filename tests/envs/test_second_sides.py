"""The other side of a game or a talk, where it is a model: its failures are not the policy's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents.envs import booking, nim
from areal_agents.errors import EngineError
from areal_agents.tool import call_text
from areal_agents.tools import ask_user
from areal_agents.types import AssistantMessage, Text
from tests.envs.test_games import task_of
from tests.envs.test_lookups import table


class Silent:
    """A model that never answers."""

    async def chat(self, messages: Any, tools: Any, sampling: Any) -> AssistantMessage:
        await asyncio.Event().wait()
        raise AssertionError


def test_a_silent_model_is_no_fault_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask_user, "ANSWER_SECONDS", 0.05)
    game = nim.Nim(sandbox=None, opponent="model", models={"opponent": Silent()})
    game.reset(seed=0, options={"task": task_of({"heaps": [1, 2, 4], "skill": 1.0, "opponent": 5})})
    with pytest.raises(EngineError, match="the opponent did not answer within"):
        game.step(call_text("take", heap=3, count=1))
    assert game.state.heaps == [1, 2, 4]
    game.close()
    desk = booking.Booking(sandbox=None, user="model", models={"user": Silent()})
    desk.reset(seed=0, options={"task": table()})
    with pytest.raises(EngineError, match="the user did not answer within"):
        desk.step(call_text("ask_user", question="Where?"))
    desk.close()


def test_a_timeout_of_the_author_is_told_from_a_late_answer() -> None:
    async def late() -> str:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(ask_user.answered(late(), "the user"))


def test_answers_are_waited_for_less_long_than_the_tools_that_ask() -> None:
    tools = (ask_user.ask_user, *nim.Nim.tools)
    assert {t.name: t.timeout > ask_user.ANSWER_SECONDS for t in tools} == {"ask_user": True, "take": True}


class Seeds:
    """A model that notes the seeds of its sampling."""

    def __init__(self) -> None:
        self.seen = list[int | None]()

    async def chat(self, messages: Any, tools: Any, sampling: Any) -> AssistantMessage:
        self.seen.append(sampling.seed)
        return AssistantMessage((Text("thai"),))


def test_the_seeds_of_a_user_are_what_servers_take() -> None:
    user = Seeds()
    desk = booking.Booking(sandbox=None, user="model", models={"user": user})
    task = table()
    desk.reset(seed=0, options={"task": type(task).make("t", split="test", seed=2**63 - 1, payload=task.payload)})
    for _ in range(2):
        desk.step(call_text("ask_user", question="Where?"))
    desk.close()
    assert user.seen == [0, 1]
