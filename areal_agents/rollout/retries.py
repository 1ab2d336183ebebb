"""The runner that repeats failed attempts, reports them and counts them against a budget."""

from __future__ import annotations

from collections import Counter, deque

from areal_agents.errors import ArealError, FailureBudgetError, InfraError, RewardError, WorkerLost
from areal_agents.rollout.player import EpisodePlayer, EventSink, no_events
from areal_agents.types import Task, Trajectory
from areal_agents.utils.short_text import text_of


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

    Every failed attempt is counted against the budget.
    """

    def __init__(
        self, player: EpisodePlayer, budget: FailureBudget, *, max_retries: int, event: EventSink = no_events
    ) -> None:
        self.player = player
        self.budget = budget
        self.first_given_up: ArealError | None = None
        """Why the first episode was given up, of those that were."""
        self._max_retries = max_retries
        self._event = event

    async def run(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory | None:
        """Play one episode, with as many attempts as it takes and ``max_retries`` allow.

        Args:
            task: the task to play.
            id: of the episode. Retry n plays as ``id~n``.
            group: the group that the trajectory belongs to.
            seed: the environment is reset with it at every attempt.

        Returns:
            The trajectory, or None after ``max_retries`` retries or a final failure.

        Raises:
            FailureBudgetError: the budget is spent.
        """
        attempt = 0
        while True:
            attempt_id = id if attempt == 0 else f"{id}~{attempt}"
            try:
                trajectory = await self.player.play(task, id=attempt_id, group=group, seed=seed)
            except (InfraError, RewardError) as error:
                attempt += 1
                retry = isinstance(error, InfraError) and not error.final and attempt <= self._max_retries
                self._event(
                    "episode_failed", episode=id, task=task.id, error=type(error).__name__, detail=text_of(error),
                    attempt=attempt, retried=retry, **_where(error),
                )  # fmt: skip
                self.budget.failure(error)
                if not retry:
                    self.first_given_up = self.first_given_up or error
                    return None
            else:
                self.budget.success()
                return trajectory

    async def close(self) -> None:
        """Close the player."""
        await self.player.close()


def _where(error: ArealError) -> dict[str, object]:
    """Return where in its episode an infrastructure failure struck."""
    return {"tool": error.tool, "turns": error.turns, "tokens": error.tokens} if isinstance(error, InfraError) else {}
