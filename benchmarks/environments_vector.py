"""Gymnasium's vector environments, in a process that imports nothing else: what they run is as lean as it can be.

A step sleeps as long as the tool of ``environments_sides.py`` waits, in a plain ``gymnasium.Env`` over numbers: no text
is written or read, which is to their advantage.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import gymnasium
import numpy as np
from measured_process import serve


class Sleeping(gymnasium.Env[np.int64, np.int64]):
    """An episode of so many steps, each of which waits for a tool as synchronous code does."""

    observation_space = action_space = gymnasium.spaces.Discrete(1000)

    def __init__(self, turns: int, seconds: float) -> None:
        self._turns, self._seconds = turns, seconds

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        super().reset(seed=seed)
        self._turn = 0
        return np.int64(0), {}

    def step(self, action: np.int64) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        time.sleep(self._seconds)
        self._turn += 1
        over = self._turn == self._turns
        return np.int64(self._turn), float(over), over, False, {}


def played(asked: dict[str, Any]) -> dict[str, Any]:
    """Play one episode in each of so many environments, and say how long it took without their start."""
    count, turns, seconds = asked["episodes"], asked["turns"], asked["tool_seconds"]
    makes = [lambda: Sleeping(turns, seconds)] * count
    start = time.perf_counter()
    kinds = {"sync": gymnasium.vector.SyncVectorEnv, "async": gymnasium.vector.AsyncVectorEnv}
    envs = kinds[asked["side"]](makes)
    ready = time.perf_counter()
    try:
        envs.reset(seed=0)
        begun = time.perf_counter()
        for _ in range(turns):
            _, rewards, terminated, _, _ = envs.step(np.zeros(count, dtype=np.int64))
        wall = time.perf_counter() - begun
    finally:
        envs.close()
    if not terminated.all() or rewards.sum() != count:
        raise RuntimeError(f"{int(terminated.sum())} of {count} episodes ended")
    return {"side": asked["side"], "episodes": count, "turns": turns, "seconds": wall, "start_seconds": ready - start}


if __name__ == "__main__":
    sys.exit(serve(played))
