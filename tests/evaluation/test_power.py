"""How many tasks show a difference: hand-worked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import ConfigError
from areal_agents.evaluation.power import tasks_for, tasks_needed
from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.types import AssistantMessage, Completion, Task, Trajectory, Turn
from tests.evaluation.test_compare import write


def test_the_formula() -> None:
    # (1.959964 + 0.841621)² = 7.848879; × 0.5 / 0.03² = 4360.49.
    assert tasks_for(0.03, 0.5) == 4361
    assert tasks_for(0.1, 0.5) == 393  # 392.44
    assert tasks_for(0.9, 0.01) == 2


def test_a_guess() -> None:
    one = tasks_needed(0.03, k=None)
    assert (one.tasks, one.k, one.variance) == (4361, 1, 0.5)
    # 2 · 0.9 · 0.1 · (1/3 + 2/3 / 4) = 0.18 · 0.5 = 0.09; 7.848879 · 0.09 / 0.0009 = 784.89.
    four = tasks_needed(0.03, k=4, rate=0.9)
    assert four.variance == pytest.approx(0.09)
    assert four.tasks == 785
    assert dict(four.by_k)[1] == 1570  # 7.848879 · 0.18 / 0.0009 = 1569.8


def test_one_earlier_evaluation(tmp_path: Path) -> None:
    # Shares 1, 1/2, 1/2, 0: their variance is (1/4 + 1/4) / 3 = 1/6, of two models 1/3.
    # σ² = mean of p(1-p)·2: (0 + 1/2 + 1/2 + 0) / 4 = 1/4, of two models 1/2. ω² = 1/3 - 1/2 / 2 = 1/12.
    write(tmp_path / "a", "eval", {"a": [1, 1], "b": [1, 0], "c": [0, 1], "d": [0, 0]})
    same = tasks_needed(0.1, k=None, earlier=[str(tmp_path / "a")])
    assert same.variance == pytest.approx(1 / 3)
    assert (same.k, same.tasks) == (2, 262)  # 7.848879 / 3 / 0.01 = 261.6
    one = tasks_needed(0.1, k=1, earlier=[str(tmp_path / "a")])
    assert one.variance == pytest.approx(1 / 12 + 1 / 2)
    assert one.tasks == 458  # 7.848879 · 0.583333 / 0.01 = 457.85


def drawn(out: Path, rewards: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """An evaluation with copies: by content, the attempts at each of its copies."""
    records = []
    for content, copies in rewards.items():
        for n, attempts in enumerate(copies):
            task = Task.make(f"{content}{n}", split="test", seed=n, payload={"content": content})
            for i, reward in enumerate(attempts):
                turn = Turn((1,), Completion((5,), (-1.0,), (0,), "stop"), AssistantMessage(()), reward)
                id = f"eval/{task.id}/{i}"
                records.append(Record("eval", 0, Trajectory(id, task, task.id, (turn,), True, False, "answer")))
    write_shard(shard_path(out, "eval", 0), records)
    return str(out)


def test_copies_are_attempts_at_one_task(tmp_path: Path) -> None:
    # Of four tasks each twice, one attempt a copy: what two attempts at each would show, 262 tasks with 2 and 458 with
    # 1. Taken for eight tasks their variance is 2 · 2/7 and one attempt tells no other k: 449 with 1.
    rewards = {"a": [[1], [1]], "b": [[1], [0]], "c": [[0], [1]], "d": [[0], [0]]}
    found = tasks_needed(0.1, k=None, earlier=[drawn(tmp_path / "a", rewards)])
    assert (found.k, found.tasks, dict(found.by_k)[2]) == (1, 458, 262)
    assert "from 4 different tasks of" in str(found)
    assert "the 8 tasks that were played have 4 different contents: copies are attempts at one task" in str(found)
    # The same four times each, by a greedy model, which does the same on each copy: shares 1, 1, 0, 0, variance 1/3,
    # of two models 2/3, however many attempts: 7.848879 · 2/3 / 0.01 = 523.3.
    greedy = {c: [[float(c in "ab")]] * 4 for c in "abcd"}
    found = tasks_needed(0.1, k=None, earlier=[drawn(tmp_path / "b", greedy)])
    assert found.variance == pytest.approx(2 / 3)
    assert {n for _, n in found.by_k} == {524}


def test_uneven_copies_by_hand(tmp_path: Path) -> None:
    # a: 1 of 2, b: 1 of 1, c: 0 of 1; of B 2 of 2, 1 of 1, 0 of 1. Differences 1/2, 0, 0: the variance is 1/12.
    # σ²A = (1/4 · 2) / 1 = 1/2, σ²B = 0, and the mean of 1 / attempts is (1/2 + 1 + 1) / 3 = 5/6: ω² = max(0, 1/12 -
    # 5/12) = 0, so that one attempt has the variance 1/2: 7.848879 · 1/2 / 0.04 = 98.1.
    a = drawn(tmp_path / "a", {"a": [[1], [0]], "b": [[1]], "c": [[0]]})
    b = drawn(tmp_path / "b", {"a": [[1], [1]], "b": [[1]], "c": [[0]]})
    found = tasks_needed(0.2, k=None, earlier=[a, b])
    assert found.variance == pytest.approx(1 / 2)
    assert found.tasks == 99
    assert "at 3 different tasks" in str(found)


def test_two_earlier_evaluations(tmp_path: Path) -> None:
    # Differences 1, 0, 0, -1 of one attempt a task: the variance is 2/3.
    write(tmp_path / "a", "eval", {"a": [0], "b": [1], "c": [0], "d": [1]})
    write(tmp_path / "b", "eval", {"a": [1], "b": [1], "c": [0], "d": [0]})
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    found = tasks_needed(0.2, k=None, earlier=pair)
    assert found.variance == pytest.approx(2 / 3)
    assert (found.k, found.tasks) == (1, 131)  # 7.848879 · 2/3 / 0.04 = 130.8
    assert found.by_k == ()
    with pytest.raises(ConfigError, match=r"with 1 and 1 attempts a task, the variance with 4 cannot be told"):
        tasks_needed(0.2, k=4, earlier=pair)
    with pytest.raises(ConfigError, match="every task has the same result"):
        tasks_needed(0.2, k=None, earlier=[pair[0], pair[0]])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "power.json"
    assert main(["eval", "--power", "0.03", "--k", "4", "--pass", "0.9", "--json", str(file)]) == 0
    assert capsys.readouterr().out.startswith(
        "785 different tasks with 4 attempts each show a difference of 3 points in"
    )
    assert json.loads(file.read_text())["tasks"] == 785


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--power", "3"], "a difference of pass@1 lies between 0 and 1"),
        (["--power", "nan"], "a difference of pass@1 lies between 0 and 1"),
        (["--power", "0.1", "--pass", "1"], "--pass 1: it lies between 0 and 1"),
        (["--power", "0.1", "--k", "0"], "--k 0: it is a whole number from 1 on"),
        (["--power", "0.1", "--n", "8"], "--power plays nothing: leave out --n"),
        (["quick", "--power", "0.1"], "--power plays nothing: leave out ENV_ID"),
        (["--power", "0.1", "--pass", "0.2", "--earlier", "x"], "leave out --pass"),
        (["--power", "0.1", "--earlier", "x", "--compare", "x", "y"], "give one of them"),
        (["areal/Hanoi-v0", "--pass", "0.2"], "--pass and --earlier belong to --power"),
    ],
)
def test_wrong_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *argv]) == 2
    assert said in capsys.readouterr().err
