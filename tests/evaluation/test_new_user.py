"""What a new user has: a text game of somebody else's, and an OpenAI-compatible server. Nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.tracking.trajectories import read_records
from tests.chat_server import Json, Step, chat_server, completion

GAME = '''
import gymnasium


class Guess(gymnasium.Env):
    """Guess a number; the reply says higher or lower."""

    def __init__(self, highest=10):
        self.highest = highest

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.secret = int(self.np_random.integers(1, self.highest + 1))
        return f"Guess a number from 1 to {self.highest}. Reply with the number only.", {}

    def step(self, action):
        n = int(action.strip())
        if n == self.secret:
            return "right", 1.0, True, False, {}
        return ("higher" if n < self.secret else "lower"), 0.0, False, False, {}


class Old(Guess):
    """As Gymnasium's predecessor had it: no info, and one flag."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0]


class Numbers(Guess):
    def reset(self, **kwargs):
        return [1, 2], {}


def make():
    return Guess()
'''
SECONDS = 600.0


def halving(body: Json) -> Step:
    low, high, last = 1, 10, 0
    for message in body["messages"]:
        if message["role"] == "assistant":
            last = int(message["content"])
        elif message["content"] == "higher":
            low = last + 1
        elif message["content"] == "lower":
            high = last - 1
    return completion(f"{(low + high) // 2}\n", tokens=2)


@pytest.fixture
def game(tmp_path: Path) -> Path:
    (tmp_path / "textgames.py").write_text(GAME)
    return tmp_path


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the folder where the game lies, as one does."""
    return subprocess.run(
        [sys.executable, "-m", "areal_agents", *argv], capture_output=True, text=True, cwd=folder,
        timeout=SECONDS, env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip


def test_a_plain_gymnasium_env_is_evaluated_by_its_name(game: Path) -> None:
    with chat_server(halving) as server:
        done = run(
            game, "eval", "textgames:Guess", "--model", "openai:m", "--url", server.url, "--n", "6", "--out", "o"
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert "textgames:Guess:test  1.000" in done.stdout
    report = json.loads((game / "o/report.json").read_text())
    assert (report["n"], report["pass_at_1"], report["infra_rate"]) == (6, 1.0, 0.0)
    first = next(iter(read_records(game / "o"))).trajectory
    assert first.turns[0].observation[-1].text == "Guess a number from 1 to 10. Reply with the number only."
    assert first.turns[0].message.text == "5\n"
    assert server.requests[0]["messages"][-1]["role"] == "user"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("Guess", ["--env.kwargs.highst", "4"], "unexpected keyword argument 'highst'"),
        (
            "Old",
            [],
            "reset returned 'Guess a number from 1 to 10. Reply with the number only.', not (observation, info)",
        ),
        ("Numbers", [], "reset returned the observation [1, 2], which is not a text"),
    ],
)
def test_what_is_wrong_with_it_is_one_message(game: Path, name: str, more: list[str], message: str) -> None:
    with chat_server(halving) as server:
        argv = ["eval", f"textgames:{name}", "--model", "openai:m", "--url", server.url, "--n", "6", *more]
        done = run(game, *argv, "--out", "o", "--rollout.max_retries", "0")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_what_is_no_environment_is_told_apart(
    game: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(game))
    argv = ["eval", "textgames:make", "--model", "openai:m", "--url", "http://127.0.0.1:9/v1"]
    assert main([*argv, "--out", str(game / "o")]) == 1
    assert (
        "'textgames:make' is no AgentEnv, and no gymnasium.Env over text either: name such a class"
        in capsys.readouterr().err
    )
