"""Training with tasks that cannot be played: they are left out, named, counted, and remembered by a resumed run."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from areal_agents.env import Expert
from areal_agents.errors import InfraError, TaskError
from areal_agents.reward import TaskCheck
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.loop import RunResult, train
from areal_agents.types import Info, Observation, Task
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model


class SomeBad(Letters):
    """Of twenty training tasks, 7 has a prompt over the context and 13 cannot be read; of four test tasks, 1."""

    started: ClassVar[Counter[str]] = Counter()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        words = [f"{split} {i}" for i in range(20 if split == "train" else 4)]
        words[7 if split == "train" else 1] = "word " * 300
        made: list[dict[str, Any]] = [{"word": word, "split": split, "i": i} for i, word in enumerate(words)]
        if split == "train":
            del made[13]["word"]
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload=p) for i, p in enumerate(made)]

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        def speak() -> Expert:
            yield "abc"
            yield "abc"

        return speak()

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        SomeBad.started[(options or {})["task"].id] += 1
        return await super().areset(seed=seed, options=options)


class BadGolds(Letters):
    """As ``SomeBad``, but the tasks without a word are told before they are played."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        bad = {"train": {3, 5}, "test": {1}, "none": set(range(20))}[split]
        return [
            Task.make(f"{split}-{i}", split=split, seed=i, payload={"i": i} if i in bad else {"word": f"{split} {i}"})
            for i in range(20)
        ]

    @classmethod
    def task_checks(cls) -> Sequence[TaskCheck]:
        return (cls._require_word,)

    @staticmethod
    async def _require_word(task: Task) -> None:
        if "word" not in task.payload:
            raise TaskError(f"task {task.id!r} has no word")

    splits: ClassVar[tuple[str, ...]] = ("train", "test", "none")


class AllBad(SomeBad):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        raise LookupError("no questions today")


class Away(SomeBad):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        raise RuntimeError("cannot ask") from ConnectionRefusedError(111, "refused")


def config(tmp_path: Path, env: str, steps: int, **sections: Any) -> TrainConfig:
    if not (tmp_path / "model").exists():
        tiny_chat_model(tmp_path / "model")
    base: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model"), "max_context": 128},
        "env": {"id": f"tests.trainer.test_bad_tasks:{env}"},
        "engine": {"precision": "fp32", "max_batch": 16},
        "rollout": {"groups": 2, "group_size": 8, "concurrency": 16, "max_turn_tokens": 4},
        "learner": {"precision": "fp32", "lr": 1e-3},
        "eval": {"n": 4, "task_seed": None},
        "checkpoint": {"every": 4},
        "track": {"tensorboard": False},
    }
    return TrainConfig.model_validate({"steps": steps, "out": tmp_path / "run"} | base | sections)


def run(config: TrainConfig, **options: Any) -> RunResult:
    return asyncio.run(asyncio.wait_for(train(config, console=False, **options), 600))


def events(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (config.out / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_run_goes_on_without_them_and_a_resumed_one_remembers(tmp_path: Path) -> None:
    SomeBad.started.clear()
    first = config(tmp_path, "SomeBad", 12)  # 24 groups: every one of the eighteen good tasks, and some again
    result = run(first)
    named = {e["task"]: e["reason"] for e in events(first, "task_left_out")}
    assert sorted(named) == ["test-1", "train-13", "train-7"]
    assert "the first prompt has" in named["train-7"]
    assert "model.max_context is 128" in named["train-7"]
    assert "areset (task train-13, turn 0) raised KeyError: 'word'" in named["train-13"]
    row = read_metrics(first.out, kind="train")[-1]
    assert (row["tasks_left_out"], row["failed_attempts"]) == (2, 0)
    for report in result.reports.values():
        assert (report.n, list(report.left_out), report.infra_rate) == (3, ["test-1"], 0.0)
    assert "test-1: " in result.table()
    assert len(events(first, "task_left_out")) == 2 + len(result.reports)

    SomeBad.started.clear()
    again = config(tmp_path, "SomeBad", 22)  # twenty groups more: another epoch
    run(again, resume=True)
    assert SomeBad.started["train-7"] == SomeBad.started["train-13"] == 0
    assert read_metrics(again.out, kind="train")[-1]["tasks_left_out"] == 2
    (restored,) = events(again, "rollouts_restored")
    assert restored["left_out"] == 2


def test_a_warm_start_draws_other_tasks_in_their_place(tmp_path: Path) -> None:
    c = config(tmp_path, "SomeBad", 1, warm_start={"demonstrations": 20}, eval={"n": 4, "baseline": False})
    run(c)
    assert {e["task"] for e in events(c, "task_left_out")} == {"train-7", "train-13", "test-1"}
    assert read_metrics(c.out, kind="train")[-1]["tasks_left_out"] == 2  # known from the warm start
    assert read_metrics(c.out, kind="warm_start")[-1]["step"] == 20


def test_an_environment_without_one_good_task_stops_the_run_and_says_why(tmp_path: Path) -> None:
    c = config(tmp_path, "AllBad", 2, eval={"n": 4, "baseline": False})
    with pytest.raises(TaskError, match=r"8 of the \d+ tasks tried so far cannot be played.*max_bad_tasks") as caught:
        run(c)
    assert "LookupError: no questions today" in str(caught.value)


def test_an_evaluation_without_one_score_says_why_the_first_attempt_failed(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"failed every attempt.*First failure: areset \(task test-.*cannot ask"):
        run(config(tmp_path, "Away", 1))


def test_tasks_that_no_answer_could_score_are_left_out_before_the_first_episode(tmp_path: Path) -> None:
    c = config(tmp_path, "BadGolds", 12)  # 24 groups: every good task
    result = run(c)
    told = events(c, "task_left_out")
    assert [e["task"] for e in told[:2]] == ["train-3", "train-5"]  # before any evaluation names its own
    assert told[0]["reason"] == "task 'train-3' has no word"
    assert [e["task"] for e in told[2:]] == ["test-1"] * len(result.reports)
    assert not events(c, "episode_failed")
    assert read_metrics(c.out, kind="train")[-1]["tasks_left_out"] == 2
    for report in result.reports.values():
        assert (report.n, list(report.left_out)) == (3, ["test-1"])
    again = config(tmp_path, "BadGolds", 14)
    run(again, resume=True)
    assert sum(e["task"] == "train-3" for e in events(again, "task_left_out")) == 1


def test_too_many_of_them_refuse_the_run_before_the_model_is_read(tmp_path: Path) -> None:
    c = config(tmp_path, "BadGolds", 1, model={"path": str(tmp_path / "no model")})
    c = c.model_copy(update={"env": c.env.model_copy(update={"split": "none"})})
    with pytest.raises(TaskError, match=r"(?s)20 of the 20 tasks of .*:none that were looked at.*none-0.*10 more$"):
        run(c)
    assert not c.out.exists()
    c = config(tmp_path, "BadGolds", 1, eval={"split": "none", "n": 9})
    with pytest.raises(TaskError, match=r"9 of the 9 tasks of .*:none"):
        run(c)
