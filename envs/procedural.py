"""Tasks that are drawn instead of written: task i of a split is a pure function of (environment, difficulty, i).

A task belongs to the test split where its content hash falls into one bucket of eight (of two, where there are few
tasks), and to the train split otherwise. So no task is in both, whatever the difficulties. Tasks that are alike, such
as mirrored ones, go by one hash; an environment may also keep its splits apart in another way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import Any, Final

from areal_agents.env import LazyTasks
from areal_agents.errors import ConfigError, EnvError
from areal_agents.types import Task, content_hash

SIZES: Final[Mapping[str, int]] = MappingProxyType({"train": 4096, "test": 512})
TEST_BUCKETS: Final = 8
_TRIES = 10_000
"""Draws for one task. Of as many as there are buckets, one is of the test split on the average."""


def drawn_tasks(
    env: str, split: str, difficulty: float, draw: Callable[[Random], dict[str, Any] | None],
    sizes: Mapping[str, int] = SIZES, *, buckets: int = TEST_BUCKETS, apart: bool = False,
    alike: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> LazyTasks:  # fmt: skip
    """Return the tasks of a split, whose payloads ``draw`` makes from a generator of each task's own.

    A payload may be drawn twice. Where there are few, most are: ``docs/environments.md`` says how many there are.

    Args:
        env: the environment's id, or anything else that tells its tasks from those of others.
        split: one of ``sizes``.
        difficulty: in [0, 1]; part of what a task is drawn from.
        draw: makes a JSON-able payload, or None where it sees that it will not do. It is asked again until one belongs
            to the split.
        sizes: the number of tasks by split.
        buckets: of tasks, one of which is the test split: 2 where there are so few that an eighth would be a handful.
        apart: ``draw`` makes other payloads for each split anyway, so none is drawn again.
        alike: returns what payloads that are alike have in common, whose hash the split goes by.

    Raises:
        ConfigError: there is no such split.
    """
    if split not in sizes:
        raise ConfigError(f"{env} has no split {split!r}: its splits are {', '.join(sizes)}")

    def make(index: int) -> Task:
        # A seed from a hash of text: the same in every process, which the built-in hash is not.
        digest = hashlib.sha256(f"{env} {split} {difficulty!r} {index}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
        rng = Random(seed)
        for _ in range(_TRIES):
            payload = draw(rng)
            if payload is not None and (apart or split_of(content_hash(alike(payload)), buckets) == split):
                return Task.make(f"{split}-{difficulty:g}-{index}", split=split, seed=seed, payload=payload)
        raise EnvError(f"{env}: none of {_TRIES} draws at difficulty {difficulty:g} belongs to the split {split!r}")

    return LazyTasks(sizes[split], make)


def by_level(easiest: float, middle: float, hardest: float) -> dict[float | None, float]:
    """Return an environment's ``chance`` at the difficulties 0, 0.5, which is the default, and 1."""
    return {None: middle, 0.0: easiest, 0.5: middle, 1.0: hardest}


def split_of(hash: str, buckets: int = TEST_BUCKETS) -> str:
    """Return the split that a task of this content hash belongs to, where the test split is one of ``buckets``."""
    return "test" if int(hash[:8], 16) % buckets == 0 else "train"
