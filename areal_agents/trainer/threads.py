"""Who computes on which cores: engine and learner share one machine without fighting over it.

Two OpenMP pools that together want more threads than there are cores spin against each other and both lose, so the
split is explicit: while the learner works, the engine keeps ``engine`` threads; while it is idle, all of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from areal_agents.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cores:
    """Threads of each engine and of the learner, while both work and while the other one is idle."""

    engine: int
    learner: int
    engine_alone: int
    learner_alone: int


def split_cores(engine: int = 0, learner: int = 0, *, replicas: int = 1, total: int | None = None) -> Cores:
    """Settings to threads; 0 means automatic: half each, and with more than four cores one for the learner.

    ``engine`` threads are shared by ``replicas`` engines, each has at least one. Raises ConfigError where the two
    together exceed the cores this process may use.
    """
    total = total or len(os.sched_getaffinity(0))
    if engine == 0:
        engine = max(1, total - learner) if learner else max(1, total - 1 if total > 4 else total // 2)
    if learner == 0:
        learner = max(1, total - engine)
    if total > 1 and engine + learner > total:
        raise ConfigError(
            f"engine.threads = {engine} and learner.threads = {learner} exceed the {total} cores of this process: "
            "lower one of them or set it to 0"
        )
    engine, learner = min(engine, total), min(learner, total)
    return Cores(max(1, engine // replicas), learner, max(1, total // replicas), total)
