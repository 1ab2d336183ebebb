"""The game's own tests: its worlds, games won, lost and given up, and areal-agents' conformance checks."""

from __future__ import annotations

from typing import Any

import my_game  # noqa: F401  registers the environment
import pytest
from my_game.env import Cellar, call

import areal_agents
from areal_agents.conformance.check import check

ID = "my_game/Cellar-v0"
EXITS = {"hall": {"north": "study", "east": "well"}, "study": {"south": "hall"}, "well": {"west": "hall"}}
TASK = areal_agents.Task.make(
    "by-hand", split="test", seed=0,
    payload={"exits": EXITS, "start": "hall", "key": "study", "vault": "hall", "pit": "well"},
)  # fmt: skip


def play(*texts: str) -> tuple[list[str], list[float], dict[str, Any]]:
    """Return what the game answered, the reward of each turn and the last info."""
    env = areal_agents.make(ID, sandbox=None)
    try:
        shown, _ = env.reset(seed=0, options={"task": TASK})
        answers, rewards, over = [shown[-1].text], [], False
        info: dict[str, Any] = {}
        for text in texts:
            observation, reward, terminated, truncated, info = env.step(text)
            answers += [message.text for message in observation]
            rewards.append(float(reward))
            over = terminated or truncated
        assert over
        return answers, rewards, info
    finally:
        env.close()


def test_training_and_test_share_no_world() -> None:
    for difficulty in (None, 0.0, 0.5, 1.0):
        worlds = {s: {t.content_hash for t in Cellar.tasks(s, difficulty=difficulty)} for s in ("train", "test")}
        assert (len(worlds["train"]), len(worlds["test"])) == (256, 64)
        assert not worlds["train"] & worlds["test"]


def test_a_game_that_is_won() -> None:
    answers, rewards, info = play(
        call("go", direction="north"), call("take_key"), call("go", direction="south"), call("open_vault")
    )
    assert answers == [
        "You are in the hall. Here: the vault. Exits: east to the well, north to the study. Beware of the well: its "
        "floor is gone.",
        "You are in the study. Here: a key. Exits: south to the hall.",
        "You have the key.",
        "You are in the hall. Here: the vault. Exits: east to the well, north to the study.",
        "The vault opens. The game is won.",
    ]
    assert rewards == [0.0, 0.1, 0.0, 1.0]
    assert info["components"] == {"opened": 1.0}


def test_a_game_that_is_lost() -> None:
    answers, rewards, info = play(call("go", direction="east"))
    assert (answers[-1], rewards) == ("You fall into the pit. The game is lost.", [0.0])
    assert info["stop_reason"] == "answer"


@pytest.mark.parametrize("wrong", [call("take_key"), call("open_vault"), call("go", direction="west")])
def test_what_cannot_be_done_changes_nothing(wrong: str) -> None:
    assert sum(play(wrong, "I give up.")[1]) == 0.0


def test_each_game_begins_anew() -> None:
    won = (call("go", direction="north"), call("take_key"), call("go", direction="south"), call("open_vault"))
    assert play(*won) == play(*won)


def test_the_environment_keeps_the_contract() -> None:
    report = check(ID, tokenizer=None)  # the command `areal-agents check` looks at tokens too
    assert report.passed, str(report)
