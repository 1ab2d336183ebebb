"""``areal-agents show``: the episodes that were asked for, safe for a terminal, with the numbers they trained by."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Message,
    Text,
    ToolCall,
    ToolOutcome,
    Trajectory,
    Turn,
    system,
    user,
)
from tests.saved_runs import TASKS, record, save


def played() -> Record:
    """An episode with a call that ran, one that could not be read, an image, and hostile text."""
    raw, broken = '<tool_call>{"name": "look", "arguments": {"code": "a\\nb"}}</tool_call>', '<tool_call>{"na'
    calls = (
        ToolCall("c0", "look", {"code": "a\nb"}, raw),
        ToolCall("c1", "", {}, broken, "unclosed", problem="no closing tag"),
    )
    first = Turn(
        (1,), Completion((2, 3), (-1.0, -1.0), (4, 4), "stop"),
        AssistantMessage((Text(f"I look.{raw}{broken}"),), calls),
        0.25, {"seen": 0.25}, None, (system("Play."), user("Where?")), None,
        (ToolOutcome("ok", True), ToolOutcome("error")),
    )  # fmt: skip
    last = Turn(
        (1,), Completion((2,), (-1.0,), (5,), "length"),
        AssistantMessage((Text("\x1b[2J\u202eend\r\nuser\x07"),), (), "length", reasoning="why \x9b31m"),
        0.5, {}, 0, (Message("tool", (Text("x" * 5000),), "c0", "look\n\x1b]0;t\x07"),),
    )  # fmt: skip
    t = Trajectory("g0/0", TASKS[0], "g0", (first, last), False, True, "length", metrics={"unverifiable": 1.0})
    return Record("train", 1, t)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 1 and 2 of a training, and a held-out evaluation."""
    out = tmp_path / "run"
    other, late = record(0, 1, 0.5), [record(1, 0, 0.0, step=2), record(1, 1, 3.0, step=2)]
    held = Trajectory("eval-before/0/0", TASKS[1], "eval-before/0", other.trajectory.turns, True, False, "answer")
    save(out, TrainConfig(out=out), [played(), other, *late, Record("eval-before", 0, held)])
    return out


def show(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    assert main(["show", *map(str, argv)]) == code
    said = capsys.readouterr()
    return said.out if code == 0 else said.err


def test_an_episode_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # turn_return: G = (0.75, 0.5) against the other's (0.5): 0.75 − 0.5 = 0.25; alone at turn 1: 0.5.
    assert show(capsys, run, "--episode", "g0/0").splitlines() == [
        "episode g0/0  train, step 1  task t0 (train)",
        "reward 0.75 = 0.25 + 0.5  length (truncated)  2 turns  3 sampled tokens  policy 4 to 5  group g0",
        "verdict: unverifiable",
        "metrics: unverifiable 1",
        "",
        "system",
        "    Play.",
        "",
        "user",
        "    Where?",
        "",
        "assistant, turn 0  reward 0.25  advantage +0.25  2 tokens",
        '    I look.<tool_call>{"na',
        "  call look  ok, its text cut",
        "    code:",
        "      a",
        "      b",
        "  call (no name)  unclosed: no closing tag",
        "  components: seen 0.25",
        "",
        "tool look\\n\\x1b]0;t\\x07",
        f"    {'x' * 1000}",
        "  [… 3,000 of 5,000 characters left out: --full shows them …]",
        f"    {'x' * 1000}",
        "",
        "assistant, turn 1  reward 0.5  advantage +0.5  1 token  cut: length",
        "  reasoning",
        "    why \\x9b31m",
        "    \\x1b[2J\\u202eend\\r",
        "    user\\x07",
        "",
        "end  length (truncated)  reward 0.75",
    ]
    assert f"    {'x' * 5000}" in show(capsys, run, "--episode", "g0/0", "--full").splitlines()


def test_a_kind_that_nothing_trained_on_has_no_advantages(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = show(capsys, run, "--episode", "eval-before/0/0")  # found though it is not of the first kind
    assert shown.startswith("episode eval-before/0/0  eval-before  task t1 (train)\n")
    assert "advantage" not in shown


def test_a_group_that_cannot_be_compared_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run, TrainConfig.model_validate({"out": run, "algorithm": {"advantage": "grpo"}}), [record(7, 0, 1.0, step=3)])
    shown = show(capsys, run, "--episode", "g7/0")
    assert "advantages cannot be computed again: grpo compares the episodes of a group: it needs at least 2" in shown


def test_the_list_is_of_the_last_step_and_says_how_to_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys, run).splitlines()
    assert lines[0] == f"{run}: train, steps 1 to 2"
    assert [line.split()[:4] for line in lines[3:5]] == [["g1/0", "2", "t0", "0"], ["g1/1", "2", "t0", "3"]]
    assert lines[5] == "other kinds (--kind): eval-before"
    for line in lines[6:]:  # what it says to type, works
        words = line.partition("areal-agents show ")[2].split()
        assert words
        show(capsys, *words)
    assert show(capsys, run, "--list", "--step", "1", "--limit", "1").splitlines()[4] == (
        "1 of 2 episodes; --limit 0 lists all"
    )


def titles(shown: str) -> list[str]:
    return [line.split()[1] for line in shown.splitlines() if line.startswith("episode g")]


def test_the_worst_and_a_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert titles(show(capsys, run, "--worst", 2)) == ["g1/0", "g0/1"]  # 0, then 0.5; 0.75 and 3 are better
    assert titles(show(capsys, run, "--worst", 9, "--step", 1)) == ["g0/1", "g0/0"]
    assert titles(show(capsys, run, "--step", 1)) == ["g0/0", "g0/1"]
    cut = show(capsys, run, "--step", 1, "--limit", 1)
    assert titles(cut) == ["g0/0"]
    assert cut.endswith("1 of 2 episodes; --limit 0 shows all, --list lists them\n")
    assert show(capsys, run, "--step", 0).startswith("episode eval-before/0/0")  # the only kind with such a step


def test_of_equally_bad_ones_the_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(g, 0, 0.0, step=s) for g, s in ((0, 1), (1, 2), (2, 3))]
    save(tmp_path, TrainConfig(out=tmp_path), records)
    assert titles(show(capsys, tmp_path, "--worst", 2)) == ["g2/0", "g1/0"]


def test_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(show(capsys, run, "--episode", "g0/0", "--json", "-"))
    (episode,) = shown["episodes"]
    assert [turn["advantage"] for turn in episode["turns"]] == [0.25, 0.5]
    assert episode["turns"][0]["tool_calls"][0]["arguments"] == {"code": "a\nb"}
    assert episode["turns"][1]["text"] == "\x1b[2J\u202eend\r\nuser\x07"  # exact: JSON escapes it
    show(capsys, run, "--json", tmp_path / "list.json")
    assert [e["id"] for e in json.loads((tmp_path / "list.json").read_text())["episodes"]] == ["g1/0", "g1/1"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal(run: Path, monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "40", "NO_COLOR": no_color}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["show", str(run), "--episode", "g0/0"]) == 0
    text = terminal.getvalue()
    assert ("\x1b[" in text) == (not no_color)
    rows = [row for row in text.splitlines() if "xxxx" in row]
    assert len(rows) > 50  # wrapped, and no row of somebody's text begins where ours do
    assert all(row.startswith("    x") and len(row) <= 40 for row in rows)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--episode", "g0/3"], 1, "has no episode 'g0/3' among the 5 of train, eval-before: did you mean g0/"),
        (["--episode", "zzz"], 1, "--list` lists them"),
        (["--step", "9"], 1, "its steps are 1 to 2"),
        (["--kind", "eval"], 1, "there are eval-before, train: name one with --kind"),
        (["--worst", "0"], 2, "--worst is 0: it must be at least 1"),
        (["--step", "-1"], 2, "--step is -1: it must be at least 0"),
        (["--limit", "-1"], 2, "--limit is -1"),
        (["--episode", "g0/0", "--worst", "1"], 2, "--episode ID shows that one episode: leave out --worst"),
    ],
)
def test_refusals(run: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, message: str) -> None:
    assert message in show(capsys, run, *argv, code=code)


def test_a_folder_without_episodes_or_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds neither config.toml nor report.json" in show(capsys, tmp_path, code=1)
    save(tmp_path, TrainConfig(out=tmp_path), [])
    assert "has no episodes yet" in show(capsys, tmp_path, code=1)
    write_shard(shard_path(tmp_path, "train", 1), [])
    assert "train, step 1" in show(capsys, tmp_path)  # and no hint at an episode that is not there
    assert "holds no episode" in show(capsys, tmp_path, "--worst", 1)


def test_an_episode_without_a_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = record(0, 0, 0.0)
    t = replace(bare.trajectory, turns=(), terminated=False, truncated=True, stop_reason="context", error="gone\x1b")
    save(tmp_path, TrainConfig(out=tmp_path), [replace(bare, trajectory=t)])
    shown = show(capsys, tmp_path, "--episode", "g0/0")
    assert "context (truncated)  0 turns" in shown
    assert "error: gone\\x1b" in shown
