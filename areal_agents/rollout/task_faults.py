"""Tasks that cannot be played or scored, told apart from infrastructure that failed.

    an attempt fails ─▶ TaskError ─────────────────────────────▶ the task is left out at once
                     ├▶ the environment's own failure ─▶ held until the group's attempts are over
                     │        none succeeded, all failed in the same words ─▶ the task is left out
                     │        else ─▶ charged to the failure budget
                     └▶ anything else ─▶ charged at once

The environment's own failures are: its code raised (a KeyError in ``prompt``, a rubric that cannot read the gold
answer), it broke its contract, a reward was no number, or its reset did not return in time. What an engine, a sandbox,
a worker or a refused connection did is never the task's. One attempt that succeeds, or that fails in other words,
clears the task: a flaky backend is infrastructure. Numbers, paths and addresses in a message are no words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from areal_agents.errors import ArealError, EnvError, InfraError, RewardError, TaskError
from areal_agents.utils.short_text import cut, text_of

_VARIES = re.compile(
    r"(?:(?:\b[A-Za-z]:)?(?:[\\/][^\s\\/'\"`,;()<>\[\]{}]+)+[\\/]?"  # paths and URLs: their names may be random
    r"|\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"  # UUIDs
    r"|\b\w*\d\w*"  # numbers, addresses, digests, and the names of temporary files
    r"|[\s.,:+\-]+)+"  # and what stands between them in dates, times and numbers
)
"""What may differ between two attempts that fail for one reason."""
_NAMED = 10


class TaskAttempts:
    """The attempts at one task in one group, as far as they tell whether it can be played."""

    def __init__(self) -> None:
        self.certain: TaskError | None = None
        """Says that the task cannot be played, as soon as that is certain."""
        self._held: list[ArealError] = []
        self._cleared = False

    def failed(self, error: InfraError | RewardError) -> list[ArealError]:
        """Note a failed attempt, and return the failures that are infrastructure's as is known now."""
        if self._cleared or not _is_own(error):
            return [error]  # and says nothing about the others: an engine may die under a bad task too
        self._held.append(error)
        return [] if _signature(error) == _signature(self._held[0]) else self.clear()

    def clear(self) -> list[ArealError]:
        """Note that the task can be played, and return the failures that were held."""
        self._cleared = True
        held, self._held = self._held, []
        return held

    def enough(self, attempts: int) -> bool:
        """Say whether so many attempts have failed in the same words that one more would tell nothing."""
        return len(self._held) >= attempts

    def verdict(self) -> TaskError | None:
        """Return why the task cannot be played, now that its attempts are over, or None where that is not shown.

        A reward that is no number shows it by itself, anything else has to be seen twice.
        """
        if self.certain is not None or not self._held:
            return self.certain
        first = self._held[0]
        if len(self._held) < 2 and not isinstance(first, RewardError):
            return None
        n = len(self._held)
        found = TaskError(text_of(first) if n == 1 else f"{text_of(first)} (the same in all {n} attempts)")
        found.__cause__ = first
        return found


def reasons(left_out: Mapping[str, str], *, rest: str = ", which events.jsonl names") -> str:
    """Name the first tasks of those left out, each with its reason on a line of its own below the text before it.

    ``rest`` says where the others are named.
    """
    shown = [f"{cut(id, 120)}: {cut(why, 300)}" for id, why in list(left_out.items())[:_NAMED]]
    if len(left_out) > _NAMED:
        shown.append(f"and {len(left_out) - _NAMED} more{rest}")
    return "".join(f"\n  {line}" for line in shown)


def footer(left_out: Mapping[str, str]) -> str:
    """Return lines below an evaluation's table that name what is not in it, or an empty text."""
    n = len(left_out)
    return f"\n{n} {'task' if n == 1 else 'tasks'} left out, in no rate:{reasons(left_out)}" if n else ""


def _is_own(error: InfraError | RewardError) -> bool:
    """Say whether the environment itself failed, and might again."""
    if isinstance(error, RewardError):
        return True
    return isinstance(error, EnvError) and not error.final and error.blame == "environment"


def _signature(error: ArealError) -> tuple[type, str]:
    """Return what is the same for two failures of one kind: the class, and the words of the message."""
    return type(error), _VARIES.sub(" ", text_of(error))
