"""The limits that the runner sets for one episode."""

from __future__ import annotations

from dataclasses import dataclass

from areal_agents.types import StopReason


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that the runner sets for one episode.

    Tokens are sampled tokens unless said otherwise.
    """

    max_context: int
    """Prompt and completion together."""
    max_turn_tokens: int
    max_episode_tokens: int
    max_turns: int
    step_timeout: float
    """Seconds for one reset or step, beside what its tool calls may take."""
    request_timeout: float
    """Seconds for one generation."""

    def room(self, *, used: int, spent: int) -> int | StopReason:
        """Return how many tokens the next turn may sample, or why there is none.

        Args:
            used: tokens of the turn's prompt.
            spent: tokens sampled in the turns before it.
        """
        if used >= self.max_context:
            return "context"
        if spent >= self.max_episode_tokens:
            return "tokens"
        return min(self.max_turn_tokens, self.max_context - used, self.max_episode_tokens - spent)

    def met(self, *, used: int, spent: int) -> StopReason:
        """Return which limit cut a turn.

        Args:
            used: tokens of its prompt and its own.
            spent: tokens sampled in the episode, with its own.
        """
        full = self.room(used=used, spent=spent)
        return full if isinstance(full, str) else "length"
