"""The view of one finished episode that an advantage estimator has.

r_{i,k}                              reward of turn k of trajectory i (k from 0, K_i turns)
R_i = Σ_k r_{i,k}                    return of trajectory i
G_{i,k} = Σ_{j≥k} γ^{j−k} r_{i,j}    return from turn k on
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from areal_agents.errors import RewardError
from areal_agents.types import StopReason, Trajectory
from areal_agents.utils.real_number import LARGEST


@dataclass(frozen=True)
class EpisodeView:
    """One episode of K ≥ 1 turns, as rewards and what else credit may depend on.

    What is left out is as in an episode whose turns have one token each and that ended by itself. Raises ValueError
    without a turn or for entries that do not fit the turns, RewardError for a reward that is not finite, or too large
    to be compared.
    """

    rewards_K: tuple[float, ...]
    tokens_K: tuple[int, ...] = ()
    """Sampled tokens of each turn."""
    state_keys_K: tuple[str | None, ...] = ()
    """The environment's key of the state that each turn was shown. None: it gives none."""
    terminated: bool = True
    """Whether the task ended. Else a limit of the runner cut the episode."""
    stop_reason: StopReason = "answer"
    values_K: tuple[tuple[float, ...], ...] | None = None
    """V before each sampled token, [T_k] a turn. None where no estimator asked for values."""
    tail_value: float = 0.0
    """V after the last turn, read on the final observation where the episode was cut. 0 where the task ended."""
    greedy_return: float | None = None
    """Return of an episode of the same task that was played without chance. None where no estimator asked for one."""

    log_ratio: float | None = None
    """Σ (log π − log μ) over the episode's sampled tokens, π being the policy that trains on them next. None where no
    estimator asked for it."""
    paid_K: tuple[tuple[float, ...], ...] | None = None
    """What each sampled token pays for leaving a reference policy, [T_k] a turn; ``rewards_K`` has it already. None:
    nothing is paid."""

    def __post_init__(self) -> None:
        n = len(self.rewards_K)
        if not n:
            raise ValueError("an episode without a turn has no advantage: leave it out of the group")
        if not self.tokens_K:
            object.__setattr__(self, "tokens_K", (1,) * n)
        if not self.state_keys_K:
            object.__setattr__(self, "state_keys_K", (None,) * n)
        for k, reward in enumerate(self.rewards_K):
            if not math.isfinite(reward):
                raise RewardError(f"the reward of turn {k} is {reward}: rewards must be finite numbers")
            if abs(reward) > LARGEST:
                raise RewardError(f"the reward of turn {k} is {reward:g}: rewards may be up to {LARGEST:g} in size")
        if len(self.tokens_K) != n or len(self.state_keys_K) != n:
            raise ValueError(f"{len(self.tokens_K)} lengths and {len(self.state_keys_K)} state keys for {n} turns")
        if self.values_K is not None and tuple(map(len, self.values_K)) != self.tokens_K:
            raise ValueError(f"values of {[len(v) for v in self.values_K]} tokens for turns of {list(self.tokens_K)}")
        if self.paid_K is not None and tuple(map(len, self.paid_K)) != self.tokens_K:
            raise ValueError(f"pay of {[len(p) for p in self.paid_K]} tokens for turns of {list(self.tokens_K)}")
        if self.terminated and self.tail_value:
            raise ValueError(f"tail_value = {self.tail_value}: nothing is to come once a task has ended")

    def paying(self, paid_K: Sequence[Sequence[float]]) -> EpisodeView:
        """Return the view of an episode whose turns' rewards are less by what their tokens pay, [T_k] a turn."""
        paid = tuple(tuple(turn) for turn in paid_K)
        left = tuple(r - math.fsum(turn) for r, turn in zip(self.rewards_K, paid, strict=True))
        return replace(self, rewards_K=left, paid_K=paid)

    def token_rewards(self, k: int) -> list[float]:
        """Return the reward at each sampled token of turn k, [T_k]: what it pays, and the turn's own at the last."""
        if not self.tokens_K[k]:
            return []
        paid = (0.0,) * self.tokens_K[k] if self.paid_K is None else self.paid_K[k]
        return [*(-p for p in paid[:-1]), self.rewards_K[k] + math.fsum(paid[:-1])]

    @property
    def total(self) -> float:
        """R, the undiscounted return."""
        return math.fsum(self.rewards_K)

    def turn_returns(self, gamma: float) -> list[float]:
        """Return G_k = Σ_{j≥k} γ^{j−k} r_j of each turn, [K]. What would follow a cut episode counts as 0."""
        returns: list[float] = []
        tail = 0.0
        for reward in reversed(self.rewards_K):
            tail = reward + gamma * tail
            returns.append(tail)
        return returns[::-1]

    @classmethod
    def of(
        cls,
        trajectory: Trajectory,
        *,
        values_K: tuple[tuple[float, ...], ...] | None = None,
        tail_value: float = 0.0,
        greedy_return: float | None = None,
    ) -> EpisodeView:
        """Take the view of a finished episode.

        Args:
            trajectory: the episode.
            values_K: V before each sampled token, [T_k] a turn.
            tail_value: V after the last turn.
            greedy_return: return of the group's greedy episode.

        Raises:
            ValueError: for an episode without a turn, or values that do not fit its turns.
            RewardError: for a reward that is not finite, or too large.
        """
        return cls(
            rewards_K=tuple(t.reward for t in trajectory.turns),
            tokens_K=tuple(len(t.completion.ids) for t in trajectory.turns),
            state_keys_K=tuple(t.state_key for t in trajectory.turns),
            terminated=trajectory.terminated,
            stop_reason=trajectory.stop_reason,
            values_K=values_K,
            tail_value=tail_value,
            greedy_return=greedy_return,
        )
