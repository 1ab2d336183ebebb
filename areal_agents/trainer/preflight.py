"""The checks that a run passes before its folder is made, a model is loaded or an episode is played.

A run reads some settings only at its end, or after a warm start. What is wrong with one of them must not wait for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from areal_agents.algorithms.estimator import Estimator, refuse_biased
from areal_agents.algorithms.objective import PolicyObjective
from areal_agents.chat_model import refuse_training, remote_name
from areal_agents.engine import Sampling
from areal_agents.engines.local import require_startable, threads_of
from areal_agents.errors import ConfigError
from areal_agents.evaluation.held_out import held_out
from areal_agents.evaluation.overlap import Overlap, find_overlap
from areal_agents.evaluation.pass_rates import Filtered
from areal_agents.reward import task_checks
from areal_agents.rollout.group_judge import NamedGroupReward, group_reward_of, require_attempts, require_votes
from areal_agents.rollout.script import expert_of
from areal_agents.rollout.task_looks import Look, look_at
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import Tracker
from areal_agents.trainer.parts import Part, all_tasks, parts_of, shares_of, tasks_of
from areal_agents.trainer.run import demonstrated
from areal_agents.types import Task
from areal_agents.utils.packages import require_package
from areal_agents.utils.precision import resolve_device
from areal_agents.utils.system import require_linux


def require_runnable(config: TrainConfig) -> None:
    """Raise ArealError for a setting that a training would fail at, whenever it reads it."""
    if remote_name(config.model.path) is not None:
        refuse_training(config.model.path)
    require_linux("training")
    _require_parts(config)
    a, r = config.algorithm, config.rollout
    parts = parts_of(config)
    for i, part in enumerate(parts):
        part.spec.require_arguments({})
        demonstrations = shares_of(config, parts).counts(config.warm_start.demonstrations)[i]
        _require_tasks(part, part.settings(config), demonstrations)
        judge = group_reward_of(part.spec, r.group_reward)
        _require_estimator(config, judge)
        if judge is not None:
            refuse_biased(a.advantage, judge.declared, judge.name)
            require_votes(judge, r.group_size)
        require_attempts(group_reward_of(part.spec), config.eval.k)
    PolicyObjective(loss=a.loss, correction=a.correction, mask=a.mask, aggregation=a.aggregation, constant=a.constant)
    Sampling(r.max_turn_tokens, r.temperature).require_trainable()
    if config.cluster.backend == "local":  # on a cluster the learner's node decides
        resolve_device(config.learner.device)


def _require_estimator(config: TrainConfig, judge: NamedGroupReward | None) -> None:
    """Raise ConfigError for an estimator that other settings do not fit."""
    a, r = config.algorithm, config.rollout
    estimator, where = Estimator(a.advantage), f"algorithm.advantage.kind = {a.advantage.kind!r}"
    estimator.require_size(r.group_size)
    if estimator.baseline == "greedy":
        if a.teacher.alone:
            raise ConfigError(
                f"{where} plays greedy episodes, and with algorithm.teacher.rewards = false no reward is compared with "
                "theirs: leave the advantage out"
            )
        if r.concurrency <= r.group_size:
            raise ConfigError(
                f"{where} plays one greedy episode beside the rollout.group_size = {r.group_size} of a group, and "
                f"rollout.concurrency = {r.concurrency} cannot hold them: raise concurrency"
            )
        if judge is not None:
            raise ConfigError(
                f"{where} compares with a greedy episode, which the group reward {judge.name!r} does not judge: use "
                "another estimator, or another reward"
            )
    if r.dynamic_sampling and estimator.reads_values:
        raise ConfigError(
            f"rollout.dynamic_sampling = true replaces groups whose rewards give no signal, but {where} reads a "
            "critic's values, which give one in every group: leave it out"
        )
    if r.dynamic_sampling and not estimator.judges_alone():
        raise ConfigError(
            f"rollout.dynamic_sampling = true replaces groups that train nothing by themselves, but {where} compares "
            "episodes with their whole batch, in which a group of equal rewards trains too: leave it out, or choose an "
            "estimator that compares within the group (of 'reinforce_pp': baseline = 'group', weight = 'episode')"
        )


def _require_parts(config: TrainConfig) -> None:
    if config.cluster.backend == "ray":  # its engines' packages are needed on their nodes, which say so
        require_package("ray", "cluster.backend = 'ray'", "set cluster.backend = 'local'")
    else:
        require_startable(config.engine)
        threads_of("learner.threads", config.learner.threads)
    if config.track.tensorboard:
        require_package("tensorboard", "track.tensorboard", "set track.tensorboard = false")
    if config.track.wandb:
        require_package("wandb", "track.wandb", "leave it empty")


def _require_tasks(part: Part, config: TrainConfig, demonstrations: int) -> None:
    """Raise ConfigError where an environment lacks tasks that the run will need.

    Args:
        part: the environment.
        config: the run's settings as if it were the only one.
        demonstrations: those that the warm start has of it.
    """
    spec = part.spec
    all_tasks(config, part)  # of every difficulty that a curriculum may choose
    tell = lambda name, reason: None  # noqa: E731  the evaluation itself tells
    held_out(spec, config.eval, difficulty=config.env.difficulty, tell=tell)
    if demonstrations:
        tasks = spec.tasks(config.env.split, difficulty=config.env.difficulty)
        drawn = demonstrated(tasks, config, demonstrations)
        without = [task.id for task in drawn if expert_of(spec, task) is None]
        if without:
            raise ConfigError(
                f"warm_start.demonstrations = {len(drawn)}: {spec.id} has no expert for {len(without)} of these tasks "
                f"(first: {without[0]}): write its expert(), or set warm_start.demonstrations = 0"
            )


@dataclass(frozen=True, slots=True)
class PartLooks:
    """What the looks at the tasks of one environment found."""

    train: Look
    held_out: Look


@dataclass(frozen=True, slots=True)
class Looks:
    """What the looks at a run's tasks found."""

    parts: Mapping[str, PartLooks]
    """By the labels of the environments."""
    overlaps: tuple[Overlap, ...] = ()
    """Of the training tasks of each environment among the held-out ones of each."""
    not_held_out: tuple[str, ...] = ()
    """Labels of the environments of which one split is both, as the settings say."""
    filtered: Mapping[str, tuple[Filtered, str]] = field(default_factory=dict)
    """What a file of pass rates leaves of the training tasks, and that in words. By the labels of the environments."""

    def tell(self, tracker: Tracker) -> None:
        """Say how many training tasks were compared with the held-out ones, where that is not all or finds some."""
        for label, (f, text) in self.filtered.items():
            where = {"env": label} if label else {}
            counts = {"too_hard": f.too_hard, "too_easy": f.too_easy, "missing": f.missing}
            tracker.event("tasks_filtered", kept=len(f.tasks), of=f.of, **counts, **where)
            tracker.message(f"{label}: {text}" if label else text)
        for label in self.not_held_out:
            of = f" of env {label!r}" if label else ""
            tracker.message(f"note: eval.split is the training split{of}: nothing is held out")
        for o in self.overlaps:
            where = {"train": o.train, "held_out": o.held_out} if len(self.parts) > 1 else {}
            tracker.event(
                "held_out", looked_at=o.seen, of=o.of, evaluated=o.evaluated, overlapping=len(o.pairs), **where
            )  # fmt: skip
            if o.pairs or o.seen < o.of:
                tracker.message(str(o))


async def look_at_tasks(config: TrainConfig) -> Looks:
    """Look at the training and the held-out tasks of every environment.

    Raises TaskError where more of either cannot be scored than ``rollout.max_bad_tasks`` allows, and ConfigError where
    a training task of one is among the held-out ones of any, and ``eval.overlap`` does not allow it.
    """
    parts, e = parts_of(config), config.eval
    train = {part.label: all_tasks(config, part) for part in parts}
    found: dict[str, PartLooks] = {}
    held: dict[str, Sequence[Task]] = {}
    for part in parts:
        held[part.label], found[part.label] = await _look_at_part(config, part, train[part.label])
    overlaps: list[Overlap] = []
    both = [part.label for part in parts if part.env.split == e.split]
    for part in parts:
        for other in parts:
            if part is other and part.label in both:
                continue
            names = _split_name(part, part.env.split), _split_name(other, e.split)
            overlap = await asyncio.to_thread(
                find_overlap, train[part.label], held[other.label], names=names, seed=part.seed(config)
            )  # fmt: skip
            overlaps.append(overlap)
            if e.overlap == "refuse":
                overlap.require_none("eval.overlap = 'tell'")
    left: dict[str, tuple[Filtered, str]] = {}
    if config.curriculum.pass_rates:
        for part in parts:
            of_part = tasks_of(config, part, part.env.difficulty)
            left[part.label] = of_part, of_part.text(config.curriculum)
    return Looks(found, tuple(overlaps), tuple(both), left)


def _split_name(part: Part, split: str) -> str:
    """Name a split of an environment, for people."""
    return f"{part.spec.id}:{split}" + (f" ({part.label})" if part.label else "")


async def _look_at_part(config: TrainConfig, part: Part, tasks: Sequence[Task]) -> tuple[list[Task], PartLooks]:
    """Look at the tasks of one environment. Returns its held-out tasks too."""
    spec, max_bad = part.spec, config.rollout.max_bad_tasks
    checks = spec.env_class().task_checks()
    where = _split_name(part, part.env.split)
    group = group_reward_of(spec, config.rollout.group_reward) if config.rollout.group_reward else None
    besides = () if group is None else task_checks(group.reward)
    train = await look_at(tasks, [*checks, *besides], where=where, seed=part.seed(config))
    train.require_enough(where, max_bad=max_bad)
    tell = lambda name, reason: None  # noqa: E731  the evaluation itself tells
    chosen, _ = held_out(spec, config.eval, difficulty=part.env.difficulty, tell=tell)
    where = _split_name(part, config.eval.split)
    evaluated = await look_at(chosen, checks, where=where, seed=config.seed)
    evaluated.require_enough(where, max_bad=max_bad)
    return chosen, PartLooks(train, evaluated)
