"""The data set's own tests: its files, a scripted episode, its reward and suite, and areal-agents' own checks."""

from __future__ import annotations

import importlib.resources
from typing import Any

import my_data  # noqa: F401  registers the environment
import pytest
from my_data.env import Measures
from my_data.measures import TABLE

import areal_agents
from areal_agents.conformance.check import check
from areal_agents.evaluation.suite import load_suite

ID = "my_data/Measures-v0"
LOOK = '<tool_call>{"name": "look_up", "arguments": {"unit": "%s"}}</tool_call>'


def play(task: areal_agents.Task, *texts: str) -> tuple[list[str], float, dict[str, Any]]:
    """Return what the environment answered, the episode's reward and its last info."""
    env = areal_agents.make(ID, sandbox=None)
    try:
        env.reset(seed=0, options={"task": task})
        answers: list[str] = []
        total = 0.0
        info: dict[str, Any] = {}
        for text in texts:
            observation, reward, terminated, truncated, info = env.step(text)
            answers += [message.text for message in observation]
            total += float(reward)
        assert terminated or truncated
        return answers, total, info
    finally:
        env.close()


def test_every_answer_follows_from_the_table() -> None:
    for split, count in (("train", 48), ("test", 12)):
        tasks = Measures.tasks(split)
        assert len(tasks) == count
        for task in tasks:
            asked = next(int(word) for word in task.payload["question"].split() if word.isdigit())
            assert int(task.payload["answer"]) == asked * TABLE[task.payload["unit"]][0], task.id


def test_a_scripted_episode() -> None:
    task = Measures.tasks("test")[0]
    answers, reward, info = play(task, LOOK % "cubit", LOOK % task.payload["unit"], Measures.gold(task))
    assert answers[0].startswith("there is no measure 'cubit'; there are bushel, fathom")
    assert answers[1].startswith("one is ")
    assert reward == 1.0
    assert info["components"] == {"correct": 1.0, "looked_up": 1.0}


@pytest.mark.parametrize("answer", ["", "I do not know.", r"\boxed{1}"])
def test_a_wrong_answer_earns_nothing(answer: str) -> None:
    assert play(Measures.tasks("test")[0], answer)[1] == 0.0


def test_the_suite_can_be_played() -> None:
    with importlib.resources.as_file(importlib.resources.files("my_data.suites") / "my_data.toml") as path:
        suite = load_suite(str(path))
    assert {entry.env for entry in suite.entries} == {ID}


def test_the_environment_keeps_the_contract() -> None:
    report = check(ID, tokenizer=None)  # the command `areal-agents check` looks at tokens too
    assert report.passed, str(report)
