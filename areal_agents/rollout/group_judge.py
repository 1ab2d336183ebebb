"""The judge of finished groups: it asks a group's reward, and gives its verdicts to the trajectories.

    trajectories ─▶ rebuilt Episodes ─▶ judge_group ─▶ the same trajectories, with the group's rewards

The reward is somebody else's code. It runs on a host of its own (``env_host.py``), under a deadline, in the process
that learns or evaluates, wherever the episodes were played. ``EpisodeRunner.finish_group`` counts and retries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from areal_agents.engine import ChatModel
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, ConfigError, FailureBudgetError, InfraError, RewardError
from areal_agents.group_reward import Declaration, GroupRewardLike, declaration, judge_group, with_group_verdict
from areal_agents.registry import EnvSpec
from areal_agents.reward import Verdict, name_of
from areal_agents.rollout.env_faults import located, raised, says_whose
from areal_agents.rollout.env_host import EnvHost, HostLost
from areal_agents.rollout.env_results import status_metrics
from areal_agents.rollout.player import EventSink, env_maker, no_events
from areal_agents.rollout.rebuilt import SeededAnswer, answer_reader, rebuilt
from areal_agents.served_model import models_of
from areal_agents.settings.config import TrainConfig
from areal_agents.types import Task, Trajectory
from areal_agents.utils.exits import no_exit
from areal_agents.utils.foreign import find_foreign
from areal_agents.utils.short_text import cut, text_of

_MAX_HOSTS_LOST = 20


@dataclass(frozen=True, slots=True)
class NamedGroupReward:
    """A group reward, what it declares, and what messages call it."""

    reward: GroupRewardLike
    declared: Declaration
    name: str


def group_reward_of(spec: EnvSpec, setting: str = "") -> NamedGroupReward | None:
    """Return the group reward of an environment, or None where it has none.

    Args:
        spec: the environment, whose class may have a ``group_rubric``.
        setting: ``rollout.group_reward``, which takes its place. Empty: the environment's own.

    Raises:
        ConfigError: there is no such reward, or it does not declare what it is.
    """
    if setting:
        where = f"rollout.group_reward = {setting!r}"
        if ":" not in setting:
            raise ConfigError(f'{where}: write "package.module:name"')
        found = find_foreign(setting, where)
    else:
        cls = spec.env_class()
        where = f"{spec.id}: {cls.__name__}.group_rubric"
        found = group_rubric_of(cls)
        if found is None:
            return None
    return NamedGroupReward(found, declaration(found, where), name_of(found))


def group_rubric_of(cls: type[AgentEnv]) -> GroupRewardLike | None:
    """Return the group reward that an environment's class has, or None."""
    return cls.group_rubric  # of the class: of an instance, a function would be a method


def require_attempts(found: NamedGroupReward | None, k: int) -> None:
    """Raise ConfigError where an evaluation has one attempt a task, and its group reward compares attempts."""
    if found is not None and found.declared.reads_others and k < 2:
        raise ConfigError(
            f"eval.k = {k}: the environment's group reward {found.name!r} compares a task's attempts with each other: "
            "set eval.k to 2 or more, and eval.temperature above 0"
        )


def require_votes(found: NamedGroupReward | None, group_size: int) -> None:
    """Raise ConfigError where leave-one-out votes could never differ within a group."""
    if found is not None and found.declared.leave_one_out and group_size < 3:
        raise ConfigError(
            f"rollout.group_size = {group_size}: in a group of two, the leave-one-out votes of {found.name!r} are the "
            "same for both episodes, so that they have no gradient: set rollout.group_size to 3 or more"
        )


def open_judge(
    named: NamedGroupReward | None, spec: EnvSpec, config: TrainConfig, event: EventSink
) -> GroupJudge | None:
    """Return the judge of a run's groups, or None where there is no group reward.

    Args:
        named: the group reward.
        spec: the environment, which says what an episode's answer is.
        config: the settings of the environment are taken from it.
        event: as for ``GroupJudge``.
    """
    if named is None:
        return None
    make_env = env_maker(spec, sandbox=config.env.sandbox, kwargs=config.env.kwargs)
    return GroupJudge(
        named, answer_reader(spec.env_class(), make_env), timeout=config.env.step_timeout, event=event,
        models=models_of({**spec.kwargs, **config.env.kwargs}),
    )  # fmt: skip


class GroupJudge:
    """The judge that asks one group reward."""

    def __init__(
        self, named: NamedGroupReward, answer: SeededAnswer, *, timeout: float, event: EventSink = no_events,
        models: Mapping[str, ChatModel] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Start the host.

        Args:
            named: the reward.
            answer: reads the answer from a final message, as the environment does.
            timeout: seconds for one call, beside those that the reward declares.
            event: is told host_replaced, env_task_failed and close_failed.
            models: those that the environments are made with, for rewards that name judges.
        """
        self.named = named
        self._answer, self._event, self._models = answer, event, models
        self._timeout = timeout + named.declared.seconds
        self._host = self._new_host()
        self._hosts_lost = 0

    async def judge(
        self, task: Task, trajectories: Sequence[Trajectory], seeds: Sequence[int]
    ) -> tuple[Trajectory, ...]:
        """Return the trajectories of a whole group with its verdicts.

        Cancelling it cancels the call.

        Args:
            task: the group's.
            trajectories: its finished episodes.
            seeds: what their environments were reset with.

        Raises:
            InfraError: another attempt may succeed. EnvError: the reward raised, or did not return in time.
            RewardError: it returned something else than one verdict an episode.
            TaskError: it cannot judge this task.
            FailureBudgetError: it blocked its thread too often.
        """
        where = f"group reward {self.named.name} (task {cut(task.id, 120)})"

        async def guarded() -> tuple[Verdict, ...] | RewardError:
            with no_exit():
                pairs = zip(trajectories, seeds, strict=True)
                episodes = [
                    replace(rebuilt(t, lambda t, seed=seed: self._answer(t, seed)), models=self._models)  # type: ignore[misc]
                    for t, seed in pairs
                ]
                try:
                    return await judge_group(self.named.reward, episodes, name=self.named.name)
                except RewardError as error:  # returned, so that the host does not take it for one it met
                    return error

        while True:
            try:
                got = await self._healthy_host().call(guarded, timeout=self._timeout, what=where)
                break
            except HostLost:  # the reward blocked the thread on another group: this one starts again
                continue
            except Exception as error:  # third-party code: recorded, attached, counted
                if isinstance(error, ArealError) and says_whose(error):
                    raise located(error, "afinish", where)  # noqa: B904  the same error
                raise raised(error, where) from error
        if isinstance(got, RewardError):
            raise got
        return tuple(self._with_verdict(t, verdict) for t, verdict in zip(trajectories, got, strict=True))

    def _with_verdict(self, trajectory: Trajectory, verdict: Verdict) -> Trajectory:
        scored = with_group_verdict(trajectory, verdict, adds=self.named.declared.adds)
        return replace(scored, metrics={**scored.metrics, **status_metrics(verdict)})

    def _new_host(self) -> EnvHost:
        return EnvHost(None if self._event is no_events else self._event)

    def _healthy_host(self) -> EnvHost:
        if self._host.wedged:
            self._hosts_lost += 1
            if self._hosts_lost > _MAX_HOSTS_LOST:
                raise FailureBudgetError(
                    f"the group reward {self.named.name} blocked its event loop {self._hosts_lost} times: use `await` "
                    "or asyncio.to_thread for slow work"
                )
            self._event("host_replaced", lost=self._hosts_lost)
            self._host = self._new_host()
        return self._host

    async def close(self) -> None:
        """End what still runs, and the host."""
        try:
            await self._host.close()
        except InfraError as error:  # noted, not raised: it must not hide why the run ends
            self._event("close_failed", error=type(error).__name__, detail=text_of(error))
