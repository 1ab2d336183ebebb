"""What judges may cost, and what they have cost."""

from __future__ import annotations

from dataclasses import dataclass

from areal_agents.chat_model import ChatReply
from areal_agents.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Budget:
    """A bound on what a panel may cost in one process. None sets no bound.

    A request that a client repeats by itself, after a lost connection for example, is one call.
    """

    calls: int | None = None
    """Requests to all judges together. What the cache answers is none."""
    tokens: int | None = None
    """Prompt and sampled tokens, as the servers report them. Requests that run when it is reached are still paid."""

    def __post_init__(self) -> None:
        for name, most in (("calls", self.calls), ("tokens", self.tokens)):
            if most is not None and most < 1:
                raise ConfigError(f"a judges' budget of {most} {name}: it must be at least 1, or None")


class Spending:
    """The requests and tokens that a panel has used."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.calls = 0
        self.tokens = 0

    def begin(self) -> None:
        """Count a request that starts now. Raises ConfigError where the budget does not allow it."""
        calls, tokens = self._budget.calls, self._budget.tokens
        if calls is not None and self.calls >= calls:
            self._refuse(f"{calls} calls")
        if tokens is not None and self.tokens >= tokens:
            self._refuse(f"{tokens} tokens")
        self.calls += 1

    def end(self, judge: str, reply: ChatReply) -> None:
        """Count the tokens of a reply. Raises ConfigError where they are bounded and the judge does not tell them."""
        used = [n for n in (reply.prompt_tokens, reply.completion_tokens) if n is not None]
        if len(used) < 2 and self._budget.tokens is not None:
            raise ConfigError(
                f"judge {judge!r} does not report its tokens, so a budget of {self._budget.tokens} tokens cannot be "
                "kept: give Budget(calls=…)"
            )
        self.tokens += sum(used)

    def _refuse(self, most: str) -> None:
        raise ConfigError(
            f"the judges' budget of {most} is spent: {self.calls} calls and {self.tokens} tokens were used in this "
            "process. Raise it, or score fewer episodes with judges"
        )
