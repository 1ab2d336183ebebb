"""The environment ``my_game/Cellar-v0``: find the key, open the vault, and do not fall into the pit."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from typing import Literal

from areal_agents import Episode, Message, Task, ToolEnv, ToolError, Verdict, tool

from .tasks import LEVELS, tasks_of
from .world import World, path

KEY_REWARD = 0.1
"""What the turn earns that takes the key. Whoever only takes the key earns it too, so it is far below 1."""


def rubric(episode: Episode) -> Verdict:
    """Return 1 for the open vault. What tools paid comes to it."""
    opened = float(episode.state.opened)
    return Verdict(opened, {"opened": opened})


class Cellar(ToolEnv):
    """Each turn acts in the world by tools. The difficulty, in [0, 1], is the level: two to seven moves."""

    system_prompt = "You play an adventure. Find the key, bring it to the vault and open it. Act by tools."
    rubric = rubric
    max_turns = 12
    state: World

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return tasks_of(split, 1 if difficulty is None else 1 + round((len(LEVELS) - 1) * difficulty))

    def new_state(self, task: Task) -> World:
        return World.of(task.payload)

    def prompt(self, task: Task) -> str:
        pit = self.state.pit
        return self.state.describe() + (f" Beware of the {pit}: its floor is gone." if pit else "")

    @tool()
    async def go(self, direction: Literal["north", "south", "east", "west"]) -> str:
        """Walk to the next room."""
        world = self.state
        if direction not in world.exits[world.at]:  # refuse first, act then: an error must change nothing
            raise ToolError(f"there is no exit to the {direction}")
        world.at = world.exits[world.at][direction]
        if world.at == world.pit:
            self.end_episode()
            return "You fall into the pit. The game is lost."
        return world.describe()

    @tool()
    async def take_key(self) -> str:
        """Take the key that is in the room."""
        world = self.state
        if world.has_key or world.at != world.key:
            raise ToolError("there is no key here")
        world.has_key = True
        self.reward_turn(KEY_REWARD, "key")
        return "You have the key."

    @tool()
    async def open_vault(self) -> str:
        """Open the vault in the room with the key."""
        world = self.state
        if world.at != world.vault:
            raise ToolError("there is no vault here")
        if not world.has_key:
            raise ToolError("the vault is locked, and you have no key")
        world.opened = True
        self.end_episode()
        return "The vault opens. The game is won."

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        """Demonstrate the shortest way, for the warm start and for `areal-agents check`."""
        p = task.payload
        for way in path(p["exits"], p["start"], p["key"], p["pit"]):
            yield call("go", direction=way)
        yield call("take_key")
        for way in path(p["exits"], p["key"], p["vault"], p["pit"]):
            yield call("go", direction=way)
        yield call("open_vault")


def call(name: str, **arguments: str) -> str:
    """Return the text of a tool call."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
