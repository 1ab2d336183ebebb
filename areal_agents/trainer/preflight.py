"""The checks that a run passes before its folder is made, a model is loaded or an episode is played.

A run reads some settings only at its end, or after a warm start. What is wrong with one of them must not wait for that.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_agents import registry
from areal_agents.algorithms.estimator import Estimator, refuse_biased
from areal_agents.algorithms.objective import PolicyObjective
from areal_agents.chat_model import refuse_training, remote_name
from areal_agents.engine import Sampling
from areal_agents.engines.local import require_startable, threads_of
from areal_agents.errors import ConfigError
from areal_agents.evaluation.held_out import held_out
from areal_agents.registry import EnvSpec
from areal_agents.reward import task_checks
from areal_agents.rollout.group_judge import NamedGroupReward, group_reward_of, require_attempts, require_votes
from areal_agents.rollout.script import expert_of
from areal_agents.rollout.task_looks import Look, look_at
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.run import demonstrated
from areal_agents.utils.packages import require_package
from areal_agents.utils.precision import resolve_device
from areal_agents.utils.system import require_linux


def require_runnable(config: TrainConfig) -> None:
    """Raise ArealError for a setting that a training would fail at, whenever it reads it."""
    if remote_name(config.model.path) is not None:
        refuse_training(config.model.path)
    require_linux("training")
    _require_parts(config)
    spec = registry.spec(config.env.id).with_kwargs(config.env.kwargs)
    spec.require_arguments({})
    _require_tasks(spec, config)
    a, r = config.algorithm, config.rollout
    judge = group_reward_of(spec, r.group_reward)
    _require_estimator(config, judge)
    if judge is not None:
        refuse_biased(a.advantage, judge.declared, judge.name)
        require_votes(judge, r.group_size)
    require_attempts(group_reward_of(spec), config.eval.k)
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


def _require_tasks(spec: EnvSpec, config: TrainConfig) -> None:
    tasks = spec.tasks(config.env.split, difficulty=config.env.difficulty)
    if not tasks:
        raise ConfigError(f"env.split = {config.env.split!r}: {spec.id} has no tasks in it")
    tell = lambda name, reason: None  # noqa: E731  the evaluation itself tells
    held_out(spec, config.eval, difficulty=config.env.difficulty, tell=tell)
    if config.warm_start.demonstrations:
        drawn = demonstrated(tasks, config)
        without = [task.id for task in drawn if expert_of(spec, task) is None]
        if without:
            raise ConfigError(
                f"warm_start.demonstrations = {len(drawn)}: {spec.id} has no expert for {len(without)} of these tasks "
                f"(first: {without[0]}): write its expert(), or set warm_start.demonstrations = 0"
            )


@dataclass(frozen=True, slots=True)
class Looks:
    """What the looks at a run's tasks found."""

    train: Look
    held_out: Look


async def look_at_tasks(config: TrainConfig) -> Looks:
    """Look at the training and the held-out tasks.

    Raises TaskError where more of either cannot be scored than ``rollout.max_bad_tasks`` allows.
    """
    spec, e = registry.spec(config.env.id).with_kwargs(config.env.kwargs), config.eval
    checks = spec.env_class().task_checks()
    tasks = spec.tasks(config.env.split, difficulty=config.env.difficulty)
    where = f"{spec.id}:{config.env.split}"
    group = group_reward_of(spec, config.rollout.group_reward) if config.rollout.group_reward else None
    besides = () if group is None else task_checks(group.reward)
    train = await look_at(tasks, [*checks, *besides], where=where, seed=config.seed)
    train.require_enough(where, max_bad=config.rollout.max_bad_tasks)
    tell = lambda name, reason: None  # noqa: E731  the evaluation itself tells
    chosen, _ = held_out(spec, e, difficulty=config.env.difficulty, tell=tell)
    where = f"{spec.id}:{e.split}"
    evaluated = await look_at(chosen, checks, where=where, seed=config.seed)
    evaluated.require_enough(where, max_bad=config.rollout.max_bad_tasks)
    return Looks(train, evaluated)
