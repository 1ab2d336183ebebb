"""The runner that repeats failed attempts, reports them and counts them against a budget."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from areal_agents.errors import ArealError, FailureBudgetError, InfraError, RewardError, TaskError, WorkerLost
from areal_agents.rollout.player import EpisodePlayer, EventSink, no_events
from areal_agents.rollout.task_faults import TaskAttempts, is_own
from areal_agents.types import Task, Trajectory
from areal_agents.utils.short_text import cut, text_of

if TYPE_CHECKING:
    from areal_agents.rollout.group_judge import GroupJudge

_LINES = 10
"""Tasks left out that a runner shows to people, one a line."""


class FailureBudget:
    """A budget of failed attempts among the last ``window`` ones.

    The run stops when more than ``share`` · ``window`` of them failed.
    """

    def __init__(self, *, window: int, share: float) -> None:
        self._outcomes: deque[bool] = deque(maxlen=window)
        self._limit = share * window
        self._first: BaseException | None = None
        self.kinds: Counter[str] = Counter()

    def success(self) -> None:
        self._outcomes.append(False)

    def failure(self, error: ArealError) -> None:
        """Count a failed attempt.

        Raises FailureBudgetError, caused by the first failure, when the budget is spent.

        An episode whose worker was lost is counted in ``kinds`` alone. One loss fails every episode that the worker
        played, and how often workers are lost has a limit of its own.
        """
        self.kinds[type(error).__name__] += 1
        if isinstance(error, WorkerLost):
            return
        self._outcomes.append(True)
        self._first = self._first or error
        failed = sum(self._outcomes)
        if failed > self._limit:
            raise FailureBudgetError(
                f"{failed} of the last {len(self._outcomes)} episode attempts failed, the budget is {self._limit:g} "
                f"(rollout.failure_budget × rollout.failure_window). First failure: {text_of(self._first)}"
            ) from self._first


class EpisodeRunner:
    """The runner of episodes on a player, which retries infrastructure failures.

    Every failed attempt is counted against the budget, except those that are the task's (``task_faults.py``). Such a
    task is left out: named in an event and in a line for people, and not played again by this runner.
    """

    def __init__(
        self,
        player: EpisodePlayer,
        budget: FailureBudget,
        *,
        max_retries: int,
        event: EventSink = no_events,
        say: Callable[[str], None] = lambda line: None,
        group_judge: GroupJudge | None = None,
        greedy: EpisodePlayer | None = None,
    ) -> None:
        """Take over the player and the judge.

        Args:
            player: makes the attempts; closed by ``close``.
            budget: of failed attempts.
            max_retries: further attempts at an episode after an infrastructure failure.
            event: told of failed attempts and of tasks that are left out.
            say: shows a line to people.
            group_judge: judges finished groups; closed by ``close``. None where no reward looks at a whole group.
            greedy: plays the groups' greedy episodes; closed by ``close``. None where no estimator compares with them.
        """
        self.player = player
        self.group_judge = group_judge
        self._greedy = greedy
        self.budget = budget
        self.left_out: dict[str, str] = {}
        """Tasks that cannot be played or scored, each with the reason."""
        self.first_given_up: ArealError | None = None
        """Why the first episode was given up, of those that were."""
        self.own_failures: list[tuple[str, ArealError]] = []
        """Task and error of each episode that was given up because its reward or environment itself failed."""
        self._max_retries = max_retries
        self._event = event
        self._say = say
        self._attempts: dict[str, TaskAttempts] = {}

    @property
    def has_greedy(self) -> bool:
        """Whether each group has a greedy episode."""
        return self._greedy is not None

    async def run(self, task: Task, *, id: str, group: str, seed: int, greedy: bool = False) -> Trajectory | None:
        """Play one episode, with as many attempts as it takes and ``max_retries`` allow.

        Args:
            task: the task to play.
            id: of the episode. Retry n plays as ``id~n``.
            group: the group that the trajectory belongs to. Once its last episode is over, ``settle`` is due.
            seed: the environment is reset with it at every attempt.
            greedy: the group's greedy player plays it.

        Returns:
            The trajectory, or None after ``max_retries`` retries or a final failure.

        Raises:
            TaskError: the task cannot be played. The group's other episodes need no attempt.
            FailureBudgetError: the budget is spent.
        """
        attempts = self._attempts.setdefault(group, TaskAttempts())
        player = self._greedy if greedy else self.player
        if player is None:
            raise ValueError(f"episode {id} is greedy, and this runner has no greedy player")
        attempt = 0
        while attempts.certain is None:
            attempt_id = id if attempt == 0 else f"{id}~{attempt}"
            try:
                trajectory = await player.play(task, id=attempt_id, group=group, seed=seed)
            except TaskError as error:
                attempts.certain = attempts.certain or error
            except (InfraError, RewardError) as error:
                attempt += 1
                charged = attempts.failed(error)
                retry = isinstance(error, InfraError) and not error.final and attempt <= self._max_retries
                # Twice as many as one episode may have: siblings that still play may yet clear the task.
                retry = retry and not attempts.enough(2 * (1 + self._max_retries))
                self._event(
                    "episode_failed", episode=id, task=task.id, error=type(error).__name__, detail=text_of(error),
                    attempt=attempt, retried=retry, **_where(error),
                )  # fmt: skip
                self._charge(charged)
                if not retry:
                    self.first_given_up = self.first_given_up or error
                    if is_own(error):
                        self.own_failures.append((task.id, error))
                    return None
            else:
                self._charge(attempts.clear())
                self.budget.success()
                return trajectory
        raise attempts.certain

    async def finish_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, group: str, seeds: Sequence[int]
    ) -> tuple[Trajectory, ...] | None:
        """Let the group's reward judge its finished episodes, where there is such a reward.

        A failure is retried and counted as an episode's is. It is cancelled with its caller.

        Args:
            task: the group's.
            trajectories: its episodes that succeeded.
            group: as ``run`` was told.
            seeds: what their environments were reset with.

        Returns:
            The trajectories with their final rewards, or None where they could not be judged.

        Raises:
            TaskError: the task cannot be judged. It is left out by now.
            FailureBudgetError: the budget is spent.
        """
        if self.group_judge is None:
            return tuple(trajectories)
        key = f"{group}/group reward"
        attempts = self._attempts[key] = TaskAttempts()
        attempt = 0
        while attempts.certain is None:
            try:
                judged = await self.group_judge.judge(task, trajectories, seeds)
            except TaskError as error:
                attempts.certain = error
            except (InfraError, RewardError) as error:
                attempt += 1
                charged = attempts.failed(error)
                retry = isinstance(error, InfraError) and not error.final and attempt <= self._max_retries
                self._event(
                    "group_failed", group=group, task=task.id, error=type(error).__name__, detail=text_of(error),
                    attempt=attempt, retried=retry,
                )  # fmt: skip
                self._charge(charged)
                if not retry:
                    self.first_given_up = self.first_given_up or error
                    break
            else:
                del self._attempts[key]
                self._charge(attempts.clear())
                self.budget.success()
                return judged
        if (reason := self.settle(task, group=key)) is not None:
            raise TaskError(reason)
        return None

    def settle(self, task: Task, *, group: str, played: bool = False) -> str | None:
        """Say why ``task`` is left out, or return None where it is not, once its group's attempts are over.

        Failures that were held until now are charged to the budget where they are not the task's.

        Args:
            task: the group's.
            group: as ``run`` was told.
            played: whether an episode of the group succeeded elsewhere, before a resume for example.

        Raises:
            FailureBudgetError: the budget is spent.
        """
        attempts = self._attempts.pop(group, None)
        if attempts is None:
            return None
        error = attempts.verdict() if not played or attempts.certain else None
        if error is None:
            self._charge(attempts.clear())
            return None
        self.first_given_up = self.first_given_up or error
        self.leave_out(task.id, text_of(error))
        return self.left_out[task.id]

    def leave_out(self, task: str, reason: str) -> None:
        """Note that the task with this id cannot be played or scored, and tell everybody."""
        self.left_out[task] = reason
        self._event("task_left_out", task=task, reason=reason)
        if len(self.left_out) <= _LINES:
            more = "; further ones are named in events.jsonl alone" if len(self.left_out) == _LINES else ""
            self._say(f"task {cut(task, 120)} is left out: {reason}{more}")

    def _charge(self, failures: list[ArealError]) -> None:
        for error in failures:
            self.budget.failure(error)

    async def close(self) -> None:
        """Close the player, and the judge."""
        if self.group_judge is not None:
            await self.group_judge.close()
        if self._greedy is not None:
            await self._greedy.close()
        await self.player.close()


def _where(error: ArealError) -> dict[str, object]:
    """Return where in its episode an infrastructure failure struck."""
    return {"tool": error.tool, "turns": error.turns, "tokens": error.tokens} if isinstance(error, InfraError) else {}
