"""The beginning of a run, and of its going on.

A resumed run goes on from its last commit. It may differ from what it was in two kinds of settings: those that mean
nothing for what is saved, and those that nothing committed has used yet.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from areal_agents.errors import ConfigError
from areal_agents.evaluation.held_out import settings_of
from areal_agents.evaluation.report import EvalReport
from areal_agents.learner.optim import learning_rate
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.differences import differences, plain_key
from areal_agents.settings.values import show
from areal_agents.tracking.trajectories import Record, read_shard, shard_path, write_shard
from areal_agents.trainer.parts import split_label
from areal_agents.trainer.run_folder import Commit, RunFolder

MAY_CHANGE = (
    "steps", "out", "engine.", "cluster.", "checkpoint.", "track.", "eval.every", "eval.baseline", "eval.overlap",
    "env.sandbox", "env.step_timeout",
    "algorithm.teacher.url", "algorithm.teacher.api_key_env", "algorithm.teacher.timeout",
    "algorithm.teacher.max_retries", "algorithm.teacher.concurrency",
    "learner.lr", "learner.warmup_steps", "learner.schedule", "learner.grad_clip", "learner.token_budget",
    "learner.gradient_checkpointing", "learner.logprob_chunk", "learner.threads", "learner.device",
    "learner.lora.publish",
    "rollout.concurrency", "rollout.max_retries", "rollout.failure_window", "rollout.failure_budget",
    "rollout.max_bad_tasks",
)  # fmt: skip
"""Settings, or sections, that a resumed run may always have otherwise than the run it goes on with. The others decide
which tasks come, what the stored episodes and evaluations mean, or are part of the optimizer's saved state."""

User = Literal["an evaluation", "the checkpoint", "a step"]
"""What is committed and was made with a setting."""
USED_BY: Mapping[str, tuple[User, ...]] = {
    "eval.": ("an evaluation",),
    "algorithm.": ("a step",),
    "learner.minibatches": ("a step",),
    "rollout.mode": ("a step",), "rollout.groups": ("a step",), "rollout.group_size": ("a step",),
    "rollout.max_staleness": ("a step",), "rollout.on_exceed": ("a step",), "rollout.order": ("a step",),
    "rollout.dynamic_sampling": ("a step",), "rollout.max_refills": ("a step",),
    "rollout.temperature": ("a step",), "rollout.group_reward": ("a step",),
    "learner.": ("the checkpoint",), "warm_start.": ("the checkpoint",), "env.split": ("the checkpoint",),
    "curriculum.": ("a step",),
}  # fmt: skip
"""Of the other settings, what uses them, by the longest name that fits. Those that are not here are used by evaluations
and checkpoints alike: the model, the environment, the seed and the limits of an episode."""


def refuse_evaluation(out: Path) -> None:
    """Raise ConfigError where ``out`` holds an evaluation, before anything is written there."""
    if (out / "evaluation.json").exists() and not (out / "commit.json").exists():
        raise ConfigError(f"{out} holds an evaluation: choose another --out for a training")


def refuse_taken(folder: RunFolder) -> None:
    """Raise ConfigError where ``folder`` holds another run.

    Nothing of it may be overwritten or mixed up. A start that failed before its first episode is no run: whatever
    setting was wrong may be put right in the same folder. Its lock is there, which tells its ``config.toml`` from one
    that somebody wrote by hand.
    """
    out, names = folder.out, ("commit.json", "metrics.jsonl", "trajectories", "checkpoints")
    parts = [part for name in names for part in ((out / name), *(out / name).rglob("*"))]
    done = any(part.is_file() and part.stat().st_size for part in parts)
    if done or ((out / "config.toml").exists() and not folder.was_locked):
        raise ConfigError(
            f"{out} holds another run: go on with it by --resume, choose another --out, or remove the folder"
        )


def begin(folder: RunFolder, config: TrainConfig, *, resume: bool) -> tuple[Commit | None, dict[str, tuple[Any, Any]]]:
    """Find where the run starts, and which settings changed since it was begun.

    Returns:
        The commit to go on from, and by dotted key the changed settings (old, new). The commit is None for a new run,
        and empty for one that was killed before it committed anything.

    Raises:
        ConfigError: the folder holds a run and ``resume`` is False, a setting changed that may not because something
            committed was made with it, or more steps are done than ``config.steps``.
        CheckpointError: the commit cannot be read.
    """
    if not resume:
        refuse_taken(folder)
        return None, {}
    if not (config.out / "config.toml").exists():
        if (config.out / "commit.json").exists():
            raise ConfigError(
                f"{config.out} holds a run without its config.toml: put the file back, or choose another --out"
            )
        return None, {}
    changes = differences(settings_of(config.out), config)
    commit = folder.read_commit() or Commit()
    goes_on = commit.complete and commit.step < config.steps
    others = {label: r for label, r in commit.reports.items() if not (goes_on and split_label(label)[0] == "after_rl")}
    used = dataclasses.replace(commit, reports=others)  # the end is measured anew, by other settings too
    uses = {key: _uses(key, used) for key in changes}
    if any(uses.values()):
        lines = [
            f"  {key} was {changes[key][0]!r} and is {changes[key][1]!r} now; {' and '.join(by)} used it"
            for key, by in uses.items() if by
        ]  # fmt: skip
        raise ConfigError(
            f"{config.out} was begun with other settings:\n" + "\n".join(lines) + "\n"
            f"resume with the same ones (areal-agents train {shlex.quote(str(config.out / 'config.toml'))} --resume), "
            "or start a new run in another folder"
        )
    if commit.step > config.steps:
        raise ConfigError(f"{config.out} has {commit.step} steps behind it, but steps = {config.steps}: raise steps")
    folder.clean(commit)
    if goes_on:
        folder.set_model_aside(commit.step)
        commit = _end_as_any_step(config.out, commit)
        folder.commit(commit)  # before the logs are cut back behind that evaluation
    return commit, changes


def _end_as_any_step(out: Path, commit: Commit) -> Commit:
    """Return the commit of a finished run that goes on: its last evaluation is one of many, called ``step_N``.

    Its episodes are written under that name. They are in the returned commit's mark, and the old ones, which are not,
    are removed by whoever cuts the files back to it. Doing it twice is doing it once.
    """
    reports, mark = dict[str, EvalReport](), dict(commit.mark)
    for label, report in commit.reports.items():
        what, part = split_label(label)
        if what != "after_rl":
            reports[label] = report
            continue
        new = f"step_{commit.step}" + (f".{part}" if part else "")
        reports[new] = report
        if _rename(out, f"eval-{label}", f"eval-{new}", commit.step):
            mark["shards"] = {**mark.get("shards", {}), f"eval-{new}": [[commit.step, commit.step]]}
    return dataclasses.replace(commit, complete=False, reports=reports, mark=mark)


def _rename(out: Path, old: str, new: str, step: int) -> bool:
    """Write the episodes of kind ``old`` as those of kind ``new``. Returns False where there are none."""
    shard = shard_path(out, old, step)
    if not shard.exists():
        return False
    episodes = [record.trajectory for record in read_shard(shard)]
    renamed = [
        dataclasses.replace(t, id=new + t.id.removeprefix(old), group=new + t.group.removeprefix(old)) for t in episodes
    ]
    write_shard(shard_path(out, new, step), [Record(new, step, t) for t in renamed])
    return True


def _uses(key: str, commit: Commit) -> list[str]:
    """Return what in ``commit`` was made with the setting ``key``, so that the setting has to stay as it was."""
    key = plain_key(key)
    if key.startswith(MAY_CHANGE):
        return []
    warm = commit.step == 0 and commit.warm_started  # a checkpoint from before the first episode of a step
    there: dict[User, str | None] = {
        "an evaluation": f"the evaluation {', '.join(map(repr, commit.reports))}" if commit.reports else None,
        "the checkpoint": f"the checkpoint of step {commit.step}" if commit.checkpoint is not None else None,
        "a step": f"step {commit.step}" if commit.checkpoint is not None and not warm else None,
    }
    names = [name for name in USED_BY if key == name or (name.endswith(".") and key.startswith(name))]
    users: tuple[User, ...] = USED_BY[max(names, key=len)] if names else ("an evaluation", "the checkpoint")
    return [what for user in users if (what := there[user]) is not None]


@dataclass(frozen=True, slots=True)
class RateChange:
    """What changed settings do to the learning rate."""

    step: int
    """The first step, from 1, that has another rate than it would have had."""
    old: float
    new: float
    text: str
    """One sentence for people."""


def rate_change(config: TrainConfig, changes: Mapping[str, tuple[Any, Any]], step: int) -> RateChange | None:
    """Find what changed settings do to the learning rate of the steps that are left.

    Args:
        config: the settings of the resumed run.
        changes: by dotted key, what they were and are.
        step: the last step that is done.

    Returns:
        None where the rate of no step changes.
    """
    keys = ("learner.lr", "steps", "learner.warmup_steps", "learner.schedule")
    c = config.learner
    now = (c.lr, config.steps, c.warmup_steps, c.schedule)
    old = tuple(changes.get(key, (value,))[0] for key, value in zip(keys, now, strict=True))

    def rate(at: int, made: tuple[Any, ...]) -> float:
        return learning_rate(at, peak=made[0], total=made[1], warmup=made[2], schedule=made[3])

    first = next((at for at in range(step, config.steps) if rate(at, old) != rate(at, now)), None)
    if first is None:
        return None
    before, after, last = rate(first, old), rate(first, now), rate(config.steps - 1, now)
    given = ", ".join(f"{k} = {show(changes[k][1])} (was {show(changes[k][0])})" for k in keys if k in changes)
    text = (
        f"{given}: the learning rate changes; step {first + 1} has {after:.3g} where it had {before:.3g}, and the last "
        f"step, {config.steps}, has {last:.3g} (learner.schedule = {c.schedule!r})"
    )
    return RateChange(first + 1, before, after, text)
