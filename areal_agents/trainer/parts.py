"""The environments of a run: one, or the parts of a mixture.

    [env]     ─▶ one part without a label, whose settings are the run's own
    [[env]]   ─▶ a part each: its label, its weight, and the run's settings as if it were the only environment

Whatever reads ``config.env`` is given ``Part.settings``, so that it need not know of mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from areal_agents import registry
from areal_agents.errors import ConfigError
from areal_agents.evaluation.pass_rates import Filtered, filtered
from areal_agents.evaluation.report import EvalReport
from areal_agents.evaluation.statistics import mean_of_intervals
from areal_agents.registry import EnvSpec
from areal_agents.rollout.curriculum import curriculum_of, levels_of
from areal_agents.rollout.shares import Shares
from areal_agents.rollout.sources import EnvTasks, Source, stream_seed
from areal_agents.rollout.task_lists import joined
from areal_agents.rollout.tasks import TaskStream, task_at
from areal_agents.settings.config import EnvConfig, TrainConfig
from areal_agents.types import Task

_COMPARED = 8
"""Tasks by which the lowest and the highest difficulty are told apart."""


@dataclass(frozen=True, slots=True)
class Part:
    """One environment of a run."""

    label: str
    """Empty where the run has no other."""
    weight: float
    env: EnvConfig
    spec: EnvSpec
    """With the arguments of ``env``."""

    @property
    def prefix(self) -> str:
        """What the names of its metrics begin with."""
        return f"env/{self.label}/" if self.label else ""

    @property
    def where(self) -> str:
        """What its settings are called in messages."""
        return f"env {self.label!r}" if self.label else "env"

    def settings(self, config: TrainConfig) -> TrainConfig:
        """Return the run's settings as if this were its only environment."""
        return config.model_copy(update={"env": self.env, "mixture": ()})

    def evaluation(self, label: str) -> str:
        """Return what the part's own evaluation is called of the run's evaluation ``label``."""
        return f"{label}.{self.label}" if self.label else label

    def seed(self, config: TrainConfig, level: float | None = None) -> int:
        """Return the seed of the order of its training tasks."""
        return stream_seed(config.seed, self.label, level)


def parts_of(config: TrainConfig) -> tuple[Part, ...]:
    """Return the environments of a run. Raises RegistryError for one that there is not."""
    if not config.mixture:
        return (Part("", 1.0, config.env, _spec(config.env)),)
    return tuple(Part(e.label, e.weight, e, _spec(e)) for e in config.mixture)


def _spec(env: EnvConfig) -> EnvSpec:
    return registry.spec(env.id).with_kwargs(env.kwargs)


def split_label(label: str) -> tuple[str, str]:
    """Return what an evaluation of a run is of, such as ``step_4``, and the label of its environment, if it has one."""
    what, _, part = label.partition(".")
    return what, part


def shares_of(config: TrainConfig, parts: Sequence[Part]) -> Shares:
    """Return which of the parts each group plays."""
    return Shares([part.weight for part in parts], seed=config.seed)


def tasks_of(config: TrainConfig, part: Part, level: float | None) -> Filtered:
    """Return the tasks of one difficulty that a part trains on, and what a file of pass rates leaves of them.

    Raises ConfigError where there are none.
    """
    tasks = part.spec.tasks(part.env.split, difficulty=level)
    if not len(tasks):
        at = "" if level == part.env.difficulty else f" of difficulty {level:g}"
        raise ConfigError(f"{part.where}.split = {part.env.split!r}: {part.spec.id} has no tasks in it{at}")
    c = config.curriculum
    if not c.pass_rates:
        return Filtered(tasks)
    return filtered(
        tasks, c, env=part.spec.id, split=part.env.split, difficulty=level, kwargs=part.env.kwargs
    )  # fmt: skip


def all_tasks(config: TrainConfig, part: Part) -> Sequence[Task]:
    """Return all tasks that a part may train on, whatever difficulty a curriculum chooses.

    Raises ConfigError where a difficulty has none, or where the tasks are the same at each.
    """
    levels = levels_of(config.curriculum, part.env.difficulty, seed=config.seed, label=part.label)
    found = [tasks_of(config, part, level).tasks for level in levels]
    if len(levels) > 1 and _contents(found[0]) == _contents(found[-1]):
        raise ConfigError(
            f"curriculum.kind = {config.curriculum.kind!r} chooses the difficulty of tasks, and the tasks of "
            f"{part.spec.id} are the same at {levels[0]:g} and {levels[-1]:g}: its tasks() does not use it. Set "
            "curriculum.kind = 'learnability' with by = 'task', or leave it out"
        )
    return joined(found)


def _contents(tasks: Sequence[Task]) -> list[str]:
    """Return the content of the first tasks, by which those of two difficulties are told apart."""
    found = [task_at(tasks, i) for i in range(min(_COMPARED, len(tasks)))]
    return [task.content_hash if isinstance(task, Task) else "" for task in found]


def source_of(
    config: TrainConfig,
    parts: Sequence[Part],
    *,
    left_out: Mapping[str, Mapping[str, str]],
    tell: Mapping[str, Callable[[str, str], None]],
) -> Source:
    """Return the training tasks of a run.

    Args:
        config: the settings.
        parts: its environments.
        left_out: tasks that are known to be bad, each with the reason, by the label of the environment.
        tell: is given name and reason of a task that cannot be made, by the same.
    """
    c, r = config.curriculum, config.rollout

    def env_tasks(part: Part) -> EnvTasks:
        def stream_of(level: float | None) -> TaskStream:
            found = tasks_of(config, part, part.env.difficulty if level is None else level)
            return TaskStream(
                found.tasks, seed=part.seed(config, level), max_bad=r.max_bad_tasks, left_out=left_out[part.label],
                tell=tell[part.label], chosen=found.chosen,
            )  # fmt: skip

        of_part = curriculum_of(c, difficulty=part.env.difficulty, seed=config.seed, label=part.label)
        return EnvTasks(stream_of, label=part.label, curriculum=of_part)

    envs = [env_tasks(part) for part in parts]
    return Source(envs, shares_of(config, parts), groups=r.groups, staleness=r.staleness, passes=c.passes)


def mean_numbers(parts: Sequence[Part], reports: Sequence[EvalReport]) -> dict[str, float]:
    """Return the means over the environments of a mixture, of one evaluation of each.

    Names that end in ``_macro`` are of the plain mean, in which every environment counts the same. The others are of
    the mean by the weights of the mixture. Intervals are those of independent estimates.
    """
    total = math.fsum(part.weight for part in parts)
    found: dict[str, float] = {"n": float(sum(r.n for r in reports))}
    for suffix, shares in (
        ("", [part.weight / total for part in parts]),
        ("_macro", [1.0 / len(parts)] * len(parts)),
    ):
        scaled = [s * len(parts) for s in shares]  # so that the plain mean of the products is the weighted one
        rates = [s * r.pass_at_1 for s, r in zip(scaled, reports, strict=True)]
        ends = [(s * r.ci95[0], s * r.ci95[1]) for s, r in zip(scaled, reports, strict=True)]
        mean, (low, high) = mean_of_intervals(rates, ends)
        found |= {f"pass_at_1{suffix}": mean, f"ci95{suffix}_low": low, f"ci95{suffix}_high": high}
        found[f"reward{suffix}"] = math.fsum(s * r.reward for s, r in zip(shares, reports, strict=True))
    return found


def means_text(found: Mapping[str, float]) -> str:
    """Write the means over the environments as one line."""
    by_weight, macro = (
        f"{found[f'pass_at_1{suffix}']:.3f} ({found[f'ci95{suffix}_low']:.3f}–{found[f'ci95{suffix}_high']:.3f})"
        for suffix in ("", "_macro")
    )
    return f"pass@1 {by_weight} by weight, {macro} with each environment counted the same"


def means_table(config: TrainConfig, reports: Mapping[str, EvalReport]) -> str:
    """Write the means over the environments of a mixture, a line an evaluation, each after a newline."""
    if len(config.mixture) < 2:
        return ""
    parts, lines = parts_of(config), []
    for what in dict.fromkeys(split_label(label)[0] for label in reports):
        found = [reports.get(part.evaluation(what)) for part in parts]
        if None not in found:
            lines.append(f"\nmean, {what}: {means_text(mean_numbers(parts, [r for r in found if r is not None]))}")
    return "".join(lines)
