"""Reward functions in the style of the verifiers package: called as its Rubric calls them, where that is right."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from areal_agents.errors import ConfigError, InfraError, RewardError
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rewards.verifiers_rubric import verifiers_rubric
from areal_agents.types import AssistantMessage, Task, Text, ToolCall, system, tool_result, user

TASK = Task.make("t", split="train", seed=0, payload={"question": "6 * 7?", "answer": "42", "info": {"level": 2}})
CALL = ToolCall("call-1", "python", {"code": "6 * 7"}, '<tool_call>{"name": …}</tool_call>')
EPISODE = Episode(
    TASK,
    (
        system("Be brief."),
        user("6 * 7?"),
        AssistantMessage((Text(f"I compute. {CALL.raw}"),), (CALL,)),
        tool_result("42", call=CALL),
        AssistantMessage((Text("<think>so</think>42"),), reasoning="hm"),
    ),
    "42",
    (),
    "answer",
)


class Parser:
    def parse_answer(self, completion: list[dict[str, Any]]) -> str:
        return str(completion[-1]["content"]).rpartition("</think>")[2]


class Rubric:
    """What a Rubric of verifiers 0.1.14 has of what is looked at."""

    def __init__(self, funcs: list[Any], weights: list[float], **objects: Any) -> None:
        self.funcs, self.weights, self.class_objects = funcs, weights, {"parser": Parser(), **objects}


class Group(Rubric):
    def __init__(self, *rubrics: Rubric) -> None:
        super().__init__([], [])
        self.rubrics = list(rubrics)


def exact(completion: Any, answer: str, parser: Any) -> float:
    return float(parser.parse_answer(completion) == answer)


async def calls(state: dict[str, Any], **kwargs: Any) -> float:
    assert kwargs["prompt"] is not kwargs["completion"]
    return float(sum(len(m.get("tool_calls", ())) for m in state["completion"]))


def level(info: dict[str, Any], task: dict[str, Any], question: str) -> int:
    assert (task["question"], question) == ("6 * 7?", "6 * 7?")
    return int(info["level"])


def judged(rubric: Any, episode: Episode = EPISODE, **more: Any) -> Verdict:
    return asyncio.run(judge(verifiers_rubric(rubric, **more), episode))


def test_functions_get_what_they_name_and_are_weighed() -> None:
    verdict = judged(Rubric([exact, calls, level], [1.0, 0.5, 0.0]))
    assert verdict.score == 1.5  # 1 * 1 + 0.5 * 1 + 0 * 2
    assert verdict.components == {"exact": 1.0, "calls": 1.0, "level": 2.0}


def test_a_list_of_functions_will_do_and_names_that_repeat_are_told_apart() -> None:
    verdict = judged([level, level], weights=[1.0, 0.25])
    assert (verdict.score, verdict.components) == (2.5, {"level": 2.0, "level_2": 2.0})
    assert judged([level]).score == 2.0


def test_a_group_of_rubrics_is_all_of_their_functions() -> None:
    verdict = judged(Group(Rubric([exact], [2.0]), Rubric([level], [1.0])))
    assert (verdict.score, verdict.components) == (4.0, {"exact": 1.0, "level": 2.0})


def test_the_prompt_and_the_completion_are_rows_as_servers_have_them() -> None:
    seen: dict[str, Any] = {}

    def look(prompt: Any, completion: Any, state: Any) -> float:
        seen.update(prompt=prompt, completion=completion, state=state)
        return 0.0

    judged([look])
    assert seen["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 * 7?"}]
    function = {"name": "python", "arguments": '{"code": "6 * 7"}'}
    assert seen["completion"] == [
        {
            "role": "assistant", "content": "I compute.",
            "tool_calls": [{"id": "call-1", "type": "function", "function": function, **function}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "call-1", "name": "python"},
        {"role": "assistant", "content": "<think>so</think>42", "reasoning_content": "hm"},
    ]  # fmt: skip
    state = seen["state"]
    assert (state["answer"], state["is_truncated"], state["stop_condition"]) == ("42", False, "answer")


def test_messages_are_read_by_attributes_too() -> None:
    """As verifiers' own functions do since its messages are models: what is not there is None."""

    def look(prompt: Any, completion: Any) -> float:
        first, result, last = completion
        assert (prompt[0].role, prompt[1].content, first.role) == ("system", "6 * 7?", "assistant")
        [call] = first.tool_calls
        assert (call.id, call.name, call.arguments) == ("call-1", "python", '{"code": "6 * 7"}')
        assert (call.function.name, call["name"]) == ("python", "python")
        assert (result.tool_call_id, last.content, last.reasoning_content) == ("call-1", "<think>so</think>42", "hm")
        assert last.tool_calls is None
        assert "tool_calls" not in last
        return float(not hasattr(last, "tool_call"))

    assert judged([look]).score == 1.0


def test_a_cut_message_is_no_answer() -> None:
    cut = AssistantMessage((Text("42"),), finish="length")
    episode = replace(EPISODE, messages=(*EPISODE.messages[:-1], cut), answer=None, stop_reason="length")
    assert judged(Rubric([exact], [1.0]), episode).score == 0.0


def test_what_a_function_may_change_is_its_own() -> None:
    def spoil(state: Any, info: Any, task: Any) -> float:
        state["answer"], info["level"], task["answer"] = "", 9, ""
        return 0.0

    assert judged([spoil, level]).components["level"] == 2.0
    assert TASK.payload["answer"] == "42"


def test_failures_are_raised_and_not_taken_for_zero() -> None:
    def broken(completion: Any) -> float:
        raise KeyError("timing")

    def nothing(completion: Any) -> None:
        return None

    def wants(completion: Any, client: Any) -> float:
        return 0.0

    with pytest.raises(KeyError, match="timing"):
        judged([broken])
    with pytest.raises(RewardError, match="returned None"):
        judged([nothing])
    with pytest.raises(RewardError, match="'wants' wants client, and there are question, answer, info, prompt"):
        judged([wants])


def test_a_function_that_is_late_is_the_verifiers_fault() -> None:
    async def slow(completion: Any) -> float:
        await asyncio.sleep(3600)
        return 1.0

    with pytest.raises(InfraError, match="'slow' did not return within"):
        judged([slow], timeout=0.01)


def test_what_cannot_be_had_is_refused() -> None:
    def ranked(completions: Any) -> list[float]:
        return []

    class Later:
        """A task of verifiers.v1: it scores a trace."""

        async def score(self, trace: Any) -> None: ...

    for rubric, said in (
        ([ranked], "'ranked' scores a whole group"),
        ([], "has no reward function"),
        (Later(), "takes a Rubric of verifiers before 0.4"),
        (Rubric([exact], [1.0, 2.0]), "there are 1 reward functions"),
        (["exact"], "there are 1 reward functions"),
    ):
        with pytest.raises(ConfigError, match=said):
            verifiers_rubric(rubric)
    with pytest.raises(ConfigError, match="weights go with a list"):
        verifiers_rubric(Rubric([exact], [1.0]), [1.0])
