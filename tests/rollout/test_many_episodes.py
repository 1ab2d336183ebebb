"""A thousand episodes at once on one process: each is whole, none is lost, and none sees anything of another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from areal_agents.env import Expert
from areal_agents.errors import EnvError
from areal_agents.reward import Episode
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.tool import call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Observation, Task

EPISODES, TURNS = 1000, 3
LIMITS = Limits(
    max_context=1 << 30, max_turn_tokens=1 << 30, max_episode_tokens=1 << 30, max_turns=100, step_timeout=120.0,
    request_timeout=120.0,
)  # fmt: skip


def sum_of_its_own(episode: Episode) -> float:
    i = episode.task.payload["i"]
    return float(episode.state["added"] == [i + turn for turn in range(TURNS)]) + float(i)


class Adding(ToolEnv):
    """Adds numbers, and lets other episodes go on between any two steps."""

    rubric = sum_of_its_own

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"i": i}) for i in range(EPISODES)]

    def prompt(self, task: Task) -> str:
        return f"Begin with {task.payload['i']}."

    def new_state(self, task: Task) -> dict[str, Any]:
        return {"added": []}

    @tool()
    async def add(self, number: int) -> str:
        """Add a number."""
        for _ in range(self.task.seed % 7):
            await asyncio.sleep(0)
        if number == 666:
            raise RuntimeError("a fault of the environment's own")
        self.state["added"].append(number)
        await asyncio.sleep(0)
        if len(self.state["added"]) == TURNS:
            self.end_episode()
        return f"{self.task.id}: {self.state['added']}"


def counting(first: Observation) -> Expert:
    """Say what the episode was shown, and go on from it."""
    number = int(first[-1].text.split()[-1].rstrip("."))
    for turn in range(TURNS):
        yield call_text("add", number=number + turn)


def test_a_thousand_episodes_at_once() -> None:
    async def main() -> None:
        player = LocalPlayer(lambda: Adding(sandbox=None), lambda task: ScriptPolicy(counting, task), LIMITS)
        tasks = [task for task in Adding.tasks("train") if task.payload["i"] != 665]  # whose second number is 666
        rest = [task for task in tasks if not 664 <= task.payload["i"] <= 666]
        played = await asyncio.gather(*(player.play(t, id=t.id, group=f"g{t.seed}", seed=t.seed) for t in rest))
        assert player._host._calls == set()
        assert player._host._open == set()
        await player.close()
        assert [t.id for t in played] == [t.id for t in rest]
        for task, episode in zip(rest, played, strict=True):
            i = task.payload["i"]
            assert (episode.reward, episode.group, len(episode.turns)) == (1.0 + i, f"g{i}", TURNS)
            shown = [message.text for turn in episode.turns[1:] for message in turn.observation]
            assert shown == [f"{task.id}: {[i + k for k in range(turn)]}" for turn in range(1, TURNS)]
            assert [m.text for m in episode.final_observation] == [f"{task.id}: {[i + k for k in range(TURNS)]}"]

    asyncio.run(main())


def test_those_that_fail_or_are_cancelled_are_no_others() -> None:
    """Of 300 episodes three raise and every fifth is cancelled in the middle; all others are as if alone."""

    async def main() -> None:
        player = LocalPlayer(lambda: Adding(sandbox=None), lambda task: ScriptPolicy(counting, task), LIMITS)
        tasks = Adding.tasks("train")[500:800]
        running = {t.id: asyncio.create_task(player.play(t, id=t.id, group="g", seed=t.seed)) for t in tasks}
        await asyncio.sleep(0)
        cancelled = [t.id for t in tasks[::5]]
        for id in cancelled:
            running[id].cancel()
        ends = dict(zip(running, await asyncio.gather(*running.values(), return_exceptions=True), strict=True))
        await player.close()
        faulty = [f"train-{i}" for i in (664, 665, 666)]  # which add the number 666 sooner or later
        for task in tasks:
            end = ends[task.id]
            if task.id in cancelled:
                assert isinstance(end, asyncio.CancelledError)
            elif task.id in faulty:
                assert isinstance(end, EnvError)
                assert "a fault of the environment's own" in str(end)
            else:
                assert not isinstance(end, BaseException)
                assert end.reward == 1.0 + task.payload["i"]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["returns", "raises", "cancels itself", "hangs"])
def test_each_of_many_calls_gets_its_own_end(how: str) -> None:
    from areal_agents.rollout.env_host import EnvHost

    async def main() -> None:
        host = EnvHost()

        def make(i: int) -> Any:
            async def work() -> int:
                for _ in range(i % 5):
                    await asyncio.sleep(0)
                if i % 10 == 3:
                    if how == "raises":
                        raise KeyError(i)
                    if how == "cancels itself":
                        raise asyncio.CancelledError
                    if how == "hangs":
                        await asyncio.Event().wait()
                return i

            return work

        calls = [host.call(make(i), timeout=0.5 if how == "hangs" and i % 10 == 3 else 120.0, what=f"call {i}")
                 for i in range(200)]  # fmt: skip
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert host._calls == set()
        await host.close()
        for i, end in enumerate(ends):
            if i % 10 != 3 or how == "returns":
                assert end == i
            elif how == "raises":
                assert isinstance(end, KeyError)
                assert end.args == (i,)
            else:
                assert isinstance(end, EnvError)
                word = "was cancelled by its own environment" if how == "cancels itself" else "did not return within"
                assert f"call {i} {word}" in str(end)

    asyncio.run(main())
