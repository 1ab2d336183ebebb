"""Play one of our environments through Gymnasium's vector API, in one process or in several.

    python examples/gymnasium_vector.py areal/Nim-v0 --async

An observation is a tuple of messages, an action is a text. Both are Python objects, so ``AsyncVectorEnv`` must not put
them into shared memory. An ``AsyncVectorEnv`` has a process for each environment; for many episodes at once
``areal_agents.rollout`` needs one process for all.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode, VectorEnv

import areal_agents  # noqa: F401  registers the environments
from areal_agents.tool import call_text
from areal_agents.types import Observation


def vector(env_id: str, count: int, *, asynchronous: bool, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
    """Make environments that begin a new episode in the step in which one ends.

    The episode's last observation and info are then in ``infos["final_obs"]`` and ``infos["final_info"]``.
    """
    settings: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}
    if asynchronous:
        settings["shared_memory"] = False
    mode = "async" if asynchronous else "sync"
    return gymnasium.make_vec(env_id, count, vectorization_mode=mode, vector_kwargs=settings, **kwargs)


def largest_heap(shown: Observation) -> str:
    """Take the largest heap of Nim: a policy that wins sometimes."""
    heaps = {int(i): int(n) for i, n in re.findall(r"heap (\d+): (\d+)", shown[-1].text)}
    heap = max(heaps, key=lambda i: heaps[i])
    return call_text("take", heap=heap, count=heaps[heap])


def play(envs: VectorEnv[Any, Any, Any], episodes: int) -> list[float]:
    """Play until so many episodes have ended, and return their rewards."""
    shown: Sequence[Observation]
    shown, _ = envs.reset(seed=0)
    ended: list[float] = []
    while len(ended) < episodes:
        shown, rewards, terminated, truncated, _ = envs.step([largest_heap(seen) for seen in shown])
        ended += [float(r) for r, over in zip(rewards, terminated | truncated, strict=True) if over]
    return ended[:episodes]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env", nargs="?", default="areal/Nim-v0")
    parser.add_argument("--async", dest="asynchronous", action="store_true")
    given = parser.parse_args()
    envs = vector(given.env, 4, asynchronous=given.asynchronous)
    rewards = play(envs, 40)
    envs.close()
    print(f"{len(rewards)} episodes, {sum(rewards) / len(rewards):.2f} on the average")
