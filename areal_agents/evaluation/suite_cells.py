"""The cells of a suite: one entry, one seed and one model each, an evaluation in a folder of its own.

    OUT/cells/areal-Hanoi-v0-test-3f0c…/   as `areal-agents eval` leaves it behind

A cell's folder is named by a hash of what decides its numbers: the entry, the seed, the content of its tasks, the
settings of model and engine, and the model's fingerprint. So a cell that is finished is not played again, whatever
suite asks for it, and one that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents import registry
from areal_agents.chat_model import remote_name
from areal_agents.errors import ArealError, ConfigError
from areal_agents.evaluation.compare import TaskKey, load
from areal_agents.evaluation.evaluate import evaluation_config
from areal_agents.evaluation.held_out import held_out
from areal_agents.evaluation.players import Server
from areal_agents.evaluation.report import EvalReport
from areal_agents.evaluation.suite import Suite, SuiteEntry
from areal_agents.evaluation.unfinished import KIND, STEP, fingerprint
from areal_agents.models import resolve
from areal_agents.registry import EnvSpec
from areal_agents.settings.config import EnvConfig, EvalConfig, ModelConfig, TrainConfig
from areal_agents.tracking.trajectories import shard_path
from areal_agents.types import Task

CELLS = "cells"


@dataclass(frozen=True, slots=True)
class Cell:
    """One evaluation of a suite."""

    entry: SuiteEntry
    seed: int
    model: str
    config: TrainConfig
    """Its settings, whose ``out`` is its folder."""

    @property
    def out(self) -> Path:
        return self.config.out

    def report(self) -> EvalReport | None:
        """Read the report, or return None where there is none yet. Raises ArealError for one that is broken."""
        path = self.out / "report.json"
        try:
            return EvalReport.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ArealError(f"{path} cannot be read ({type(error).__name__}: {error}): remove its folder") from error

    def finished(self) -> bool:
        """Say whether all of it is played, and nothing was lost to infrastructure."""
        shard, report = shard_path(self.out, KIND, STEP), self.report()
        if report is None or not shard.exists() or shard.with_suffix(".jsonl").exists():
            return False
        return not report.unplayed and not report.infra_rate

    def rewards(self) -> Mapping[TaskKey, Sequence[float]]:
        """Read the rewards of each task's attempts."""
        return load(self.out).rewards


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a model from another."""

    name: str
    fingerprint: str
    """Of the folder; of a served model its name and URL."""


def identity_of(model: str, server: Server | None) -> Identity:
    """Return what tells ``model`` from another. Raises ModelError for one that cannot be found."""
    if remote_name(model) is not None:
        if server is None:
            raise ConfigError(f"model {model!r} is served: say where with --url URL")
        return Identity(model, f"{model} at {server.url}")
    return Identity(model, fingerprint(resolve(model)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """An entry with the tasks that it plays."""

    entry: SuiteEntry
    spec: EnvSpec
    tasks: tuple[Task, ...]


def chosen_of(suite: Suite) -> list[Chosen]:
    """Find every entry's environment and tasks.

    Raises ConfigError with what is wrong with each entry, before anything is played.
    """
    found, problems = [], []
    for entry in suite.entries:
        try:
            spec = registry.spec(entry.env).with_kwargs(entry.kwargs)
            spec.require_arguments({})
            e = EvalConfig(split=entry.split, n=entry.n, task_seed=entry.task_seed)
            tasks, _ = held_out(spec, e, difficulty=entry.difficulty, tell=lambda name, reason: None)
            found.append(Chosen(entry, spec, tuple(tasks)))
        except ArealError as error:
            problems.append(f"{entry.name}: {error}")
    if problems:
        raise ConfigError("\n".join([f"suite {suite} cannot be played:", *(f"  - {p}" for p in problems)]))
    return found


def cells_of(chosen: Chosen, who: Identity, *, base: TrainConfig, out: Path) -> list[Cell]:
    """Return the cells of an entry for one model, one a seed.

    Args:
        chosen: the entry with its tasks.
        who: the model.
        base: settings of model, engine and failures, which the suite leaves to who plays it.
        out: the folder that holds ``cells``.

    Raises:
        ConfigError: a setting that does not fit.
    """
    entry, found = chosen.entry, []
    for seed in entry.seeds:
        config = evaluation_config(
            EnvConfig(
                id=entry.env, difficulty=entry.difficulty, kwargs=entry.kwargs, sandbox=base.env.sandbox,
                step_timeout=base.env.step_timeout,
            ),
            ModelConfig(**{**base.model.model_dump(), "path": who.name}),
            EvalConfig(
                split=entry.split, n=entry.n, task_seed=entry.task_seed, k=entry.k,
                temperature=entry.sampling.temperature,
            ),
            seed=seed,
            out=out,
            engine=base.engine,
            rollout=base.rollout.model_copy(
                update={
                    "max_turns": entry.max_turns,
                    "max_turn_tokens": entry.sampling.max_turn_tokens,
                    "max_episode_tokens": entry.sampling.max_episode_tokens,
                }
            ),
        )  # fmt: skip
        key = _key(config, chosen.tasks, who)
        short = re.sub(r"[^\w.-]+", "-", f"{entry.env}-{entry.split}")[:60]
        folder = out / CELLS / f"{short}-{key[:16]}"
        found.append(Cell(entry, seed, who.name, config.model_copy(update={"out": folder})))
    return found


def _key(config: TrainConfig, tasks: Sequence[Task], who: Identity) -> str:
    """Return a hash of what decides the numbers of a cell."""
    content: dict[str, Any] = {
        "env": config.env.model_dump(mode="json", include={"id", "difficulty", "kwargs"}),
        "eval": config.eval.model_dump(mode="json", include={"split", "n", "k", "temperature", "task_seed"}),
        "seed": config.seed,
        "rollout": config.rollout.model_dump(mode="json", include={"max_turns", "max_turn_tokens"})
        | {"episode_tokens": config.rollout.episode_tokens},
        "model": config.model.model_dump(mode="json", exclude={"path"}),
        "engine": None
        if remote_name(who.name) is not None
        else config.engine.model_dump(mode="json", include={"kind", "precision", "deterministic"}),
        "fingerprint": who.fingerprint,
        "tasks": [[t.id, t.content_hash] for t in tasks],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
