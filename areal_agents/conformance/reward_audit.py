"""The reward audit of ``conformance.check``.

Policies without skill may earn at most chance. The gold answer and the expert must earn 1. Where there is neither gold
answer nor expert, nothing shows that full reward can be earned, and the status is ``unaudited``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from areal_agents.conformance.contract import Subject, Unaudited
from areal_agents.conformance.scripted_episode import MAX_TURNS, ScriptedEpisode, in_turns, repeat, script_for
from areal_agents.conformance.unskilled import Unskilled, unskilled
from areal_agents.errors import CheckError, EnvError
from areal_agents.process_env import TextProcessEnv
from areal_agents.registry import EnvSpec
from areal_agents.rollout.group_judge import group_reward_of
from areal_agents.rollout.script import Script
from areal_agents.tool import ToolSpec
from areal_agents.types import Task
from areal_agents.utils.blocking import BlockingWatch
from areal_agents.utils.short_text import short
from areal_agents.utils.tolerance import reaches

SLACK = 0.05
"""What a policy without skill may earn above the declared chance."""
TASKS = 64
TASKS_WITH_CHANCE = 256
"""More, where chance is not 0: the mean of few tasks is noise."""
COSTLY_TASKS, COSTLY_TASKS_WITH_CHANCE = 32, 64
"""Where each episode starts processes: a sandbox's, or its own."""
GOLD_TASKS = 16
EXPERT_TASKS = 4
EXPERT_TURNS = 1000
"""Turns of an expert's episode: a long game ends by its own rules."""
NAMED = 3
"""Tasks that are named where gold answers or experts earn too little. All are counted."""
BLOCKED_SECONDS = 0.1
"""A reward that holds the event loop for longer is named."""


async def reward(subject: Subject) -> str:
    """Check that the full reward can be had with skill, and not without it.

    Raises:
        CheckError: a policy without skill earns too much, or a gold answer or expert too little.
        ConfigError: the environment's group reward does not declare what it is.
        Unaudited: there is no gold answer and no expert.
    """
    spec = subject.spec
    group_reward_of(spec)  # it is looked at, and not audited: what it pays depends on a whole group
    split = spec.splits[-1]
    pool = spec.tasks(split)
    tools = await _tools_of(subject, pool[0])
    costly = any(tool.needs_sandbox for tool in tools) or issubclass(spec.env_class(), TextProcessEnv)
    few, more = (COSTLY_TASKS, COSTLY_TASKS_WITH_CHANCE) if costly else (TASKS, TASKS_WITH_CHANCE)
    tasks = [pool[i] for i in range(min(len(pool), few if spec.audit.chance == 0 else more))]
    gold = [spec.gold(t) for t in tasks]
    with BlockingWatch() as watch:
        try:
            policies = unskilled(gold, tools, costly=costly, elsewhere=_elsewhere(spec))
            return await _audited(subject, tasks, gold, policies) + _uncalled(subject) + _blocked(watch)
        except Unaudited as reason:
            raise Unaudited(f"{reason}{_uncalled(subject)}{_blocked(watch)}") from reason


def _elsewhere(spec: EnvSpec) -> list[str]:
    """Return gold answers of the first split, where the audit plays another one."""
    if len(spec.splits) == 1:
        return []
    pool = spec.tasks(spec.splits[0])
    if spec.gold(pool[0]) is None:  # drawing games that have none takes long
        return []
    golds = (spec.gold(pool[i]) for i in range(min(len(pool), TASKS)))
    return [gold for gold in golds if gold is not None]


async def _audited(
    subject: Subject, tasks: Sequence[Task], gold: Sequence[str | None], policies: Mapping[str, Unskilled]
) -> str:
    spec, chance = subject.spec, subject.spec.audit.chance
    split = spec.splits[-1]
    seen: list[str] = []
    for name, policy in policies.items():
        try:
            mean = await _mean(subject, tasks, policy)
        except EnvError as error:
            raise CheckError(f"against the policy {name!r}, {error}") from error
        slack = max(SLACK, 1 / len(tasks)) if policy.one_may_fit else SLACK
        if mean > chance + slack and not reaches(chance + slack, mean):
            raise CheckError(
                f"the policy {name!r} earns {mean:.3f} on {len(tasks)} tasks of {split!r}; declared chance is "
                f"{chance:g} (+ {slack:.2g}): tighten the reward, or declare `chance`"
            )
        seen.append(f"{name} {mean:.2f}")
    scored = await _skilled(subject, tasks, gold)
    summary = f"{', '.join(seen)} (chance {chance:g})"
    if not scored:
        raise Unaudited(f"no gold() and no expert(): that full reward can be earned was not seen; {summary}")
    return f"{' and '.join(scored)} earn 1; {summary}"


def _uncalled(subject: Subject) -> str:
    """Say which tools no script called, so that nobody has seen them work."""
    names = [name for name, called in subject.tools.items() if not called]
    if not names:
        return ""
    some = f"the tool {names[0]}" if len(names) == 1 else f"the tools {', '.join(names)}"
    return f"; no script ever called {some}: let expert() use {'it' if len(names) == 1 else 'them'}"


def _blocked(watch: BlockingWatch) -> str:
    """Say which rewards held the event loop for long, and what to do."""
    return "".join(
        f"; the reward {short(name)} blocked the event loop for {1000 * seconds:.0f} ms, and with it every other "
        "episode: decorate it with @reward_function(timeout=…)"
        for name, seconds in sorted(watch.longest().items())
        if seconds > BLOCKED_SECONDS
    )


async def _tools_of(subject: Subject, task: Task) -> tuple[ToolSpec, ...]:
    episode = ScriptedEpisode(subject.spec.make, task, 0, repeat(""), subject.timeout)
    try:
        await episode.open()
        return episode.tools
    finally:
        await episode.close()


async def _mean(subject: Subject, tasks: Sequence[Task], policy: Unskilled) -> float:
    """Return what a policy earns on the average, over an episode a task, or as many as it asks for."""
    count = policy.episodes or len(tasks)
    numbers = [(n, n % len(tasks)) for n in range(count)]
    plays = [partial(_play, subject, tasks[i], n, policy.script(i, n), policy.turns, policy.random) for n, i in numbers]
    return math.fsum(await in_turns(plays, subject.at_once)) / count


async def _play(
    subject: Subject, task: Task, seed: int, script: Script, max_turns: int = MAX_TURNS, random: bool = False
) -> float:
    """Play an episode and return what it earns. What is called at random shows nobody that a tool works."""
    episode = ScriptedEpisode(subject.spec.make, task, seed, script, subject.timeout, max_turns)
    await episode.play()
    if not random:
        subject.note_calls(episode)
    return episode.total


async def _skilled(subject: Subject, tasks: Sequence[Task], gold: Sequence[str | None]) -> list[str]:
    """Return who was seen to earn the full reward.

    Raises CheckError for a gold answer or expert that does not.
    """
    spec = subject.spec
    scored: list[str] = []
    golden = [(t, g) for t, g in zip(tasks, gold, strict=True) if g is not None][:GOLD_TASKS]
    if golden:
        plays = [partial(_play, subject, task, i, repeat(answer)) for i, (task, answer) in enumerate(golden)]
        earned = list(zip((task for task, _ in golden), await in_turns(plays, subject.at_once), strict=True))
        scored.append(_all_full(earned, "gold answers", "gold()"))
    experts = [(i, task) for i, task in enumerate(tasks[:EXPERT_TASKS]) if spec.expert(task) is not None]
    if experts:
        plays = [partial(_play, subject, t, i, script_for(spec, t, "main"), EXPERT_TURNS) for i, t in experts]
        earned = list(zip((task for _, task in experts), await in_turns(plays, subject.at_once), strict=True))
        scored.append(_all_full(earned, "expert episodes", "expert()"))
    return scored


def _all_full(earned: Sequence[tuple[Task, float]], what: str, who: str) -> str:
    """Return what was seen.

    More than 1 is full reward too, because bonuses and the rewards of turns come to it. Raises CheckError where some
    earn less.
    """
    bad = [(task, total) for task, total in earned if not reaches(total)]
    if bad:
        shown = ", ".join(f"{total:g} on task {task.id}" for task, total in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise CheckError(
            f"{len(bad)} of {len(earned)} {what} earn less than 1 ({shown}{more}): the reward or {who} is wrong"
        )
    most = max(total for _, total in earned)
    return f"{len(earned)} {what}" + ("" if reaches(1.0, most) else f" (up to {most:g})")
