"""Scripted episodes, played as a training plays its own: ``LocalPlayer``, the host's thread, ``EpisodeDriver``.

environments of the box     their experts, so many at a time
Waiting                     a tool that waits, a thousand episodes at a time
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from measured_process import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from areal_agents import Episode, Task, ToolEnv, registry, tool
from areal_agents.conformance.scripted_episode import script_for
from areal_agents.env import Expert
from areal_agents.rollout.episode import EpisodeDriver, Limits, Said
from areal_agents.rollout.player import LocalPlayer, env_maker
from areal_agents.rollout.script import ScriptPolicy, expert_of
from areal_agents.tool import call_text
from areal_agents.types import Observation, Trajectory
from areal_agents.utils.tolerance import reaches

LIMITS = Limits(
    max_context=1 << 30, max_turn_tokens=1 << 30, max_episode_tokens=1 << 30, max_turns=1000, step_timeout=120.0,
    request_timeout=120.0,
)  # fmt: skip
BEAT = 0.01
"""Seconds between two looks at how late the players' own loop is."""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def _arrived(episode: Episode) -> float:
    return float(episode.state["seen"] == list(range(episode.task.payload["turns"])))


class Waiting(ToolEnv):
    """Each turn calls a tool that waits. The reward says that every call of the episode arrived, once and in order."""

    rubric = _arrived
    max_turns = 1000
    late: ClassVar[list[float]] = []
    """Seconds by which waits were longer than asked for: the lag of the environments' loop."""
    tool_seconds: ClassVar[float] = 0.05

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        raise NotImplementedError("the benchmark makes them")

    def prompt(self, task: Task) -> str:
        return "Look again and again."

    def new_state(self, task: Task) -> dict[str, Any]:
        return {"seen": []}

    @tool()
    async def look(self, turn: int) -> str:
        """Look."""
        begun = time.perf_counter()
        await asyncio.sleep(self.tool_seconds)
        self.late.append(time.perf_counter() - begun - self.tool_seconds)
        self.state["seen"].append(turn)
        if turn + 1 == self.task.payload["turns"]:
            self.end_episode()
        return f"seen {turn}"


def looks(first: Observation) -> Expert:
    """Call the tool, turn after turn."""
    for turn in itertools.count():
        yield call_text("look", turn=turn)


class Thinking(ScriptPolicy):
    """A script that takes its time, as a model does."""

    def __init__(self, task: Task, seconds: float) -> None:
        super().__init__(looks, task)
        self._seconds = seconds

    async def say(self, episode: EpisodeDriver) -> Said:
        if self._seconds:
            await asyncio.sleep(self._seconds)
        return await super().say(episode)


async def beating(late: list[float]) -> None:
    """Note how late the running loop is, until it is cancelled."""
    while True:
        begun = time.perf_counter()
        await asyncio.sleep(BEAT)
        late.append(time.perf_counter() - begun - BEAT)


async def timed(work: Awaitable[Any], late: list[float]) -> tuple[Any, float, float]:
    """Return what ``work`` gives, with its seconds and the process's own."""
    beat = asyncio.create_task(beating(late))
    begun, used = time.perf_counter(), time.process_time()
    try:
        found = await work
    finally:
        beat.cancel()
    return found, time.perf_counter() - begun, time.process_time() - used


async def thousand(asked: dict[str, Any]) -> dict[str, Any]:
    """Play so many episodes of ``Waiting`` at once."""
    count, turns, think = asked["episodes"], asked["turns"], asked["think_seconds"]
    Waiting.tool_seconds = asked["tool_seconds"]
    tasks = [Task.make(f"t{i}", split="test", seed=i, payload={"i": i, "turns": turns}) for i in range(count)]
    player = LocalPlayer(lambda: Waiting(sandbox=None), lambda task: Thinking(task, think), LIMITS)
    late: list[float] = []
    Waiting.late.clear()
    try:
        work = asyncio.gather(*(player.play(t, id=t.id, group="g", seed=t.seed) for t in tasks))
        played, wall, used = await timed(work, late)
    finally:
        await player.close()
    ideal = turns * (asked["tool_seconds"] + think)
    whole = sum(len(t.turns) == turns and reaches(t.reward) for t in played)
    lag = {
        f"{name}_lag_ms_p{share}": round(1000 * percentile(values, share / 100), 2)
        for name, values in (("players", late), ("environments", Waiting.late)) for share in (50, 99)
    }  # fmt: skip
    return {
        "side": "ours", "episodes": count, "turns": turns, "think_seconds": think, "seconds": wall, "cpu_seconds": used,
        "share_of_ideal": ideal / wall, "turns_per_second": count * turns / wall, "whole": whole,
        "different_episodes": len({t.task.id for t in played}), **lag,
    }  # fmt: skip


async def scripted(asked: dict[str, Any]) -> dict[str, Any]:
    """Play an environment's experts, ``at_once`` at a time, for so many seconds.

    Tasks with neither an expert nor a gold answer, as two generators of reasoning-gym make them, are left out.
    """
    spec = registry.spec(asked["env"])
    pool, numbers = spec.tasks(spec.splits[-1]), itertools.count()
    unanswered: set[str] = set()
    player = LocalPlayer(
        env_maker(spec, sandbox=asked["sandbox"], kwargs={}),
        lambda task: ScriptPolicy(script_for(spec, task, "main"), task), LIMITS,
    )  # fmt: skip
    late: list[float] = []

    async def worker(more: Callable[[int], bool]) -> list[Trajectory]:
        played: list[Trajectory] = []
        while more(i := next(numbers)):
            task = pool[i % len(pool)]
            if expert_of(spec, task) is None and spec.gold(task) is None:
                unanswered.add(task.id)
            else:
                played.append(await player.play(task, id=f"e{i}", group="g", seed=i))
        return played

    async def round_of(seconds: float) -> list[Trajectory]:
        end, least = time.perf_counter() + seconds, next(numbers) + asked["at_once"]
        found = await asyncio.gather(
            *(worker(lambda i: i <= least or time.perf_counter() < end) for _ in range(asked["at_once"]))
        )
        return [trajectory for part in found for trajectory in part]

    try:
        await round_of(0.0)  # sandboxes start, modules are imported
        played, wall, used = await timed(round_of(asked["seconds"]), late)
    finally:
        await player.close()
    turns = sum(len(t.turns) for t in played)
    return {
        "env": asked["env"], "at_once": asked["at_once"], "episodes": len(played), "seconds": wall, "cpu_seconds": used,
        "episodes_per_second": len(played) / wall, "turns_per_second": turns / wall,
        "solved": sum(reaches(t.reward) for t in played), "tasks_without_answer": sorted(unanswered),
        "players_lag_ms_p99": round(1000 * percentile(late, 0.99), 2) if late else 0.0,
    }  # fmt: skip


def handle(asked: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(thousand(asked) if asked["side"] == "ours" else scripted(asked))


if __name__ == "__main__":
    sys.exit(serve(handle))
