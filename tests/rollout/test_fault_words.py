"""When two failures of one task are the same: in the words of the message, whatever numbers and paths say."""

from __future__ import annotations

import pytest

from areal_agents.errors import ArealError, EnvError
from areal_agents.rollout.task_faults import TaskAttempts

SAME = {
    "numbers": ("row 3 of 12 is missing", "row 14 of 9 is missing"),
    "floats": ("it took 1.5e-3 s, score -2", "it took 12 s, score +0.25"),
    "addresses": ("<Table object at 0x7f3a11c0> is empty", "<Table object at 0x55b2> is empty"),
    "temporary files": ("no table in /tmp/tmpab3x_9q/data.csv", "no table in /tmp/tmpqqqqqqqq/data.csv"),
    "temporary names": ("no table tmpab3x_9q", "no table tmpk29dzz"),
    "windows paths": (r"cannot read C:\Users\a\x.db", r"cannot read D:\Users\b\y.db"),
    "quoted paths": ("[Errno 2] No such file: '/srv/run-1/a'", "[Errno 2] No such file: '/srv/run-22/b/c'"),
    "uuids": (
        "session 123e4567-e89b-12d3-a456-426614174000 has no gold",
        "session deadbeef-0000-4000-8000-1234567890ab has no gold",
    ),
    "times": ("2026-01-02 03:04:05: no answer", "2026-11-28T13:14:15.123: no answer"),
    "turns": ("astep (task t-1, turn 0): no gold", "astep (task t-1, turn 12): no gold"),
    "spaces": ("two  lines\nof text", "two lines of text"),
}
OTHER = {
    "words": ("no table", "no column"),
    "names": ("KeyError: 'gold'", "KeyError: 'answer'"),
    "more": ("no table", "no table at all"),
}


def outcome(first: str, second: str) -> tuple[list[str], str | None]:
    """What is charged to the infrastructure, and why the task is left out."""
    attempts = TaskAttempts()
    charged: list[ArealError] = []
    for text in (first, second):
        charged += attempts.failed(EnvError(text))
    verdict = attempts.verdict()
    return [str(error) for error in charged], None if verdict is None else str(verdict)


@pytest.mark.parametrize("name", SAME)
def test_numbers_paths_and_addresses_are_no_words(name: str) -> None:
    first, second = SAME[name]
    assert outcome(first, second) == ([], f"{first} (the same in all 2 attempts)")


@pytest.mark.parametrize("name", OTHER)
def test_other_words_are_infrastructure(name: str) -> None:
    first, second = OTHER[name]
    assert outcome(first, second) == ([first, second], None)


def test_hostile_messages_are_compared_too() -> None:
    for text in ("a" * 1999, "/" * 1999, "/a" * 999, "1." * 999, "- " * 999, "_" * 1999 + "1", "\\" * 1999):
        assert outcome(text, text)[0] == []
