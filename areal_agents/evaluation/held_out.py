"""The held-out tasks of an evaluation: which tasks of a split are played.

They are a seeded sample, which follows from the split's size and ``eval.task_seed`` alone. So every model, every
training and every ``seed`` meets the same tasks, and a larger sample holds the smaller ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from random import Random
from typing import Any

from areal_agents import settings
from areal_agents.errors import ConfigError
from areal_agents.registry import EnvSpec, require_distinct
from areal_agents.rollout.tasks import tasks_at
from areal_agents.settings.config import EvalConfig, TrainConfig
from areal_agents.types import Task

SETTING = "eval.task_seed"
_UNSAID = EvalConfig().task_seed


@dataclass(frozen=True, slots=True)
class Sample:
    """The choice of held-out tasks, as a report tells it."""

    n: int
    """Tasks that were asked for."""
    of: int | None
    """Tasks of the split. None where a report is from before it said so."""
    seed: int | None
    """``eval.task_seed``. None stands for the split's first tasks."""

    @classmethod
    def of_report(cls, row: Mapping[str, Any]) -> Sample:
        """Read the choice from a report's JSON.

        Reports that do not say it are from before there was a choice: of the split's first tasks.
        """
        if (said := row.get("sample")) is not None:
            return cls(**said)
        return cls(row["n"] + row.get("copies", 0) + len(row.get("left_out", ())), None, None)

    def __str__(self) -> str:
        if self.n == self.of:
            return f"all {self.n} tasks of the split"
        if self.seed is None:
            return f"the first {self.n} tasks of the split" + ("" if self.of is None else f", of {self.of}")
        return f"{self.n} of {self.of} tasks, sampled with {SETTING} = {self.seed}"


def chosen_indices(size: int, n: int, *, seed: int | None) -> list[int]:
    """Return the places of ``n`` tasks of a split with ``size`` tasks, in the split's order.

    With a seed they are a random sample. It rests on ``random()`` alone, whose numbers are the same in every version of
    Python. None takes the first ones.
    """
    if seed is None:
        return list(range(n))
    rng = Random(seed)
    return sorted(index for _, index in nsmallest(n, ((rng.random(), index) for index in range(size))))


def held_out(
    spec: EnvSpec, e: EvalConfig, *, difficulty: float | None, tell: Callable[[str, str], None]
) -> tuple[list[Task], Sample]:
    """Return the held-out tasks, without those that cannot be made, and how they were chosen.

    Args:
        spec: the environment.
        e: which split, how many of its tasks, and by which seed.
        difficulty: in [0, 1]. None is the environment's default.
        tell: is given name and reason of a task that cannot be made.

    Raises:
        ConfigError: the split has fewer tasks, or two of those chosen have one id.
    """
    tasks = spec.tasks(e.split, difficulty=difficulty)
    if len(tasks) == 0:
        raise ConfigError(f"{spec.id}:{e.split} has no tasks: name another split (eval.split), or give it some")
    if len(tasks) < e.n:
        raise ConfigError(f"{spec.id}:{e.split} has {len(tasks)} tasks, but eval.n = {e.n}: lower it")
    chosen = tasks_at(tasks, chosen_indices(len(tasks), e.n, seed=e.task_seed), tell)
    require_distinct(chosen, f"{spec.id}:{e.split}")
    return chosen, Sample(e.n, len(tasks), e.task_seed)


def settings_of(out: Path) -> TrainConfig:
    """Read the settings in ``out``, with the split's first tasks where they do not say how tasks are chosen.

    They are then from before there was a choice. Raises ConfigError for settings that are broken.
    """
    config = settings.load(out / "config.toml")
    return config if "task_seed" in config.eval.model_fields_set else _with_first_tasks(config)


def as_begun(config: TrainConfig, out: Path) -> TrainConfig:
    """Return ``config``, with which what is in ``out`` goes on, with the tasks that it was begun with.

    That is the split's first ones where ``out`` is from before there was a choice and ``config`` makes none. Settings
    that cannot be read are left to those who read all of them.
    """
    try:
        table: Mapping[str, Any] = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return config
    earlier = table.get("eval", {})
    chosen = config.eval.task_seed != _UNSAID or (isinstance(earlier, Mapping) and "task_seed" in earlier)
    return config if chosen else _with_first_tasks(config)


def _with_first_tasks(config: TrainConfig) -> TrainConfig:
    return config.model_copy(update={"eval": config.eval.model_copy(update={"task_seed": None})})
