"""The tasks, which are trails of one length.

Training and test share no code, whatever the difficulty.
"""

from __future__ import annotations

from functools import cache

from areal_agents import Task

from . import boxes

SIZES = {"train": 512, "test": 128}
_TEST_BUCKETS = 5


@cache
def tasks_of(split: str, hops: int) -> tuple[Task, ...]:
    """Return the first ``SIZES[split]`` trails of ``hops`` boxes that belong to ``split``."""
    found: list[Task] = []
    kind = boxes.KINDS[-hops]
    for i in range(10_000):
        # A stride without a common factor with 10000 visits every number once, in no telling order.
        start = f"{kind}-{(13 + 7919 * i) % 10_000:04d}"
        trail = boxes.trail(start)
        answer = boxes.code(trail[-1])
        if split_of(answer) == split:
            payload = {"trail": trail, "answer": str(answer)}
            found.append(Task.make(f"{split}-{start}", split=split, seed=i, payload=payload))
        if len(found) == SIZES[split]:
            break
    return tuple(found)


def split_of(code: int) -> str:
    """Return the split of every trail that ends at this code.

    The answer decides, so that no answer is in both splits.
    """
    return "test" if boxes.draw(f"split {code}") % _TEST_BUCKETS == 0 else "train"
