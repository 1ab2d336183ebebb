"""Pass rates of an evaluation as a file, and what they leave of the tasks of a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.env import LazyTasks
from areal_agents.errors import ConfigError
from areal_agents.evaluation.pass_rates import PassRate, filtered, pass_rates_of, read_pass_rates
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Task
from tests.tiny_models import tiny_chat_model
from tests.trainer.test_loop import episode

ENV = "tests.trainer.mixed_envs:Letters"


def task(i: int) -> Task:
    return Task.make(f"t{i}", split="train", seed=i, payload={"i": i})


TASKS = [task(i) for i in range(6)]


def row(place: int, passes: int, attempts: int = 10, **changes: Any) -> PassRate:
    found = PassRate(
        "acme/Shop-v0", "train", None, place, f"t{place}", task(place).content_hash, attempts, passes, 1.0, "m"
    )
    return replace(found, **changes)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., CurriculumConfig]:
    def settings(*rows: PassRate, **more: Any) -> CurriculumConfig:
        path = tmp_path / "rates.jsonl"
        path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in rows))
        return CurriculumConfig(pass_rates=str(path), **more)

    return settings


def kept(settings: CurriculumConfig, tasks: Any = TASKS, **changes: Any) -> list[str]:
    where: dict[str, Any] = {"env": "acme/Shop-v0", "split": "train", "difficulty": None, "kwargs": {}} | changes
    return [t.id for t in filtered(tasks, settings, **where).tasks]


def test_the_ends_of_the_bounds_are_within_them(write: Callable[..., CurriculumConfig]) -> None:
    rows = [row(0, 0), row(1, 1), row(2, 5), row(3, 9), row(4, 10), row(5, 3)]
    assert kept(write(*rows)) == ["t1", "t2", "t3", "t5"]  # 0.1 to 0.9
    assert kept(write(*rows, min=0.0, max=0.3)) == ["t0", "t1", "t5"]
    assert kept(write(*rows, row(4, 0))) == ["t1", "t2", "t3", "t4", "t5"]  # 10 of 20 in all
    lazy = LazyTasks(6, task)
    assert kept(write(*rows), lazy) == ["t1", "t2", "t3", "t5"]


def test_a_task_that_the_file_lacks_is_refused_or_what_the_settings_say(
    write: Callable[..., CurriculumConfig],
) -> None:
    rows = [row(1, 5), row(2, 10)]
    with pytest.raises(ConfigError, match=r"lacks 4 of the 6 tasks of acme/Shop-v0:train: set curriculum\.missing"):
        kept(write(*rows))
    assert kept(write(*rows, missing="leave_out")) == ["t1"]
    assert kept(write(*rows, missing="keep")) == ["t0", "t1", "t3", "t4", "t5"]
    found = filtered(
        TASKS, write(*rows, missing="keep"), env="acme/Shop-v0", split="train", difficulty=None, kwargs={}
    )  # fmt: skip
    assert (found.of, found.too_hard, found.too_easy, found.missing, found.models) == (6, 0, 1, 4, ("m",))
    with pytest.raises(ConfigError, match=r"no task is left\. 0 of 6 .*\(0 too hard, 1 too easy; 5 .* are left out\)"):
        kept(write(row(2, 10), missing="leave_out"))


def test_only_the_tasks_of_the_file_are_made_where_that_is_enough(write: Callable[..., CurriculumConfig]) -> None:
    made: list[int] = []

    def make(i: int) -> Task:
        made.append(i)
        return task(i)

    many = LazyTasks(1_000_000, make)
    assert kept(write(row(1, 5), row(3, 5), row(4, 0), missing="leave_out"), many) == ["t1", "t3"]
    assert set(made) == {1, 3, 4}


def test_tasks_are_known_by_their_content_wherever_they_are(write: Callable[..., CurriculumConfig]) -> None:
    turned = [replace(t, id=f"other-{t.id}") for t in reversed(TASKS)]
    rows = [row(i, 5 if i in (0, 1) else 0) for i in range(6)]
    assert kept(write(*rows), turned) == ["other-t1", "other-t0"]
    twice = [*TASKS, replace(TASKS[1], id="t1-again")]
    assert kept(write(*rows), twice) == ["t0", "t1", "t1-again"]


def test_a_file_of_other_tasks_is_refused(write: Callable[..., CurriculumConfig]) -> None:
    rows = [row(i, 5) for i in range(6)]
    with pytest.raises(ConfigError, match=r"has no task of acme/Other-v0:train .*; it is of acme/Shop-v0:train"):
        kept(write(*rows), env="acme/Other-v0")
    with pytest.raises(ConfigError, match=r"has no task of acme/Shop-v0:dev"):
        kept(write(*rows), split="dev")
    with pytest.raises(ConfigError, match=r"0\.5\); it is of acme/Shop-v0:train \(difficulty by default\)"):
        kept(write(*rows), difficulty=0.5)
    edited = [*rows[:5], row(5, 5, content_hash="0" * 64)]
    with pytest.raises(ConfigError, match=r"1 of its 6 tasks of \S+ are not in the split \(first: 't5'\)"):
        kept(write(*edited))
    # Of the same environment with other arguments, rows may be of tasks that are not here.
    mixed = [*rows, row(9, 0, kwargs={"path": "other.jsonl"})]
    assert len(kept(write(*mixed))) == 6
    turns = [*rows[:4], row(4, 5, kwargs={"max_turns": 1}), row(5, 5, kwargs={"max_turns": 1}), row(5, 6)]
    found = filtered(TASKS, write(*turns), env="acme/Shop-v0", split="train", difficulty=None, kwargs={})
    assert "; 2 were measured with other env.kwargs than these" in found.text(write(*turns))
    with pytest.raises(ConfigError, match="6 of its 6 tasks"):
        kept(write(*rows), [task(i) for i in range(20, 26)], kwargs={"path": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1 is no pass rate"),
        ('{"env": "x"}', "line 1 is no pass rate"),
        (json.dumps(asdict(row(0, 11))), "11 passes of 10 attempts"),
        (json.dumps(asdict(row(0, 0, attempts=0))), "0 passes of 0 attempts"),
        (json.dumps(asdict(row(0, 1)) | {"passes": 0.5}), "whole numbers"),
        (json.dumps(asdict(row(0, 1)) | {"content_hash": 3}), "are texts"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_pass_rates(tmp_path / "f")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pass_rates(tmp_path / "nothing")


def test_attempts_are_counted_by_task() -> None:
    config = TrainConfig.model_validate(
        {"model": {"path": "m"}, "env": {"id": "e", "difficulty": 0.5, "kwargs": {"path": Path("x")}},
         "eval": {"split": "train", "temperature": 1.0}}
    )  # fmt: skip
    tries = [(0, 1.0), (0, 0.0), (0, 1.5), (2, 0.0), (2, 0.9)]
    episodes = [replace(episode(reward), task=task(i)) for i, reward in tries]
    rows = pass_rates_of(episodes, config, {task(i).content_hash: 10 * i for i in range(3)}, env="acme/Shop-v0")
    assert [(r.place, r.task, r.attempts, r.passes) for r in rows] == [(0, "t0", 3, 2), (20, "t2", 2, 0)]
    assert (rows[0].env, rows[0].split, rows[0].difficulty, rows[0].kwargs) == (
        "acme/Shop-v0", "train", 0.5, {"path": "x"},
    )  # fmt: skip
    assert (rows[0].model, rows[0].sampling["temperature"], rows[0].passes_at) == ("m", 1.0, 1.0)


def test_the_command_writes_what_a_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_chat_model(tmp_path / "model")
    rates, out = tmp_path / "rates.jsonl", tmp_path / "eval"
    command = ["eval", f"{ENV}:train", "--model", str(tmp_path / "model"), "--n", "5", "--k", "3", "--temperature", "1"]
    limits = ["--max-context", "128", "--max-turn-tokens", "6", "--engine.precision", "fp32", "--out", str(out)]
    assert main([*command, *limits, "--save-pass-rates", str(rates)]) == 0
    assert f"pass rates: {rates} (5 tasks, reward of at least 1 passes)" in capsys.readouterr().out
    found = read_pass_rates(rates)
    episodes = [r.trajectory for r in read_records(out, kind="eval")]
    for r in found:
        own = [t for t in episodes if t.task.content_hash == r.content_hash]
        assert (r.attempts, r.passes) == (3, sum(t.reward >= 1 for t in own))
        assert (r.task, r.place) == (own[0].task.id, int(own[0].task.id.rpartition("-")[2]))
    config = TrainConfig.model_validate({"env": {"id": ENV}})
    from areal_agents.trainer.parts import parts_of, tasks_of

    within = config.model_copy(
        update={"curriculum": CurriculumConfig(pass_rates=str(rates), min=0.0, max=1.0, missing="leave_out")}
    )
    (part,) = parts_of(within)
    left = tasks_of(within, part, None)
    assert [t.id for t in left.tasks] == [r.task for r in found]
    assert left.missing == 7


def test_the_command_refuses_pass_rates_of_more_than_one_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--power", "0.03"], ["--compare", "a", "b"], ["quick", "--model", "m"]):
        assert main(["eval", *command, "--save-pass-rates", "x.jsonl"]) == 2
        assert "--save-pass-rates FILE is of one evaluation" in capsys.readouterr().err
    assert main(["eval", ENV, "--model", "m", "--save-pass-rates", "nowhere/x.jsonl"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
