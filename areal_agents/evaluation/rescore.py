"""The rescoring of saved episodes with a new reward.

    RUN/trajectories ─▶ episode_of ─▶ judge(new reward) ─▶ Rescored ─▶ reward_shift.py: compared with the old rewards
                                          │ raises: counted, with the first traceback; never a zero

It shows what the reward would have paid, and what training would have made of it. Nothing is sampled and no environment
runs, so a reward is tried on thousands of episodes in seconds. The run's own files are only read. Not covered: rewards
that look at anything else than an ``Episode`` (an environment's own step rewards are replaced as a whole).
"""

from __future__ import annotations

import asyncio
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from areal_agents import registry
from areal_agents.engine import ChatModel
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, ConfigError, RegistryError
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.group_reward import (
    GroupRewardLike,
    declaration,
    is_group_reward,
    judge_group,
    rewards_of,
    with_group_verdict,
)
from areal_agents.reward import PAID, Episode, RewardLike, Verdict, judge
from areal_agents.rollout.env_results import VERDICT_METRICS, status_metrics
from areal_agents.rollout.group_judge import group_rubric_of
from areal_agents.rollout.rebuilt import answer_reader, rebuilt, spoken_answer
from areal_agents.tracking.trajectories import Record, read_shard
from areal_agents.types import StopReason, Trajectory
from areal_agents.utils.exits import guarded_tasks
from areal_agents.utils.foreign import find_foreign

ReadAnswer = Callable[[Record], str]
"""Returns what the rubric gets to see of a record's final message."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """The old and the new rewards of one episode, one number a turn.

    It holds what a comparison needs and no more. Fields that end with ``_K`` have one entry a turn, [K].
    """

    id: str
    kind: str
    step: int
    group: str
    task: str
    tokens_K: tuple[int, ...]
    """Sampled tokens a turn."""
    old_K: tuple[float, ...]
    new_K: tuple[float, ...] | None
    """None where the new reward failed."""
    status: str = "ok"
    """The verdict's, or ``failed`` where the new reward failed."""
    state_keys_K: tuple[str | None, ...] = ()
    """Of the states that the turns were shown. Empty: none has one."""
    terminated: bool = True
    """Whether the task ended. Else a limit cut the episode."""
    stop_reason: StopReason = "answer"

    @property
    def old(self) -> float:
        return float(sum(self.old_K))

    @property
    def new(self) -> float:
        """The episode's new reward. Raises ValueError where the new reward failed."""
        if self.new_K is None:
            raise ValueError(f"episode {self.id} has no new reward: the reward function failed on it")
        return float(sum(self.new_K))


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """One episode that the reward function failed on."""

    episode: str
    error: str
    """Type and message, one line."""
    trace: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of one rescoring, in the order of the files."""

    episodes: tuple[Rescored, ...]
    failures: tuple[RewardFailure, ...]
    skipped: int
    """Episodes without a turn, in which there is nothing to reward."""
    records: tuple[Record, ...]
    """With the new rewards. Empty unless they were asked for."""


@dataclass(frozen=True, slots=True)
class RunReward:
    """The whole reward of an episode: its own, its group's, or one after the other."""

    own: RewardLike | None
    """None keeps what the episode by itself had earned."""
    group: GroupRewardLike | None = None


AnyReward: TypeAlias = "RewardLike | GroupRewardLike | RunReward"


def load_reward(name: str) -> AnyReward:
    """Load a reward, or the rubrics of an environment, by its name.

    A reward is called ``pkg.module:name``, and an environment ``module:Class`` or by its id. A reward is whatever
    ``ToolEnv.rubric`` or ``AgentEnv.group_rubric`` may be: a function of an Episode, a Reward, a WeightedSum, a Gate, a
    GroupReward. Raises ConfigError where there is none.
    """
    found = _find(name)
    if isinstance(found, type) and issubclass(found, AgentEnv):
        rubric = getattr(found, "rubric", None)  # from the class: a function must not become a method
        group = group_rubric_of(found)
        if group is not None:
            declaration(group, f"--reward {name}: {found.__name__}.group_rubric")
            return RunReward(rubric, group)
        if rubric is None:
            raise ConfigError(f"--reward {name}: {found.__name__} has no rubric: name a reward function instead")
        return cast("RewardLike", rubric)
    if isinstance(found, type):
        raise ConfigError(f"--reward {name}: a class, but no environment: name an instance or a function")
    if not callable(found):
        raise ConfigError(
            f"--reward {name}: a {type(found).__name__} is no reward: name a function of an Episode, a Reward, a "
            "WeightedSum, a Gate, a GroupReward or an environment"
        )
    if is_group_reward(found):
        declaration(found, f"--reward {name}")
    return cast("AnyReward", found)


def group_reward_among(reward: AnyReward) -> GroupRewardLike | None:
    """Return the group reward of what ``load_reward`` returned, or None."""
    return _whole(reward).group


def _whole(reward: AnyReward) -> RunReward:
    if isinstance(reward, RunReward):
        return reward
    if is_group_reward(reward):
        return RunReward(None, cast("GroupRewardLike", reward))
    return RunReward(cast("RewardLike", reward))


def _find(name: str) -> Any:
    if ":" in name:
        return find_foreign(name, f"--reward {name}")
    try:
        return registry.spec(name).env_class()
    except RegistryError as error:
        raise ConfigError(f'--reward {name}: write "package.module:function" ({error})') from error


def answer_of(run: SavedRun) -> ReadAnswer:
    """Return the function that reads the answer from a final message as the run's environment does.

    An environment that overrides ``ToolEnv.answer`` is made once and asked. It needs no sandbox for that. Raises
    RegistryError where there is no such environment.
    """
    if run.mixture:
        readers = {e.label: answer_of(run.of_env(e)) for e in run.mixture}
        return lambda record: readers[run.env_of(record.kind, record.trajectory.group)](record)
    read = answer_reader(run.spec.env_class(), run.make_env)
    if read is spoken_answer:
        return plain_answer
    return lambda record: read(record.trajectory, run.env_seed(record))


def plain_answer(record: Record) -> str:
    """Return the text after the reasoning, as ``ToolEnv.answer`` does by default."""
    return spoken_answer(record.trajectory, 0)


def episode_of(record: Record, answer: ReadAnswer = plain_answer) -> Episode:
    """Rebuild the Episode that the environment's rubric saw when the episode ended."""
    return rebuilt(record.trajectory, lambda _: answer(record))


def with_verdict(trajectory: Trajectory, verdict: Verdict) -> Trajectory:
    """Return ``trajectory`` as if ``verdict`` had been its rubric's.

    What tools paid for a turn stays. Metrics say of the new verdict's status alone.
    """
    last, rewards = trajectory.last_step, rewards_of(trajectory, verdict)
    paid = [{n: x for n, x in t.components.items() if n.partition(".")[0] == PAID} for t in trajectory.turns]
    turns = tuple(
        replace(
            turn,
            reward=paid[k].get(PAID, 0.0) + rewards[k],
            components=(dict(verdict.components) if k == last else {}) | paid[k],
            own_reward=None,
            own_components=None,
        )
        for k, turn in enumerate(trajectory.turns)
    )
    kept = {name: x for name, x in trajectory.metrics.items() if name not in VERDICT_METRICS.values()}
    return replace(trajectory, turns=turns, metrics=kept | status_metrics(verdict))


async def rescore(
    paths: Sequence[Path],
    reward: AnyReward,
    *,
    answer: ReadAnswer = plain_answer,
    models: Mapping[str, ChatModel] | None = None,
    concurrency: int = 64,
    keep: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Judge every episode of the shards at ``paths``, or every group.

    What the reward raises is a RewardFailure of the outcome.

    Args:
        paths: shards of trajectories.
        reward: the new reward.
        answer: reads the answer from a final message.
        models: what the environment was made with, for rewards that name judges.
        concurrency: how many calls of an async reward run at once.
        keep: return the records with their new rewards too, all of them in memory.
        progress: is called with the number of episodes that are done.

    Raises:
        ArealError: a shard is broken.
    """
    whole = _whole(reward)
    scorer = _Scorer(whole, answer, keep, progress)
    scorer.models = models or {}
    jobs = _jobs(paths, whole_groups=whole.group is not None)
    try:
        with guarded_tasks():
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(scorer.work(jobs))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__  # the first one; the rest were cancelled
    order = sorted(scorer.episodes)
    return Outcome(
        tuple(scorer.episodes[i] for i in order),
        tuple(failure for _, failure in sorted(scorer.failures.items())),
        scorer.skipped,
        tuple(scorer.records[i] for i in order if i in scorer.records),
    )


Job = Sequence[tuple[int, Record]]
"""Episodes that are judged together, each with its place in the files."""


def _jobs(paths: Sequence[Path], *, whole_groups: bool) -> Iterator[Job]:
    """Yield the episodes one by one, or group by group. A group is in one shard, and comes in the order of its ids."""
    place = 0
    for path in paths:
        groups: dict[str, list[tuple[int, Record]]] = {}
        for record in read_shard(path):
            if whole_groups:
                groups.setdefault(record.trajectory.group, []).append((place, record))
            else:
                yield [(place, record)]
            place += 1
        for group in groups.values():
            yield sorted(group, key=lambda job: _number_of(job[1].trajectory))


def _number_of(trajectory: Trajectory) -> int:
    """Return which episode of its group it is. What does not say so keeps its place."""
    found = re.search(r"/(\d+)(?:~\d+)?\Z", trajectory.id)
    return int(found[1]) if found else 0


class _Scorer:
    """The state that the workers of one rescoring share.

    Results are kept by the episode's place in the files.
    """

    def __init__(self, reward: RunReward, answer: ReadAnswer, keep: bool, progress: Callable[[int], None]) -> None:
        self._reward, self._answer, self._keep, self._progress = reward, answer, keep, progress
        self.episodes: dict[int, Rescored] = {}
        self.failures: dict[int, RewardFailure] = {}
        self.records: dict[int, Record] = {}
        self.skipped = 0
        self.models: Mapping[str, ChatModel] = {}

    async def work(self, jobs: Iterator[Job]) -> None:
        for job in jobs:
            played = [(place, record) for place, record in job if record.trajectory.turns]
            self.skipped += len(job) - len(played)
            if played:
                await self._score(played)
            self._progress(len(self.episodes) + self.skipped)
            await asyncio.sleep(0)  # a reward that never waits would keep an interrupt from being seen

    async def _score(self, job: Job) -> None:
        try:
            # A task of its own, which the author's code may cancel.
            scored = await asyncio.create_task(self._scored([record for _, record in job]))
        except (Exception, asyncio.CancelledError) as error:  # the author's own code, which may cancel itself
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # ours, not the author's
            summary = "".join(traceback.format_exception_only(error)).strip()
            trace = "".join(traceback.format_exception(error))
            for place, record in job:
                self.failures[place] = RewardFailure(record.trajectory.id, summary, trace)
                self._note(place, record, None, "failed")
            return
        for (place, record), (trajectory, status) in zip(job, scored, strict=True):
            self._note(place, record, tuple(turn.reward for turn in trajectory.turns), status)
            if self._keep:
                self.records[place] = replace(record, trajectory=trajectory)

    async def _scored(self, records: Sequence[Record]) -> list[tuple[Trajectory, str]]:
        """Return the trajectories with their new rewards, and the statuses of the verdicts."""
        trajectories = [r.trajectory for r in records]
        episodes = [replace(episode_of(r, self._answer), models=self.models) for r in records]
        statuses: list[str] = ["ok"] * len(records)
        if self._reward.own is not None:
            verdicts = [await judge(self._reward.own, episode) for episode in episodes]
            trajectories = [with_verdict(t, v) for t, v in zip(trajectories, verdicts, strict=True)]
            statuses = [v.status for v in verdicts]
        if (group := self._reward.group) is not None:
            adds = declaration(group, "the group reward").adds
            found = await judge_group(group, episodes)
            trajectories = [with_group_verdict(t, v, adds=adds) for t, v in zip(trajectories, found, strict=True)]
            pairs = zip(trajectories, found, strict=True)
            trajectories = [replace(t, metrics={**t.metrics, **status_metrics(v)}) for t, v in pairs]
            statuses = [s if v.status == "ok" else v.status for v, s in zip(found, statuses, strict=True)]
        return list(zip(trajectories, statuses, strict=True))

    def _note(self, place: int, record: Record, new: tuple[float, ...] | None, status: str) -> None:
        t = record.trajectory
        tokens = tuple(len(turn.completion.ids) for turn in t.turns)
        old = tuple(turn.reward for turn in t.turns)
        self.episodes[place] = Rescored(
            t.id, record.kind, record.step, t.group, t.task.id, tokens, old, new, status,
            tuple(turn.state_key for turn in t.turns), t.terminated, t.stop_reason,
        )  # fmt: skip


def refuse_inside(path: Path, run: SavedRun) -> None:
    """Raise ArealError where ``path`` would change the run's files."""
    if path.resolve().is_relative_to(run.out.resolve()):
        raise ArealError(f"{path} lies inside the run {run.out}, whose files stay as they are: name a file outside")
