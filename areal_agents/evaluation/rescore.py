"""The rescoring of saved episodes with a new reward.

    RUN/trajectories ─▶ episode_of ─▶ judge(new reward) ─▶ Rescored ─▶ reward_shift.py: compared with the old rewards
                                          │ raises: counted, with the first traceback; never a zero

It shows what the reward would have paid, and what training would have made of it. Nothing is sampled and no environment
runs, so a reward is tried on thousands of episodes in seconds. The run's own files are only read. Not covered: rewards
that look at anything else than an ``Episode`` (an environment's own step rewards are replaced as a whole).
"""

from __future__ import annotations

import asyncio
import difflib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast, get_args

from areal_agents import registry
from areal_agents.engine import ChatModel
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, ConfigError, RegistryError
from areal_agents.evaluation.saved_run import SavedRun, as_sampled
from areal_agents.reward import PAID, Episode, NotSaved, RewardLike, Verdict, judge
from areal_agents.tool import ToolResult
from areal_agents.toolenv import ToolEnv
from areal_agents.tracking.trajectories import Record, read_shard
from areal_agents.types import AssistantMessage, Cut, Message, Trajectory
from areal_agents.utils.foreign import import_foreign

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


def load_reward(name: str) -> RewardLike:
    """Load a reward, or the rubric of an environment, by its name.

    A reward is called ``pkg.module:name``, and an environment ``module:Class`` or by its id. A reward is whatever
    ``ToolEnv.rubric`` may be: a function of an Episode, a Reward, a WeightedSum or a Gate. Raises ConfigError where
    there is none.
    """
    found = _find(name)
    if isinstance(found, type) and issubclass(found, AgentEnv):
        rubric = getattr(found, "rubric", None)  # from the class: a function must not become a method
        if rubric is None:
            raise ConfigError(f"--reward {name}: {found.__name__} has no rubric: name a reward function instead")
        return cast(RewardLike, rubric)
    if isinstance(found, type):
        raise ConfigError(f"--reward {name}: a class, but no environment: name an instance or a function")
    if not callable(found):
        raise ConfigError(
            f"--reward {name}: a {type(found).__name__} is no reward: name a function of an Episode, a Reward, a "
            "WeightedSum, a Gate or an environment"
        )
    return cast(RewardLike, found)


def _find(name: str) -> Any:
    module_name, colon, path = name.partition(":")
    if not colon:
        try:
            return registry.spec(name).env_class()
        except RegistryError as error:
            raise ConfigError(f'--reward {name}: write "package.module:function" ({error})') from error
    try:
        module = import_foreign(module_name)
    except Exception as error:  # a boundary: the author's module may raise anything
        raise ConfigError(f"--reward {name}: importing {module_name!r} failed: {error!r}") from error
    try:
        return attrgetter(path)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(path, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"--reward {name}: module {module_name!r} has no {path!r}{hint}") from error


def answer_of(run: SavedRun) -> ReadAnswer:
    """Return the function that reads the answer from a final message as the run's environment does.

    An environment that overrides ``ToolEnv.answer`` is made once and asked. It needs no sandbox for that. Raises
    RegistryError where there is no such environment.
    """
    cls = run.spec.env_class()
    if not issubclass(cls, ToolEnv) or cls.answer is ToolEnv.answer:
        return plain_answer
    env = cast(ToolEnv, run.make_env())

    def answer(record: Record) -> str:
        env.begin(run.env_seed(record), {"task": record.trajectory.task})
        return env.answer(as_sampled(record.trajectory.turns[-1].message))

    return answer


def plain_answer(record: Record) -> str:
    """Return the text after the reasoning, as ``ToolEnv.answer`` does by default."""
    return record.trajectory.turns[-1].message.spoken


def episode_of(record: Record, answer: ReadAnswer = plain_answer) -> Episode:
    """Rebuild the Episode that the environment's rubric saw when the episode ended."""
    trajectory = record.trajectory
    shown = [*(turn.observation for turn in trajectory.turns), trajectory.final_observation]
    messages: list[Message | AssistantMessage] = []
    results: list[ToolResult] = []
    for k, turn in enumerate(trajectory.turns):
        messages += [*turn.observation, as_sampled(turn.message)]
        texts = {m.tool_call_id: m.text for m in shown[k + 1] if m.role == "tool"}
        for call, outcome in zip(turn.message.tool_calls, turn.tool_results, strict=False):
            results.append(ToolResult(texts.get(call.id, ""), cast(Any, outcome.status), outcome.truncated))
    messages += trajectory.final_observation
    reason, final = trajectory.stop_reason, None
    if (cut := _cut_answer(trajectory)) is not None:
        reason = "answer" if trajectory.terminated else cut  # an environment does not see which limit it was
    if reason == "answer" and not (trajectory.final_observation and trajectory.turns[-1].tool_results):
        final = answer(record)  # else a tool ended it
    return Episode(trajectory.task, tuple(messages), final, tuple(results), reason, state=NotSaved())


def _cut_answer(trajectory: Trajectory) -> Cut | None:
    """Return why the last message ended early, where the episode ended by it."""
    last = trajectory.turns[-1]
    by_limit = trajectory.truncated and trajectory.stop_reason in ("context", "tokens", *get_args(Cut))
    answered = bool(trajectory.final_observation or last.tool_results)  # then it was a turn as any other
    return last.message.cut([call.name for call in last.message.tool_calls]) if by_limit and not answered else None


def with_verdict(trajectory: Trajectory, verdict: Verdict) -> Trajectory:
    """Return ``trajectory`` as if ``verdict`` had been its rubric's.

    What tools paid for a turn stays.
    """
    last = len(trajectory.turns) - 1
    rewards = verdict.turn_rewards or (*(0.0 for _ in range(last)), verdict.score)
    paid = [{n: x for n, x in t.components.items() if n.partition(".")[0] == PAID} for t in trajectory.turns]
    turns = tuple(
        replace(
            turn,
            reward=paid[k].get(PAID, 0.0) + rewards[k],
            components=(dict(verdict.components) if k == last else {}) | paid[k],
        )
        for k, turn in enumerate(trajectory.turns)
    )
    return replace(trajectory, turns=turns)


async def rescore(
    paths: Sequence[Path],
    reward: RewardLike,
    *,
    answer: ReadAnswer = plain_answer,
    models: Mapping[str, ChatModel] | None = None,
    concurrency: int = 64,
    keep: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Judge every episode of the shards at ``paths``.

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
    scorer = _Scorer(reward, answer, keep, progress)
    scorer.models = models or {}
    jobs = enumerate(record for path in paths for record in read_shard(path))
    try:
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


class _Scorer:
    """The state that the workers of one rescoring share.

    Results are kept by the episode's place in the files.
    """

    def __init__(self, reward: RewardLike, answer: ReadAnswer, keep: bool, progress: Callable[[int], None]) -> None:
        self._reward, self._answer, self._keep, self._progress = reward, answer, keep, progress
        self.episodes: dict[int, Rescored] = {}
        self.failures: dict[int, RewardFailure] = {}
        self.records: dict[int, Record] = {}
        self.skipped = 0
        self.models: Mapping[str, ChatModel] = {}

    async def work(self, jobs: Iterator[tuple[int, Record]]) -> None:
        for place, record in jobs:
            if record.trajectory.turns:
                await self._score(place, record)
            else:
                self.skipped += 1
            self._progress(len(self.episodes) + self.skipped)
            await asyncio.sleep(0)  # a reward that never waits would keep an interrupt from being seen

    async def _score(self, place: int, record: Record) -> None:
        t = record.trajectory
        new: tuple[float, ...] | None = None
        status = "failed"
        try:
            verdict = await judge(self._reward, replace(episode_of(record, self._answer), models=self.models))
        except (Exception, asyncio.CancelledError) as error:  # the author's own code, which may cancel itself
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # ours, not the author's
            summary = "".join(traceback.format_exception_only(error)).strip()
            trace = "".join(traceback.format_exception(error))
            self.failures[place] = RewardFailure(t.id, summary, trace)
        else:
            scored = with_verdict(t, verdict)
            new, status = tuple(turn.reward for turn in scored.turns), verdict.status
            if self._keep:
                self.records[place] = replace(record, trajectory=scored)
        tokens = tuple(len(turn.completion.ids) for turn in t.turns)
        old = tuple(turn.reward for turn in t.turns)
        self.episodes[place] = Rescored(t.id, record.kind, record.step, t.group, t.task.id, tokens, old, new, status)


def refuse_inside(path: Path, run: SavedRun) -> None:
    """Raise ArealError where ``path`` would change the run's files."""
    if path.resolve().is_relative_to(run.out.resolve()):
        raise ArealError(f"{path} lies inside the run {run.out}, whose files stay as they are: name a file outside")
