"""Evaluations of environments that break the contract at one task of four: the episode fails, the others count.

the model: always "hi"     the environment: two turns, then 1; at task 1 its first step returns what is given here
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_agents.cli.main import main
from areal_agents.env import AgentEnv
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task, user
from tests.chat_server import Answer, chat_server, completion

MORE = (user("more"),)
RETURNED: dict[str, Callable[[], Any]] = {
    "info is None": lambda: (MORE, 0.0, False, False, None),
    "four values": lambda: (MORE, 0.0, False, {}),
    "texts": lambda: (("more",), 0.0, False, False, {}),
    "a text": lambda: ("more", 0.0, False, False, {}),
    "None for a text": lambda: ((user(None),), 0.0, False, False, {}),  # type: ignore[arg-type]
    "a number for a key": lambda: (MORE, 0.0, False, False, {"state_key": 3}),
    "numbers for flags": lambda: (MORE, 0.0, 0, 0, {}),
    "a reward of None": lambda: (MORE, None, False, False, {}),
    "an array of rewards": lambda: (MORE, np.array([1.0]), False, False, {}),
}
WORDS = {
    "info is None": "returned info None, which is not a dict",
    "four values": "not (observation, reward, terminated, truncated, info)",
    "texts": "returned the observation ('more',): it must be a tuple of Message",
    "a text": "returned the observation 'more': it must be a tuple of Message",
    "None for a text": "None in it is not a text",
    "a number for a key": "info['state_key'] is 3, which is not a text",
    "numbers for flags": "returned terminated 0 and truncated 0: both must be bool",
    "a reward of None": "returned the reward None, which is not a number",
    "an array of rewards": "returned the reward array([1.]), which is not a number",
}


class BrokenOnce(AgentEnv):
    def __init__(self, *, returns: str) -> None:
        super().__init__()
        self.returns = returns

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"i": i}) for i in range(4)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.turn = 0
        return (user("begin"),), {"state_key": "first"}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self.turn += 1
        if self.task.seed == 1:
            broken: tuple[Observation, float, bool, bool, Info] = RETURNED[self.returns]()
            return broken
        if self.turn == 2:
            return (), 1.0, True, False, {"stop_reason": "answer"}
        return MORE, 0.0, False, False, {"state_key": "second"}

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.0, {"stop_reason": reason}


@pytest.mark.parametrize("what", RETURNED)
def test_what_breaks_the_contract_costs_its_episode_alone(tmp_path: Path, what: str) -> None:
    with chat_server(lambda body: completion("hi")) as server:
        argv = ["eval", f"{__name__}:BrokenOnce", "--model", "openai:m", "--url", server.url, "--n", "4"]
        argv += ["--env.kwargs", json.dumps({"returns": what}), "--rollout.max_retries", "0", "--out", str(tmp_path)]
        assert main([*argv, "--rollout.failure_budget", "0.5"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["pass_at_1"], report["attempts"]) == (1.0, 3)
    assert report["infra_rate"] + len(report["left_out"]) / 4 == 0.25  # a failed episode, or a task that has no score
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (failed,) = [event for event in events if event["kind"] == "episode_failed"]
    assert failed["task"] == "test-1"
    assert failed["detail"].startswith("astep (task test-1, turn 0)")
    assert WORDS[what] in failed["detail"]
    for record in read_records(tmp_path):  # a turn has the key of the state that it was shown
        assert [turn.state_key for turn in record.trajectory.turns] == ["first", "second"]


def test_a_server_that_refuses_everything_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(lambda body: Answer({"error": {"message": "no quota"}}, 400)) as server:
        argv = ["eval", f"{__name__}:BrokenOnce", "--model", "openai:m", "--url", server.url, "--n", "4"]
        assert main([*argv, "--env.kwargs", '{"returns": "a text"}', "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "infrastructure failed every attempt" in said
    assert said.count("no quota") == 1
    assert len(said.splitlines()) == 1


def test_golds_that_cannot_be_read_are_told_before_the_first_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def answer(body: Any) -> Any:
        asked.append(body)
        return completion(r"\boxed{1}")

    with chat_server(answer) as server:
        argv = ["eval", "tests.checked_envs:BadGolds", "--model", "openai:m", "--url", server.url, "--n", "8"]
        assert main([*argv, "--out", str(tmp_path / "e")]) == 0
        assert len(asked) == 6  # the two bad tasks cost no request
        report = json.loads((tmp_path / "e" / "report.json").read_text())
        assert (report["n"], report["attempts"], sorted(report["left_out"])) == (6, 6, ["test-2", "test-5"])
        said = capsys.readouterr()
        assert "task test-2 is left out: task 'test-2': the gold answer" in said.out + said.err
        assert main([*argv, "--resume", str(tmp_path / "e")]) == 0  # complete: nothing is played again
        assert len(asked) == 6
        more = ["--rollout.max_bad_tasks", "0"]
        assert main([*argv, *more, "--out", str(tmp_path / "f")]) == 0  # fewer than 8 never stop it
