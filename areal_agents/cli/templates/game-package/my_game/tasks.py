"""The tasks, which are worlds of one level.

Training and test share no world, whatever the level.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from areal_agents import Task

from .world import OPPOSITE, path

SIZES = {"train": 256, "test": 64}
LEVELS = {1: (2, 3), 2: (4, 5), 3: (6, 7)}
"""Fewest and most moves that a level needs."""
ROOMS = (
    "attic", "cellar", "chapel", "garden", "hall", "kitchen", "library", "pantry", "stable", "study", "tower", "well",
)  # fmt: skip
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


@cache
def tasks_of(split: str, level: int) -> tuple[Task, ...]:
    """Return the first ``SIZES[split]`` worlds of ``level`` that belong to ``split``."""
    found: dict[str, Task] = {}
    seed = 0
    while len(found) < SIZES[split]:
        task = Task.make(f"{split}-{level}-{seed}", split=split, seed=seed, payload=world(seed, level))
        # The content decides, so that no world is in both splits.
        if (int(task.content_hash[:8], 16) % 5 == 0) == (split == "test"):
            found.setdefault(task.content_hash, task)
        seed += 1
    return tuple(found.values())


def world(seed: int, level: int) -> dict[str, Any]:
    """Draw a world that ``level`` fits, by a generator of its own."""
    rng = random.Random(f"{seed} {level}")
    fewest, most = LEVELS[level]
    while True:
        exits = rooms(rng, 2 * level + 2)
        start, key, vault, *others = rng.sample(sorted(exits), len(exits))
        dead_ends = [room for room in others if len(exits[room]) == 1]
        pit = dead_ends[0] if dead_ends else None
        moves = len(path(exits, start, key, pit)) + len(path(exits, key, vault, pit))
        if fewest <= moves <= most:
            return {"exits": exits, "start": start, "key": key, "vault": vault, "pit": pit}


def rooms(rng: random.Random, count: int) -> dict[str, dict[str, str]]:
    """Draw a tree of rooms on a grid."""
    names = rng.sample(ROOMS, count)
    places = {(0, 0): names[0]}
    exits: dict[str, dict[str, str]] = {name: {} for name in names}
    for name in names[1:]:
        free = [
            (place, way) for place in sorted(places) for way, (x, y) in STEPS.items()
            if (place[0] + x, place[1] + y) not in places
        ]  # fmt: skip
        place, way = rng.choice(free)
        exits[places[place]][way] = name
        exits[name][OPPOSITE[way]] = places[place]
        places[place[0] + STEPS[way][0], place[1] + STEPS[way][1]] = name
    return exits
