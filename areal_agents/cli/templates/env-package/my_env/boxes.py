"""The world, which consists of boxes with notes in them.

A box A or B names the next box, a box C holds a code. The world is a pure function of a box's label. So every process
and every attempt sees the same one, and no state has to be kept. What is in a box cannot be worked out from its label,
so a model needs the tool.
"""

from __future__ import annotations

import hashlib
import re

KINDS = "ABC"
LABEL = re.compile(r"[ABC]-[0-9]{4}")


def note(label: str) -> str | None:
    """Read the note in the box, or None where there is no such box."""
    if LABEL.fullmatch(label) is None:
        return None
    following = next_box(label)
    return f"The code is {code(label)}." if following is None else f"The next box is {following}."


def next_box(label: str) -> str | None:
    """Return the box that this one names, or None for the last kind."""
    kind = KINDS.index(label[0])
    return None if kind == len(KINDS) - 1 else f"{KINDS[kind + 1]}-{draw(label) % 10_000:04d}"


def code(label: str) -> int:
    """Return the code in a box of the last kind, which has five digits."""
    return 10_000 + draw(label) % 90_000


def trail(start: str) -> list[str]:
    """Return the labels from ``start`` to the box that holds the code."""
    labels = [start]
    while (following := next_box(labels[-1])) is not None:
        labels.append(following)
    return labels


def draw(text: str) -> int:
    """Return a large number that depends on ``text`` alone.

    It is the same in every process, which ``hash`` is not.
    """
    return int.from_bytes(hashlib.sha256(f"my_env {text}".encode()).digest()[:8], "big")
