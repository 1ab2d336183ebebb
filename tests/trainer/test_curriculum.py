"""Curricula in whole runs: levels and tasks follow what was passed, evaluations do not, and a cut run goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import ConfigError
from areal_agents.evaluation.pass_rates import PassRate
from areal_agents.rollout.curriculum import Attempts, Curriculum
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.trainer.parts import all_tasks, parts_of, source_of, tasks_of
from areal_agents.trainer.preflight import look_at_tasks, require_runnable
from areal_agents.types import Task, Trajectory
from tests.trainer import test_mixture
from tests.trainer.mixed_envs import Letters

HERE = __name__
LETTERS = "tests.trainer.mixed_envs:Letters"
B, G = test_mixture.B, test_mixture.G


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curriculum")


def config(folder: Path, name: str, curriculum: Mapping[str, Any], *, steps: int = 6, **changes: Any) -> TrainConfig:
    changes = {"env": {"id": LETTERS}, "eval": {"n": 3, "baseline": False}} | changes
    return test_mixture.config(folder, name, steps=steps, curriculum=dict(curriculum), **changes)


def chosen(out: Path) -> list[tuple[int, str, str, float]]:
    """Step, group and task of every group, with the task's level."""
    found = {
        (r.step, int(r.trajectory.group[1:]), r.trajectory.task.id, r.trajectory.task.payload["level"]): None
        for r in read_records(out, kind="train")
    }
    return [(step, f"g{order}", task, level) for step, order, task, level in sorted(found)]


@pytest.mark.parametrize(
    "curriculum",
    [
        {"kind": "level", "window": B * G, "level_step": 0.25, "start": 0.5, "low": 0.4, "high": 0.45, "passes": 0.5},
        {"kind": "learnability", "explore": 0.2, "passes": 0.5},
        {"kind": f"{HERE}:harder", "passes": 0.5},
    ],
    ids=["level", "learnability", "own"],
)
def test_a_cut_run_chooses_the_tasks_of_the_run_that_was_never_cut(folder: Path, curriculum: dict[str, Any]) -> None:
    name = curriculum["kind"].rpartition(":")[2]
    asyncio.run(train(config(folder, f"{name}-whole", curriculum), console=False))
    asyncio.run(train(config(folder, f"{name}-cut", curriculum, steps=3), console=False))
    asyncio.run(train(config(folder, f"{name}-cut", curriculum), resume=True, console=False))
    whole, cut = (folder / f"{name}-{how}" for how in ("whole", "cut"))
    assert chosen(cut) == chosen(whole)
    rows, again = (read_metrics(out, kind="train") for out in (whole, cut))
    numbers, later = (
        [{k: v for k, v in row.items() if k.startswith("curriculum/")} for row in found] for found in (rows, again)
    )
    del numbers[2], later[2]  # behind the end of the first sitting no group was begun that would know of it
    assert numbers == later
    if name == "level":
        require_levels_follow(whole, 0.5)
        held = [r.trajectory.task for r in read_records(whole, kind="eval-after_rl")]
        assert {task.payload["level"] for task in held} == {0.0}  # of the settings, whatever the training plays now
    elif name == "harder":
        levels = [level for step, _, _, level in chosen(whole)]
        assert levels == [min(step - 1, 4) / 4 for step, *_ in chosen(whole)]  # a batch later, a level higher
        assert [row["curriculum/noted"] for row in rows[:-1]] == [B * (step + 1) for step in range(len(rows) - 1)]
    else:
        assert {level for *_, level in chosen(whole)} == {0.0}
        assert len({task for _, _, task, _ in chosen(whole)[:12]}) < 12  # some came again within the epoch of 12 tasks
        assert numbers[-1]["curriculum/tasks_known"] == len({task for step, _, task, _ in chosen(whole) if step < 6})


def require_levels_follow(out: Path, passes: float) -> None:
    """By hand, from the saved episodes: a batch fills the window, and moves the level of the next batch."""
    level, levels = 0.5, list[float]()
    for step in range(1, 7):
        episodes = [r.trajectory for r in read_records(out, kind="train") if r.step == step]
        assert {t.task.payload["level"] for t in episodes} == {level}
        levels.append(level)
        rate = sum(t.reward >= passes for t in episodes) / len(episodes)
        level = min(1.0, max(0.0, level + 0.25 * ((rate >= 0.45) - (rate <= 0.4))))  # 4 of 9 stays
    told = [row["curriculum/level"] for row in read_metrics(out, kind="train")]
    assert told[:-1] == levels[1:]  # the row of a step is written once the next groups are begun
    assert len(set(levels)) > 1


def test_each_environment_of_a_mixture_has_its_own_level(folder: Path) -> None:
    env = [{"id": LETTERS, "label": "a"}, {"id": f"{HERE}:Generous", "label": "b", "difficulty": 0.5}]
    c = config(folder, "mixed", {"kind": "level", "window": G, "level_step": 0.25}, steps=3, env=env)
    asyncio.run(train(c, console=False))
    rows = read_metrics(c.out, kind="train")
    assert [row["env/b/curriculum/level"] for row in rows][-1] == 1.0  # always passed: 0.5, 0.75, 1
    assert rows[0]["env/b/curriculum/level"] > rows[0]["env/a/curriculum/level"]
    held = [r.trajectory.task.payload["level"] for r in read_records(c.out, kind="eval-after_rl.b")]
    assert set(held) == {0.5}


class Harder(Curriculum):
    """A level more with each batch."""

    levels = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __init__(self) -> None:
        self.batches = self.noted = 0

    def level(self, order: int) -> float | None:
        return self.levels[min(self.batches, 4)]

    def note(self, batch: Sequence[Attempts]) -> None:
        self.batches, self.noted = self.batches + 1, self.noted + len(batch)

    def state(self) -> dict[str, int]:
        return {"batches": self.batches, "noted": self.noted}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.batches, self.noted = state["batches"], state["noted"]

    def metrics(self) -> dict[str, float]:
        return {"noted": self.noted}


def harder(seed: str, difficulty: float | None) -> Harder:
    return Harder()


class Generous(Letters):
    """Everything passes."""

    name = "generous"

    def pay(self, text: str) -> float:
        return 1.0


class Unleveled(Letters):
    """It has tasks of one level alone."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        return [] if difficulty == 1.0 else list(super().tasks(split, difficulty=difficulty))


class Flat(Letters):
    """Its tasks are the same at every level."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        return list(super().tasks(split))


class Leaking(Letters):
    """The training tasks of level 0.5 are the held-out ones of the default level."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        if split == "train" and difficulty == 0.5:
            return [replace(task, split="train") for task in super().tasks("test")]
        return list(super().tasks(split, difficulty=difficulty))


def test_every_level_that_may_come_is_looked_at_before_the_run(folder: Path) -> None:
    levels = {"kind": "level", "level_step": 0.5}
    with pytest.raises(ConfigError, match=r"env\.split = 'train': .*Unleveled has no tasks in it of difficulty 1$"):
        require_runnable(config(folder, "x", levels, env={"id": f"{HERE}:Unleveled"}))
    with pytest.raises(ConfigError, match=r"tasks of .*Flat are the same at 0 and 1: its tasks\(\) does not use it"):
        require_runnable(config(folder, "x", levels, env={"id": f"{HERE}:Flat"}))
    with pytest.raises(ConfigError, match=r"3 of the 3 tasks of .*Leaking:test are not held out"):
        asyncio.run(look_at_tasks(config(folder, "x", levels, env={"id": f"{HERE}:Leaking"})))
    asyncio.run(look_at_tasks(config(folder, "x", {}, env={"id": f"{HERE}:Leaking"})))  # 0.5 is not played
    part, c = parts_of(config(folder, "x", levels))[0], config(folder, "x", levels)
    assert {task.payload["level"] for task in all_tasks(c, part)} == {0.0, 0.5, 1.0}


# --- pass rates ------------------------------------------------------------------------------------------------------


def rates_file(path: Path, passes: Mapping[int, int], *, env: str = LETTERS, **changes: Any) -> str:
    """A row for each place in the split: how many of 8 attempts passed."""
    tasks = Letters.tasks("train")
    rows = [
        PassRate(env, "train", None, place, tasks[place].id, tasks[place].content_hash, 8, passed, 1.0, "tiny")
        for place, passed in passes.items()
    ]
    path.write_text("".join(json.dumps(asdict(replace(row, **changes))) + "\n" for row in rows))
    return str(path)


def test_only_tasks_within_the_bounds_train(folder: Path, tmp_path: Path) -> None:
    passes = {0: 0, 1: 1, 2: 4, 3: 7, 4: 8, 5: 8, 6: 4, 7: 4, 8: 4, 9: 4, 10: 0, 11: 0}
    path = rates_file(tmp_path / "rates.jsonl", passes)
    c = config(folder, "filtered", {"pass_rates": path, "min": 0.125, "max": 0.875}, steps=2)
    asyncio.run(train(c, console=False))
    places = {int(t.task.id.rpartition("-")[2]) for t in trained(c)}
    assert places <= {1, 2, 3, 6, 7, 8, 9}
    assert len(places) == 6  # each of the first two batches' groups has another one
    lines = (c.out / "events.jsonl").read_text().splitlines()
    (event,) = [e for e in map(json.loads, lines) if e["kind"] == "tasks_filtered"]
    assert [event[name] for name in ("kept", "of", "too_hard", "too_easy", "missing")] == [7, 12, 3, 2, 0]
    Path(path).unlink()
    rates_file(Path(path), passes | {2: 8})  # the file changes between two sittings
    with pytest.raises(ConfigError, match="the training split has 6 tasks, the checkpoint was made with 7"):
        asyncio.run(train(c.model_copy(update={"steps": 3}), resume=True, console=False))
    rates_file(Path(path), passes | {2: 8, 4: 4})  # as many, and not the same ones
    with pytest.raises(ConfigError, match=r"curriculum\.pass_rates leaves other tasks than those that the checkpoint"):
        asyncio.run(train(c.model_copy(update={"steps": 3}), resume=True, console=False))


def trained(c: TrainConfig) -> list[Trajectory]:
    return [r.trajectory for r in read_records(c.out, kind="train")]


def test_a_mixture_draws_from_what_its_files_leave(folder: Path, tmp_path: Path) -> None:
    path = rates_file(tmp_path / "rates.jsonl", {0: 4, 1: 4, 2: 0})
    with Path(path).open("a") as file:
        file.write(json.dumps(asdict(PassRate(f"{HERE}:Generous", "train", 0.5, 0, "t", "h", 8, 4, 1.0, "m"))) + "\n")
    c = config(folder, "x", {"pass_rates": path, "missing": "leave_out"})
    (part,) = parts_of(c)
    found = tasks_of(c, part, None)
    assert ([t.id for t in found.tasks], found.missing, found.too_hard) == (["train-0-0", "train-0-1"], 9, 1)
    source = source_of(c, [part], left_out={"": {}}, tell={"": lambda name, reason: None})
    assert {source.draw(order).task.id for order in range(8)} == {"train-0-0", "train-0-1"}
