"""The contract of a reward that judges the finished episodes of one task together.

    G finished episodes ─▶ judge_group ─▶ G checked verdicts ─▶ with_group_verdict ─▶ the group's rewards

A group reward is called once for each complete group, before training sees it. What it declares, as attributes:

    class Ranking:
        adds = False            # its verdicts replace the episodes' own rewards; True: they are added to them
        reads_others = True     # a verdict depends on the group's other episodes

        async def __call__(self, episodes: Sequence[Episode]) -> Sequence[Verdict]: ...

or, for a function: ``@group_reward(reads_others=True)``. An environment declares its own as ``group_rubric``, and an
experiment names one in ``rollout.group_reward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import numpy as np

from areal_agents.errors import ConfigError, RewardError
from areal_agents.reward import Episode, Score, Verdict, checked, name_of
from areal_agents.types import Trajectory
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import short


class GroupReward(Protocol):
    """A reward of a whole group. It returns one verdict an episode, in their order."""

    adds: ClassVar[bool]
    """Whether its rewards are added to the episodes' own. Otherwise they replace them."""
    reads_others: ClassVar[bool]
    """Whether the verdict on an episode depends on the group's other episodes.

    Such a reward is part of the baselines that it is compared with (``refuse_biased``)."""

    async def __call__(self, episodes: Sequence[Episode]) -> Sequence[Verdict]: ...


Scores: TypeAlias = "Sequence[Score]"
Function: TypeAlias = "Callable[[Sequence[Episode]], Scores | Awaitable[Scores]]"
GroupRewardLike: TypeAlias = "GroupReward | Function"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Declaration:
    """The facts that a group reward declares of itself, as attributes of these names."""

    adds: bool
    reads_others: bool
    leave_one_out: bool = False
    """Whether its verdicts are sums of pairwise votes of the *other* episodes, symmetric ones (see ``agreement``).

    A leave-one-out baseline then only scales the gradient of a turn that all n episodes of the group have, by
    (n − 2)/(n − 1). Where m others have it, their votes count (1 − 1/m), and those of shorter episodes in full.
    """
    seconds: float = 0.0
    """How long a call may take by its nature, beside ``env.step_timeout``."""


def group_reward(
    *, reads_others: bool, adds: bool = False, leave_one_out: bool = False, seconds: float = 0.0
) -> Callable[[F], F]:
    """Make a decorator that declares a function of a group's episodes to be a group reward.

        @group_reward(reads_others=True)
        def longest(episodes): ...

    Args:
        reads_others: a score depends on the group's other episodes.
        adds: the scores are added to the episodes' own rewards, and do not replace them.
        leave_one_out: see ``Declaration``.
        seconds: see ``Declaration``.
    """
    declared = Declaration(adds, reads_others, leave_one_out, seconds)

    def declare(function: F) -> F:
        for name in Declaration.__slots__:
            setattr(function, name, getattr(declared, name))
        return function

    return declare


def is_group_reward(found: object) -> bool:
    """Say whether ``found`` declares itself to be a group reward."""
    return callable(found) and not isinstance(found, type) and hasattr(found, "reads_others")


def declaration(reward: GroupRewardLike, where: str) -> Declaration:
    """Read what a group reward declares.

    ``where`` begins the message of the ConfigError for what is no group reward, or declares something that is no bool.
    """
    if isinstance(reward, type):
        raise ConfigError(f"{where} is the class {reward.__name__}: name an instance of it")
    if not callable(reward) or not all(hasattr(reward, name) for name in ("adds", "reads_others")):
        raise ConfigError(
            f"{where} is {short(reward)}, which does not declare `adds` and `reads_others`: a group reward has both, "
            "as attributes, or from the decorator @group_reward(reads_others=True)"
        )
    flags = {name: getattr(reward, name, False) for name in ("adds", "reads_others", "leave_one_out")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {name} is {short(value)}: it must be True or False")
    given: object = getattr(reward, "seconds", 0.0)
    try:
        seconds = finite(given)
    except ValueError:
        seconds = -1.0
    if seconds < 0:
        raise ConfigError(f"{where}: seconds is {short(given)}, which is no number of seconds")
    return Declaration(**flags, seconds=seconds)


async def judge_group(reward: GroupRewardLike, episodes: Sequence[Episode], *, name: str = "") -> tuple[Verdict, ...]:
    """Call a group reward, sync or async, and check that it returns one verdict or number an episode.

    Raises RewardError.
    """
    label = name or name_of(reward)
    values: Any = reward(tuple(episodes))
    if inspect.isawaitable(values):
        values = await values
    task = episodes[0].task.id if episodes else ""
    if not isinstance(values, list | tuple) and not (isinstance(values, np.ndarray) and values.ndim == 1):
        raise RewardError(
            f"group reward {label!r} returned {short(values)} on task {task!r}: return a list with one verdict or "
            "number an episode"
        )
    if len(values) != len(episodes):
        raise RewardError(
            f"group reward {label!r} returned {len(values)} verdicts for {len(episodes)} episodes on task {task!r}: "
            "return one an episode, in their order"
        )
    return tuple(checked(value, episode, label) for value, episode in zip(values, episodes, strict=True))


def rewards_of(trajectory: Trajectory, verdict: Verdict) -> tuple[float, ...]:
    """Return what a verdict gives to each turn: its turn rewards to the steps, or its score to the last one."""
    before = len(trajectory.steps) - 1
    return trajectory.over_turns(verdict.turn_rewards or (*(0.0 for _ in range(before)), verdict.score))


def with_group_verdict(trajectory: Trajectory, verdict: Verdict, *, adds: bool) -> Trajectory:
    """Return ``trajectory`` with its group's ``verdict``, and what it had earned by itself kept beside.

    The verdict's components are called ``group.NAME``. A trajectory that has a group's verdict already gets the new one
    in its place.
    """
    last, rewards = trajectory.last_step, rewards_of(trajectory, verdict)
    turns = []
    for k, turn in enumerate(trajectory.turns):
        own, components = turn.own
        named = {f"group.{key}": x for key, x in verdict.components.items()} if k == last else {}
        turns.append(
            replace(
                turn,
                reward=own + rewards[k] if adds else rewards[k],
                components={**components, **named},
                own_reward=own,
                own_components=dict(components),
            )
        )
    return replace(trajectory, turns=tuple(turns))
