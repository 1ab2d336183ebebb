"""The benchmark of training on environments in the box: its comparisons by hand, and two steps with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.evaluation import compare
from areal_agents.evaluation.held_out import held_out
from areal_agents.settings.loading import load, shipped
from areal_agents.settings.writing import dump
from tests.simulated import BENCHMARKS, benchmarks_on_path, module
from tests.tiny_models import tiny_chat_model

__all__ = ["benchmarks_on_path"]


def test_every_run_is_a_shipped_configuration_with_a_warm_start_and_tasks_enough() -> None:
    script = module("train_environments")
    assert set(script.RUNS) <= set(shipped())
    for name in script.RUNS:
        config = load(name)
        assert config.eval.baseline
        assert config.warm_start.demonstrations
        assert config.eval.n >= script.LEAST
        assert config.out == Path("runs") / name


def test_the_game_is_trained_with_credit_turn_by_turn() -> None:
    assert load("number").algorithm == load("number", ["--algorithm", "turn"]).algorithm


def passed(seed: int, label: str) -> tuple[int, ...]:
    """Two seeds: the first one gains tasks 1 and 2, the second one gains task 2 and loses task 0."""
    return {
        (0, "warm_start"): (1, 0, 0, 0), (0, "after_rl"): (1, 1, 1, 0),
        (1, "warm_start"): (1, 0, 0, 0), (1, "after_rl"): (0, 0, 1, 0),
    }[seed, label]  # fmt: skip


def test_seeds_are_attempts_at_a_task_where_they_are_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("train_environments")

    def saved(source: str) -> compare.Evaluation:
        run, label = Path(source).name.split(":")
        rewards = passed(int(run.removeprefix("sql-")), label)
        return compare.Evaluation(source, {("test", f"t{i}", f"h{i}"): [float(p)] for i, p in enumerate(rewards)})

    monkeypatch.setattr(compare, "load", saved)
    one, two, both = (script.compared(tmp_path, "sql", seeds) for seeds in ([0], [1], [0, 1]))
    assert [c["pass_at_1"]["difference"] for c in (one, two, both)] == [0.5, 0.0, 0.25]
    assert [c["attempts"] for c in (one, both)] == [(1, 1), (2, 2)]
    assert both["n"] == 4
    # task by task: -1/2 (lost by the second seed), 1/2, 1, 0
    assert (both["gained"], both["lost"], both["ties"]) == (("t1", "t2"), ("t0",), 1)
    assert "25.0" in script.shown([both])


def comparison(seeds: list[int], gain: float, low: float, n: int = 300, alone: int = 0) -> dict[str, Any]:
    interval = {"difference": gain, "ci95": (low, gain + 0.1)}
    return {"run": "sql", "seeds": seeds, "n": n, "left_out": (alone, 0), "pass_at_1": interval}


def test_a_lower_bound_is_asked_for_of_each_seed_of_all_and_over_the_seeds() -> None:
    script = module("train_environments")
    each = [comparison([0], 0.2, 0.1), comparison([1], 0.3, 0.05), comparison([2], 0.4, 0.049)]
    found = script.checks([*each, comparison([0, 1, 2], 0.3, 0.2)], [0, 1, 2])
    assert [c.holds for c in found] == [True, True, True, True, True, False, True, True]
    # gains 20, 30, 40: mean 30, deviation 10, so 30 ± 4.3027 · 10 / √3
    assert found[-1].value == [5.16, 54.84]
    (close,) = script.checks([comparison([0], 0.2, 0.04999)], [0])[3:]
    assert (close.value[0], close.holds) == (5.0, False)  # 4.999 points, rounded for people
    few = script.checks([comparison([0], 0.2, 0.1, n=255)], [0])
    assert [c.holds for c in few] == [False, False, True, True]  # one seed, too few tasks; nothing is said over seeds
    pair = [comparison([0], 0.2, 0.1, alone=2), comparison([1], 0.2, 0.1, alone=1)]
    lost = script.checks([*pair, comparison([0, 1], 0.2, 0.1, alone=2)], [0, 1, 1])
    assert [(c.value, c.holds) for c in lost[:3]] == [(2, False), (300, True), (3, False)]


def test_equal_gains_are_an_interval_of_one_point() -> None:
    assert module("train_environments").over_seeds([0.25, 0.25]) == (0.25, 0.25)


def test_a_task_that_one_evaluation_could_not_score_is_counted_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infrastructure lost the second of four tasks after RL: three are compared, of which one was gained."""
    script = module("train_environments")

    def saved(source: str) -> compare.Evaluation:
        rewards = {("test", f"t{i}", f"h{i}"): [float(p)] for i, p in enumerate((1, 0, 1, 0))}
        if source.endswith("after_rl"):
            rewards = {key: [1.0] for key in rewards if key[1] != "t1"}
        return compare.Evaluation(source, rewards)

    monkeypatch.setattr(compare, "load", saved)
    found = script.compared(tmp_path, "sql", [0])
    assert (found["n"], found["left_out"], found["gained"]) == (3, (1, 0), ("t3",))
    assert "sql, seeds 0: 3 tasks are few" in script.shown([found])


@pytest.mark.parametrize(
    ("seed", "flags"), [(0, ["--steps", "3"]), (0, ["--steps", "2", "--learner.lr", "2e-5"]), (1, ["--steps", "2"])]
)
def test_a_run_is_taken_as_it_is_and_not_for_one_with_other_settings(
    tmp_path: Path, seed: int, flags: list[str]
) -> None:
    """``train --resume`` itself would go on with another rate, and a finished run is not trained again at all."""
    script = module("train_environments")
    (tmp_path / "config.toml").write_text(dump(load("sql", ["--steps", "2", "--seed", "0", "--out", str(tmp_path)])))
    (tmp_path / "sample.json").write_text(json.dumps({"run": "sql"}))
    assert script.run("sql", 0, tmp_path, ["--steps", "2"]) == {"run": "sql"}
    with pytest.raises(SystemExit, match=r"is a run with other settings:\n  (steps|learner\.lr|seed) was .*\n.*--runs"):
        script.run("sql", seed, tmp_path, flags)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runs", "x", "--seeds", "0", "0", "1"], "a seed that is given twice is one training"),
        ([], "name a folder by --runs"),
    ],
)
def test_what_would_be_lost_or_counted_twice_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_environments.py", *arguments])
    with pytest.raises(SystemExit):
        module("train_environments").main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "different"), [("sql", 261), ("number", 278), ("booking", 256)])
def test_there_are_different_held_out_tasks_enough(name: str, different: int) -> None:
    config = load(name)
    spec = registry.spec(config.env.id).with_kwargs(config.env.kwargs)
    tasks, _ = held_out(spec, config.eval, difficulty=config.env.difficulty, tell=print)
    contents = {task.content_hash for task in tasks}
    assert len(contents) == different >= module("train_environments").LEAST


@pytest.mark.slow
def test_quick_trains_evaluates_and_goes_on_with_a_finished_run(tmp_path: Path) -> None:
    model, runs, record = tiny_chat_model(tmp_path / "model"), tmp_path / "runs", tmp_path / "record.json"
    sizes = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (model / "config.json").write_text(json.dumps(sizes))
    command: list[str | Path] = [sys.executable, BENCHMARKS / "train_environments.py", "--quick", "--only", "number"]
    command += ["--runs", runs, "--json", record, "--model.path", model, "--model.max_context", "1536"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads(record.read_text())
    assert [(s["run"], s["seed"], len(s["step_seconds"])) for s in found["samples"]] == [("number", 0, 2)]
    assert [c["attempts"] for c in found["comparisons"]] == [[1, 1]]
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "demonstrations" not in again.stdout
    assert json.loads(record.read_text())["samples"] == found["samples"]
