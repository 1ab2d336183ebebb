"""The environment's own tests: its tasks, a scripted episode, its reward, and areal-agents' conformance checks."""

from __future__ import annotations

from typing import Any

import my_env  # noqa: F401  registers the environment
import pytest
from my_env import boxes, rubric
from my_env.env import Boxes, open_call

import areal_agents
from areal_agents.conformance.check import check

ID = "my_env/Boxes-v0"


def play(task: areal_agents.Task, *texts: str) -> tuple[list[str], float, dict[str, Any]]:
    """Return what the environment answered, the episode's reward and its last info.

    It plays through Gymnasium's reset and step.
    """
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


def test_training_and_test_share_no_code() -> None:
    codes = {
        split: {task.payload["answer"] for d in (None, 0.0, 0.5, 1.0) for task in Boxes.tasks(split, difficulty=d)}
        for split in ("train", "test")
    }
    assert len(codes["train"]) > 500
    assert not codes["train"] & codes["test"]


def test_a_scripted_episode() -> None:
    task = Boxes.tasks("test")[0]
    first, last = task.payload["trail"]
    answers, reward, info = play(
        task, open_call(first), open_call("B-12"), open_call(last), rf"\boxed{{{task.payload['answer']}}}"
    )
    assert answers == [
        f"The next box is {last}.",
        "there is no box 'B-12': labels look like C-0123",
        f"The code is {task.payload['answer']}.",
    ]
    assert reward == 1.0
    assert info["components"] == {"correct": 1.0, "followed": 1.0}


@pytest.mark.parametrize("answer", ["", "I do not know.", r"\boxed{1}", r"\boxed{12345} or \boxed{54321}"])
def test_a_wrong_answer_earns_nothing(answer: str) -> None:
    assert play(Boxes.tasks("test")[0], answer)[1] == 0.0


def test_partial_credit_is_for_the_trail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rubric, "PARTIAL_CREDIT", 0.4)
    task = Boxes.tasks("test")[0]
    first, last = task.payload["trail"]
    assert play(task, open_call(first), open_call(first), "no idea")[1] == pytest.approx(0.2)
    assert play(task, open_call(first), open_call(last), "no idea")[1] == pytest.approx(0.4)
    assert play(task, open_call(boxes.trail("A-0001")[0]), "no idea")[1] == 0.0


def test_the_environment_keeps_the_contract() -> None:
    report = check(ID, tokenizer=None)  # the command `areal-agents check` looks at tokens too
    assert report.passed, str(report)
