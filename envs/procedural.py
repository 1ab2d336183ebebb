"""Tasks that are drawn instead of written: task i of a split is a pure function of (environment, difficulty, i).

A task belongs to the test split where its content hash falls into one bucket of eight, and to the train split
otherwise. So no task is in both, whatever the difficulties.
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
_TEST_BUCKETS = 8
_TRIES = 10_000
"""Draws for one task. Of each eight, one is of the test split on the average."""


def drawn_tasks(
    env: str, split: str, difficulty: float, draw: Callable[[Random], dict[str, Any]],
    sizes: Mapping[str, int] = SIZES, key: Callable[[dict[str, Any]], str] = content_hash,
) -> LazyTasks:  # fmt: skip
    """Return the tasks of a split, whose payloads ``draw`` makes from a generator of each task's own.

    Args:
        env: the environment's id, or anything else that tells its tasks from those of others.
        split: one of ``sizes``.
        difficulty: in [0, 1]; part of what a task is drawn from.
        draw: makes a JSON-able payload. It is asked again until one belongs to the split.
        sizes: the number of tasks by split.
        key: a hash of what two tasks must share to be of one split, by default of the whole payload.

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
            if split_of(key(payload)) == split:
                return Task.make(f"{split}-{difficulty:g}-{index}", split=split, seed=seed, payload=payload)
        raise EnvError(f"{env}: none of {_TRIES} draws at difficulty {difficulty:g} belongs to the split {split!r}")

    return LazyTasks(sizes[split], make)


def split_of(hash: str) -> str:
    """Return the split that a task of this content hash belongs to."""
    return "test" if int(hash[:8], 16) % _TEST_BUCKETS == 0 else "train"
