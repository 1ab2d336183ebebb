"""Deliberate errors as values, on their way from an actor to its caller.

Ray re-raises an actor's exception under a class of its own, on which ``InfraError.tool`` reads as the class's default,
and pickling drops ``__cause__``. So actors return a ``Failure`` and the caller raises ``failure.error()``.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Literal

from areal_agents.errors import ArealError, EnvError, InfraError, SandboxUnavailable
from areal_agents.utils.short_text import cut, text_of

_TRACEBACK_CHARS = 20_000


class RemoteCause(Exception):
    """The cause of an error in another process, with its traceback as text."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An ``ArealError`` as a value, picklable whatever the error carried."""

    kind: type[ArealError]
    """The error's class. For a class of another package it is the nearest base in this one, which every caller has."""
    args: tuple[str, ...]
    tool: str = ""
    turns: int = 0
    tokens: int = 0
    final: bool = False
    blame: Literal["environment", "outside", "hang"] = "environment"
    cause: str = ""
    """Traceback of its ``__cause__``; empty where it has none."""

    @classmethod
    def of(cls, error: ArealError) -> Failure:
        """Return ``error`` as a value."""
        kind = next(c for c in type(error).__mro__ if c.__module__.startswith("areal_agents."))
        if isinstance(error, SandboxUnavailable):
            args: tuple[str, ...] = (error.backend, error.probe, error.remedy)
        else:
            args = (text_of(error),)
        cause = error.__cause__
        text = "" if cause is None else cut("".join(traceback.format_exception(cause)).rstrip(), _TRACEBACK_CHARS)
        if isinstance(error, InfraError):
            blame = error.blame if isinstance(error, EnvError) else "environment"
            return cls(kind, args, error.tool, error.turns, error.tokens, error.final, blame, text)
        return cls(kind, args, cause=text)

    def error(self) -> ArealError:
        """Return the error again, caused by a ``RemoteCause`` where it had a cause."""
        error = self.kind(*self.args)
        if isinstance(error, InfraError):
            error.tool, error.turns, error.tokens = self.tool, self.turns, self.tokens
            error.final = self.final
        if isinstance(error, EnvError):
            error.blame = self.blame
        if self.cause:
            error.__cause__ = RemoteCause(self.cause)
        return error
