"""Checkers of a problem's author, and the programs that a tool submits: no sandbox is needed."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest

from areal_agents.errors import ConfigError, InfraError, TaskError
from areal_agents.reward import Episode, task_checks
from areal_agents.rewards.code.checker import compare, fault
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.rewards.code.reward import code
from areal_agents.rollout.task_looks import look_at
from areal_agents.tool import ToolResult
from areal_agents.types import AssistantMessage, Task, Text, ToolCall, user

LINES, VALUES = CodeTest("4", "2"), CodeTest(3, arguments=[15])


async def names_nothing(given: Any, expected: Any, output: Any) -> bool:
    raise NameError("name 'solve' is not defined")


def hangs(given: Any, expected: Any, output: Any) -> bool:
    threading.Event().wait(20)
    return True


@pytest.mark.parametrize("test", [LINES, VALUES], ids=["text", "value"])
@pytest.mark.parametrize(
    ("checker", "why"),
    [
        (names_nothing, "raised NameError: name 'solve' is not defined"),
        (lambda given, expected: True, "raised TypeError: .*takes 2 positional arguments but 3 were given"),
        (lambda given, expected, output: None, "returned NoneType that says neither yes nor no"),
        (lambda given, expected, output: 0.5, "returned float that says neither"),
        (lambda given, expected, output: [][0], "raised IndexError"),
        (hangs, "took more than 0.2 s"),
    ],
    ids=["raises", "signature", "nothing", "share", "index", "hangs"],
)
def test_a_checker_that_fails_on_any_output_is_a_fault_of_its_task(checker: Any, why: str, test: CodeTest) -> None:
    problem = Problem((test,), function="f", checker=checker, checker_seconds=0.2 if checker is hangs else 60.0)
    assert re.match(why, asyncio.run(fault(problem, test)))
    reward = code(problem=lambda episode: problem)
    with pytest.raises(TaskError, match=f"task 't': its checker {why}.*, whatever the output is"):
        asyncio.run(reward._require_checker(Task.make("t", split="train", seed=0, payload={}), problem, test))


@pytest.mark.parametrize(
    "checker",
    [
        lambda given, expected, output: int(output) == int(expected),
        lambda given, expected, output: output.split()[5] == "x",  # of what a model prints, and not of numbers
        lambda given, expected, output: {"4": True}[output.strip()],
    ],
    ids=["number", "fifth word", "key"],
)
def test_a_checker_that_fails_on_odd_output_is_none(checker: Any) -> None:
    problem = Problem((LINES,), checker=checker, checker_seconds=60.0)
    assert asyncio.run(compare(problem, LINES, "what?")) == "checker_error"
    assert asyncio.run(fault(problem, LINES)) == ""


def test_whose_failure_it_is_the_checker_may_say() -> None:
    def lost(given: Any, expected: Any, output: Any) -> bool:
        raise InfraError("the reference server is down")

    with pytest.raises(InfraError, match="server is down"):
        asyncio.run(fault(Problem((LINES,), checker=lost, checker_seconds=60.0), LINES))


def test_the_look_before_the_first_episode_finds_it() -> None:
    tests = [{"input": "2", "output": "4"}]
    tasks = [Task.make(f"t{i}", split="train", seed=i, payload={"tests": tests, "n": i}) for i in range(3)]

    def look(checker: Any) -> dict[str, str]:
        checks = task_checks(code(checker=checker))
        return dict(asyncio.run(look_at(tasks, checks, where="own:train", seed=0)).bad)

    assert list(look(names_nothing)) == ["t0", "t1", "t2"]
    assert look(lambda given, expected, output: False) == {}


def test_the_submitted_argument_is_named_or_the_only_text() -> None:
    def source(arguments: dict[str, Any], taken: str | None = "ok", **chosen: Any) -> str | None:
        call = ToolCall("c", "submit", arguments, "", "ok", None)
        results = () if taken is None else (ToolResult("", taken),)  # type: ignore[arg-type]
        task = Task.make("t", split="train", seed=0, payload={})
        messages = (user("?"), AssistantMessage((Text(""),), (call,)))
        episode = Episode(task, messages, None, results, "answer")
        return code(tool="submit", **chosen).source(episode, Problem(()))

    assert source({"code": "print(1)", "seconds": 3}) == "print(1)"
    assert source({"notes": "a", "code": "print(1)"}, argument="code") == "print(1)"
    assert source({"notes": "a", "code": "print(1)"}, argument="program") is None
    assert source({"code": " "}) is source({}) is source({"code": 5}, argument="code") is None
    with pytest.raises(ConfigError, match=r"took several arguments that may be the answer \(notes, code\): name it"):
        source({"notes": "a", "code": "print(1)"})
    assert source({"notes": "made up", "code": "print(1)"}, "error") is None
    assert source({"notes": "made up", "code": "print(1)"}, None) is None
    with pytest.raises(ConfigError, match="argument = 'code' is one of a tool: name that too"):
        code(argument="code")
