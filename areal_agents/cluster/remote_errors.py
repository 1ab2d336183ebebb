"""Deliberate errors on their way from an actor to its caller, as values.

Ray re-raises an actor's exception under a class of its own, on which ``InfraError.tool`` reads as the class's default,
and pickling drops ``__cause__``. So actors return a ``Failure`` and the caller raises ``failure.error()``.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from areal_agents.errors import ArealError, InfraError, SandboxUnavailable


class RemoteCause(Exception):
    """What caused an error in another process: its traceback as text."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An ``ArealError``, picklable whatever it carried."""

    kind: type[ArealError]
    """Its class; for a class of somebody else's package, the nearest base in this one: the caller can import that."""
    args: tuple[str, ...]
    tool: str = ""
    turns: int = 0
    tokens: int = 0
    cause: str = ""
    """Traceback of its ``__cause__``; empty where it has none."""

    @classmethod
    def of(cls, error: ArealError) -> Failure:
        """``error`` as a value."""
        kind = next(c for c in type(error).__mro__ if c.__module__.startswith("areal_agents."))
        if isinstance(error, SandboxUnavailable):
            args: tuple[str, ...] = (error.backend, error.probe, error.remedy)
        else:
            args = (str(error),)
        cause = error.__cause__
        text = "" if cause is None else "".join(traceback.format_exception(cause)).rstrip()
        if isinstance(error, InfraError):
            return cls(kind, args, error.tool, error.turns, error.tokens, text)
        return cls(kind, args, cause=text)

    def error(self) -> ArealError:
        """The error again, caused by a ``RemoteCause`` where it had a cause."""
        error = self.kind(*self.args)
        if isinstance(error, InfraError):
            error.tool, error.turns, error.tokens = self.tool, self.turns, self.tokens
        if self.cause:
            error.__cause__ = RemoteCause(self.cause)
        return error
