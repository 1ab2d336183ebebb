"""The rewards, on episodes made by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rewards import boxed_math, math
from areal_agents.tool import ToolResult
from areal_agents.types import AssistantMessage, Task, Text, ToolCall, user


def episode(answer: str | None, gold: Any = r"\frac{1}{2}", calls: tuple[ToolCall, ...] = ()) -> Episode:
    task = Task.make("t", split="train", seed=0, payload={"answer": gold})
    message = AssistantMessage((Text(answer or ""),), calls)
    return Episode(task, (user("?"), message), answer, (), "answer")


def scored(reward: Any, *args: Any, **options: Any) -> Verdict:
    return asyncio.run(judge(reward, episode(*args, **options)))


def test_the_box_is_verified() -> None:
    assert scored(boxed_math(), r"It is \boxed{0.5}.") == Verdict(1.0, {"math(boxed)": 1.0})
    assert scored(boxed_math(), r"It is 0.5, \boxed{2}.").score == 0.0
    assert scored(boxed_math(), "0.5").score == 0.0  # no box
    assert scored(boxed_math(), None).score == 0.0
    assert scored(boxed_math(precision=1), r"\boxed{0.51}").score == 1.0
    assert scored(boxed_math(), r"\boxed{7}", ["6", "7"]).score == 1.0
    assert scored(boxed_math(), r"\boxed{7}", 7).score == 1.0


def test_what_cannot_be_read_is_unverifiable_and_counted() -> None:
    assert scored(boxed_math(), r"\boxed{\frac{}{}}") == Verdict(0.0, {"math(boxed)": 0.0}, status="unverifiable")


def test_other_slots() -> None:
    assert scored(math(slot="final_line"), "work\nAnswer: 1/2").score == 1.0
    call = ToolCall("c", "answer", {"value": "2/4"}, "", "ok", None)
    broken = ToolCall("d", "answer", {}, "", "invalid_json", None)
    assert scored(math(slot="tool"), "no", calls=(call, broken)).score == 1.0
    assert scored(math(slot="tool"), "1/2").score == 0.0


def test_the_argument_of_the_answer_tool_is_named_or_the_only_one() -> None:
    two = ToolCall("c", "answer", {"reason": "half of 1", "value": 0.5, "sure": True}, "", "ok", None)
    named = math(slot="tool", argument="value")
    assert scored(named, "", calls=(two,)).score == 1.0
    assert scored(math(slot="tool", argument="reason"), "", calls=(two,)).score == 0.0
    assert scored(math(slot="tool", argument="other"), "", calls=(two,)).score == 0.0
    assert scored(math(slot="tool"), "", calls=(two,)).score == 0.0  # the tool has not taken it
    taken = replace(episode("", calls=(two,)), tool_results=(ToolResult("ok"),))
    with pytest.raises(ConfigError, match=r"the tool 'answer' took several arguments .* \(reason, value\): name it"):
        asyncio.run(judge(math(slot="tool"), taken))
    assert asyncio.run(judge(named, taken)).score == 1.0
    made_up = replace(taken, tool_results=(ToolResult("no argument 'reason'", "error"),))
    assert asyncio.run(judge(math(slot="tool"), made_up)).score == 0.0
    with pytest.raises(ConfigError, match="argument = 'x' is one of a tool, and the slot is 'boxed'"):
        math(argument="x")


@pytest.mark.parametrize("gold", [None, [], True, {"a": 1}, ["1", None]])
def test_a_task_without_a_gold_answer_is_an_error(gold: Any) -> None:
    with pytest.raises(TaskError, match=r"task 't': payload\['answer'\] = .* is no gold answer"):
        scored(boxed_math(), r"\boxed{1}", gold)


def test_a_gold_answer_that_cannot_be_read_is_an_error_of_the_task() -> None:
    with pytest.raises(TaskError, match=r"task 't': the gold answer .* cannot be read"):
        scored(boxed_math(), r"\boxed{1}", r"\frac{1}{")


def test_what_a_reward_may_not_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="not from the slot 'text'"):
        math(slot="text")
    with pytest.raises(ConfigError, match="unknown option 'precison'"):
        boxed_math(precison=2)


def test_the_choices_of_each_question_are_read_from_its_payload() -> None:
    def asked(choices: Any) -> Episode:
        made = episode(r"so \boxed{\text{(B) } 12 cm}")
        task = Task.make("t", split="train", seed=0, payload={"answer": "B", "options": choices})
        return replace(made, task=task)

    reward = boxed_math(choices_key="options")
    assert asyncio.run(judge(reward, asked(["10 cm", "12 cm"]))).score == 1.0
    assert asyncio.run(judge(reward, asked({"A": "12 cm", "B": "10 cm"}))).score == 0.0
    with pytest.raises(TaskError, match="task 't' has no choices in payload"):
        asyncio.run(judge(reward, asked(None)))
    with pytest.raises(TaskError, match="task 't' has no choices in payload"):
        asyncio.run(reward.require_scorable(asked(7).task))
