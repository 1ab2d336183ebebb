"""The beginning of a run, and of its going on.

A resumed run may differ in some settings, and goes on from its last commit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from areal_agents import settings
from areal_agents.errors import ConfigError
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.run_folder import Commit, RunFolder

MAY_CHANGE = (
    "steps", "out", "engine.", "cluster.", "checkpoint.", "track.", "eval.every", "eval.baseline",
    "env.sandbox", "env.step_timeout",
    "learner.lr", "learner.warmup_steps", "learner.schedule", "learner.grad_clip", "learner.token_budget",
    "learner.gradient_checkpointing", "learner.logprob_chunk", "learner.threads", "learner.device",
    "rollout.concurrency", "rollout.max_retries", "rollout.failure_window", "rollout.failure_budget",
    "rollout.max_bad_tasks",
)  # fmt: skip
"""Settings, or sections, that a resumed run may have otherwise than the run it goes on with. The others decide which
tasks come, what the stored episodes and evaluations mean, or are part of the optimizer's saved state."""


def refuse_taken(config: TrainConfig) -> None:
    """Raise ConfigError where ``config.out`` holds another run.

    Nothing of it may be overwritten or mixed up.
    """
    if (config.out / "config.toml").exists() or (config.out / "commit.json").exists():
        raise ConfigError(
            f"{config.out} holds another run: go on with it by --resume, choose another --out, or remove the folder"
        )


def begin(folder: RunFolder, config: TrainConfig, *, resume: bool) -> tuple[Commit | None, dict[str, tuple[Any, Any]]]:
    """Find where the run starts, and which settings changed since it was begun.

    Returns:
        The commit to go on from, and by dotted key the changed settings (old, new). The commit is None for a new run,
        and empty for one that was killed before it committed anything.

    Raises:
        ConfigError: the folder holds a run and ``resume`` is False, a setting changed that may not, or more steps are
            done than ``config.steps``.
        CheckpointError: the commit cannot be read.
    """
    if not resume:
        refuse_taken(config)
        return None, {}
    if not (config.out / "config.toml").exists():
        if (config.out / "commit.json").exists():
            raise ConfigError(
                f"{config.out} holds a run without its config.toml: put the file back, or choose another --out"
            )
        return None, {}
    changes = differences(settings.load(config.out / "config.toml"), config)
    wrong = [key for key in changes if not key.startswith(MAY_CHANGE)]
    if wrong:
        lines = [f"  {key} was {changes[key][0]!r} and is {changes[key][1]!r} now" for key in wrong]
        raise ConfigError(
            f"{config.out} was begun with other settings:\n" + "\n".join(lines) + "\n"
            f"resume with the same ones (areal-agents train {config.out / 'config.toml'} --resume), or start a new "
            "run in another folder"
        )
    commit = folder.read_commit() or Commit()
    if commit.step > config.steps:
        raise ConfigError(f"{config.out} has {commit.step} steps behind it, but steps = {config.steps}: raise steps")
    folder.clean(commit)
    if commit.complete and commit.step < config.steps:  # it is to go on: its last evaluation was not the last
        reports = {label: r for label, r in commit.reports.items() if label != "after_rl"}
        commit = dataclasses.replace(commit, complete=False, reports=reports)
        folder.commit(commit)  # before the logs are cut back behind that evaluation
    return commit, changes


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return both values of each dotted key whose values differ, except ``out``."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k) and k != "out"}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and prefix + name != "env.kwargs":
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
