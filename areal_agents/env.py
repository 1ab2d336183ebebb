"""The environment contract: a Gymnasium environment whose step is one turn of a conversation.

    areset ─▶ (new messages, info)
    astep(assistant message) ─▶ (new messages, reward, terminated, truncated, info)

``terminated`` says that the task ended. ``truncated`` says that turns, tokens or context ran out, or that the last
message was cut, which is no answer (``scores_cut_messages``). The trainer awaits areset, astep, afinish and aclose.
``reset``, ``step`` and ``close`` are Gymnasium's synchronous facade over them.

Keys of ``info``:

    stop_reason     why the episode ended
    verdict_status  of the reward; ``unverifiable`` and ``timeout`` are counted
    sandbox_replays sandboxes lost so far, whose calls were run again
    components      of the reward
    tool_results    how the turn's calls ended
    state_key       of the state that is shown now, from areset too; equal keys mark equal states
    outcome         of the episode's end: what was found there, JSON; the rubric has seen it, and it is saved
    turn_rewards    with the end of the episode only: one number a turn, in place of the rewards given before

An environment is deterministic, its info included, so no clock readings belong there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, SupportsFloat, overload

import gymnasium

from areal_agents.context import Context
from areal_agents.errors import ArealError, EnvError
from areal_agents.group_reward import GroupRewardLike
from areal_agents.reward import TaskCheck, task_checks
from areal_agents.spaces import ChatSpace, TextSpace
from areal_agents.tool import ToolSpec, class_tools
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task
from areal_agents.utils.short_text import described, short
from areal_agents.utils.sync import run_sync

Expert = Generator[str, Observation, None]


class AgentEnv(gymnasium.Env[Observation, "AssistantMessage | str"]):
    """The base class of every environment.

    Subclass it (or ``ToolEnv``, as most environments do) and implement areset, astep and ``tasks``. One instance runs
    one episode at a time and lives on one event loop.
    """

    tools: Sequence[ToolSpec] = ()
    """Rendered into the first prompt by the runner. Methods under ``@tool`` come to those that a class lists here."""
    state: Any = None
    """What the current episode's tools act on. It is the episode's own: set it in areset."""
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    chance: ClassVar[float | Mapping[float | None, float]] = 0.0
    """The mean reward that a policy without any skill may reach. The reward audit allows 0.05 more.

    Where levels differ it is a mapping, from difficulties and from None, the default one. Between two of them it goes
    in a straight line."""
    reveals_gold: ClassVar[bool] = False
    """Whether the task is to copy the answer, so that it stands at a fixed place of what is shown first."""
    scores_cut_messages: ClassVar[bool] = False
    """Whether a final message that ended early (``finish`` is not ``stop``) is an answer.

    By default it is none: the episode is truncated, and nothing is paid for the message. With True the environment's
    reward stands, and the episode counts as truncated all the same.
    """
    context: Context | None = None
    """What happens to a history that comes near the model's context (``context.py``). None: the episode ends there.

    The runner does it. Who drives the environment by Gymnasium's facade keeps the history, and sees to it."""
    group_rubric: ClassVar[GroupRewardLike | None] = None
    """Judges the finished episodes of one task together (``group_reward.py``), or None."""
    step_seconds: float = 0.0
    """Seconds that a step may take by its nature, besides its tool calls (a compilation, a slow judge).

    The runner ends a step after ``env.step_timeout``, these seconds, and what the message's tool calls may take."""
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    _listed_tools: ClassVar[object] = ()
    task: Task
    """The current episode's task, from ``begin`` on."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found, cls._listed_tools = class_tools(cls, AgentEnv)
        if found is not cls._listed_tools:
            cls.tools = found

    def __init__(self) -> None:
        self.observation_space = ChatSpace()
        self.action_space = TextSpace()

    # What an author implements

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode on ``options["task"]``, else on a training task drawn by ``seed``.

        An implementation calls ``begin`` first.

        Returns:
            The first messages and the info.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement areset")

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        """Take one turn.

        Returns:
            Observation, reward, terminated, truncated and info. The observation holds only new messages. It is empty
            when the episode ended.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement astep")

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        """Score what exists when the runner ends the episode.

        Returns:
            The reward for the last turn, by default 0, and the info.
        """
        return 0.0, {"stop_reason": reason}

    async def aclose(self) -> None:
        """Free what the episode holds.

        It is called at the episode's end and on cancellation, and may be called twice.
        """

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        """Return the tasks of a split.

        ``difficulty`` is in [0, 1]. None is the environment's default. Arguments of the constructor that are named here
        too, by keyword, are given to both: a path to read the tasks from, for example.
        """
        raise NotImplementedError(f"{cls.__name__} must implement tasks")

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        """Return a scripted demonstration, or None where there is none.

        It yields assistant texts and is sent the next observation after each.
        """
        return None

    @classmethod
    def gold(cls, task: Task) -> str | None:
        """Return an assistant text that deserves the full reward at once, or None where there is none.

        Where there is neither this nor an expert, the reward audit says so.
        """
        return None

    def tools_of(self, task: Task) -> Sequence[ToolSpec]:
        """Return the tools that the first prompt of ``task`` shows. By default they are ``tools``."""
        return self.tools

    def training_tasks(self) -> Sequence[Task]:
        """Return the tasks that ``begin`` draws from where none is given."""
        return self.tasks("train")

    @classmethod
    def task_checks(cls) -> Sequence[TaskCheck]:
        """Return functions that raise TaskError for a task that cannot be scored, whatever is answered.

        A run looks at its tasks with them before the first episode. These are those of the group's reward, and
        ``ToolEnv`` has those of its rubric besides.
        """
        return () if cls.group_rubric is None else task_checks(cls.group_rubric)

    # What an author calls

    def begin(self, seed: int | None, options: Mapping[str, Any] | None) -> Task:
        """Seed this environment's own generator (``np_random``) and choose the task, which is then ``self.task``."""
        super().reset(seed=seed)
        chosen = (options or {}).get("task")
        if chosen is None:
            pool = self.training_tasks()
            if not pool:
                raise EnvError(f"{type(self).__name__}.tasks('train') is empty: there is nothing to draw a task from")
            chosen = pool[int(self.np_random.integers(len(pool)))]
        if not isinstance(chosen, Task):
            raise EnvError(f"options['task'] must be a Task, got {type(chosen).__name__}")
        self.task = chosen
        return chosen

    # Gymnasium's synchronous facade

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        return run_sync(self.areset(seed=seed, options=options))

    def step(self, action: AssistantMessage | str) -> tuple[Observation, SupportsFloat, bool, bool, Info]:
        if isinstance(action, str):
            from areal_agents.chat.toolcalls import parse_text  # late: only this facade needs it

            action = parse_text(action, tools=self.tools)
        return run_sync(self.astep(action))

    def close(self) -> None:
        run_sync(self.aclose())


class LazyTasks(Sequence[Task]):
    """A sequence of procedural tasks, each made when it is looked at.

    ``make(index)`` must be deterministic.
    """

    def __init__(self, length: int, make: Callable[[int], Task]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"task {index} of {self._length}")
        try:
            task = self._make(position)
        except ArealError:
            raise
        except Exception as error:  # the author's own code
            raise EnvError(f"task {position} of {self._length} could not be made: {described(error)}") from error
        if not isinstance(task, Task):
            raise EnvError(f"task {position} of {self._length} is {short(task)}, which is no Task: use Task.make")
        return task
