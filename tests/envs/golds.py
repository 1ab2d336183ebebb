"""A benchmark's trajectories, played through the environment that plays its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import AgentEnv
from areal_agents.types import Task

Played = tuple[float, list[str]]
"""The reward, and all that was shown."""


async def play(env: AgentEnv, task: Task, texts: Iterable[str]) -> Played:
    """Play an episode with these messages, to its end."""
    observation, _ = await env.areset(seed=0, options={"task": task})
    shown, total = [m.text for m in observation], 0.0
    for text in texts:
        observation, reward, terminated, truncated, _ = await env.astep(parse_text(text, tools=env.tools))
        shown += [m.text for m in observation]
        total += reward
        if terminated or truncated:
            return total, shown
    raise AssertionError("the episode did not end")


async def play_again(
    env: AgentEnv, tasks: Sequence[Task], texts: Callable[[Task], Iterable[str]]
) -> tuple[list[Played], list[Played]]:
    """Play all tasks, then every fourth again in the same process: what an episode did to shared objects is seen."""
    first, second = [[await play(env, t, texts(t)) for t in order] for order in (tasks, tasks[::4])]
    return first, second
