"""The split of a machine's cores between engine and learner, which share it without fighting over it.

Two OpenMP pools that together want more threads than there are cores spin against each other, and both lose. So the
split is explicit. While the learner works, the engine keeps ``engine`` threads. While it is idle, the engine has all.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_agents.errors import ConfigError
from areal_agents.utils.system import available_cores


@dataclass(frozen=True, slots=True)
class Cores:
    """Threads of each engine and of the learner.

    ``engine`` and ``learner`` hold while both work, the other two while the other one is idle.
    """

    engine: int
    learner: int
    engine_alone: int
    learner_alone: int


def split_cores(engine: int = 0, learner: int = 0, *, replicas: int = 1, total: int | None = None) -> Cores:
    """Turn the settings into threads.

    Args:
        engine: threads of all engines together. 0 means what ``learner`` leaves.
        learner: threads of the learner. 0 means what ``engine`` leaves. Where both are 0, each gets half of the cores,
            and with more than four cores the learner gets one.
        replicas: engines that share ``engine`` threads. Each has at least one.
        total: cores to split. None means those that this process may use.

    Raises:
        ConfigError: ``engine`` and ``learner`` together exceed ``total``.
    """
    total = total or available_cores()
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
