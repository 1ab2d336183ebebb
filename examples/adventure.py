"""A text adventure in one file: tools that keep state, rewards of turns beside a rubric, levels, an expert.

    cd examples
    areal-agents check adventure:Keep --difficulty 1
    areal-agents train --env.id adventure:Keep --warm_start.demonstrations 64 --eval.n 32 --steps 20 --out runs/keep

The crown lies in a locked vault. The key lies elsewhere, and the lamp burns for so many moves. ``docs/write-a-game.md``
explains each part.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from areal_agents import Episode, Message, Task, ToolEnv, ToolError, Verdict, tool

ROOMS = ("hall", "kitchen", "cellar", "tower", "chapel", "attic", "stable", "library", "pantry", "study", "crypt")
SIZES = {"train": 128, "test": 32}
BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}
Way = Literal["north", "south", "east", "west"]
Doors = Mapping[str, Mapping[str, str]]
"""Room → direction → the next room."""


@dataclass
class World:
    """The state of one game, which its tools change."""

    doors: Doors
    things: dict[str, list[str]]
    lamp: int
    """Moves that are left."""
    at: str = "gate"
    bag: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=lambda: ["gate"])
    unlocked: bool = False

    def view(self) -> str:
        """Say what can be seen."""
        doors = ", ".join(f"{way} to the {room}" for way, room in sorted(self.doors[self.at].items()))
        here = ", ".join(self.things[self.at]) or "nothing"
        return f"You are in the {self.at}. Doors: {doors}. Here: {here}. Your lamp burns for {self.lamp} moves."


@tool
async def inventory(*, state: World) -> list[str]:
    """See what you carry."""
    return state.bag


def rubric(episode: Episode) -> Verdict:
    """Return 1 for the crown at the gate. What tools paid comes to it."""
    world = episode.state
    won = float(world.at == "gate" and "crown" in world.bag)
    return Verdict(won, {"won": won, "rooms_seen": len(world.seen) / len(world.doors)})


class Keep(ToolEnv):
    """Carry the crown out of a keep. The difficulty, from 0 to 1, is its size: 3 to 7 rooms."""

    system_prompt = "You explore a keep, by tools. Find the key, unlock the vault, and carry the crown to the gate."
    tools = (inventory,)
    rubric = rubric
    max_turns = 32
    state: World

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return keeps(split, 3 + round(4 * (difficulty or 0)))

    def new_state(self, task: Task) -> World:
        return World(task.payload["doors"], task.payload["things"], lamp=task.payload["lamp"])

    def prompt(self, task: Task) -> str:
        return self.state.view()

    @tool
    async def go(self, way: Way) -> str:
        """Walk through a door."""
        world = self.state
        room = world.doors[world.at].get(way)  # refuse first, act then: an error must change nothing
        if room is None:
            raise ToolError("there is no door that way")
        if room == "vault" and not world.unlocked:
            raise ToolError("the vault is locked")
        world.at, world.lamp = room, world.lamp - 1
        if room not in world.seen:
            world.seen.append(room)
            self.reward_turn(0.01, "new_room")
        if room == "gate" and "crown" in world.bag:
            self.end_episode()
            return "You are out, with the crown."
        if world.lamp == 0:
            self.end_episode()
            return "Your lamp goes out. You are lost."
        return world.view()

    @tool
    async def take(self, thing: str) -> str:
        """Take something that lies here."""
        here = self.state.things[self.state.at]
        if thing not in here:
            raise ToolError(f"no {thing} here; there is {', '.join(here) or 'nothing'}")
        here.remove(thing)
        self.state.bag.append(thing)
        self.reward_turn(0.05, thing)
        return f"You have the {thing}."

    @tool
    async def unlock(self) -> str:
        """Unlock the vault, from a room beside it."""
        if "key" not in self.state.bag:
            raise ToolError("you have no key")
        if "vault" not in self.state.doors[self.state.at].values():
            raise ToolError("the vault is not beside this room")
        self.state.unlocked = True
        return "The vault is open."

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        """Play the shortest game. What is sent are the messages of the turn before, which this expert need not read."""
        yield call("inventory")
        for name, arguments in winning(task.payload["doors"], task.payload["things"]):
            yield call(name, **arguments)


def call(name: str, **arguments: str) -> str:
    """Return the text of a tool call."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@cache
def keeps(split: str, count: int) -> tuple[Task, ...]:
    """Return the first keeps of ``count`` rooms of a split. Their content decides, so no keep is in both splits."""
    found: dict[str, Task] = {}
    for seed in itertools.count():
        task = Task.make(f"{split}-{count}-{seed}", split=split, seed=seed, payload=keep(seed, count))
        if (int(task.content_hash[:8], 16) % 5 == 0) == (split == "test"):
            found.setdefault(task.content_hash, task)
        if len(found) == SIZES[split]:
            break
    return tuple(found.values())


def keep(seed: int, count: int) -> dict[str, Any]:
    """Draw a tree of rooms with the vault at a leaf, and a lamp for the shortest game and four moves more."""
    rng = random.Random(f"{seed} {count}")
    rooms = ["gate", *rng.sample(ROOMS, count - 2), "vault"]
    doors: dict[str, dict[str, str]] = {room: {} for room in rooms}
    for i, room in enumerate(rooms[1:], 1):
        free = [(other, way) for other in rooms[:i] for way in BACK if way not in doors[other]]
        other, way = rng.choice(free)
        doors[other][way], doors[room][BACK[way]] = room, other
    things: dict[str, list[str]] = {room: [] for room in rooms}
    things[rng.choice(rooms[1:-1])].append("key")
    things["vault"].append("crown")
    moves = sum(name == "go" for name, _ in winning(doors, things))
    return {"doors": doors, "things": things, "lamp": moves + 4}


def winning(doors: Doors, things: Mapping[str, Sequence[str]]) -> list[tuple[str, dict[str, str]]]:
    """Return the calls of the shortest game."""
    key = next(room for room, here in things.items() if "key" in here)
    door = next(iter(doors["vault"].values()))
    calls: list[tuple[str, dict[str, str]]] = []
    for start, goal, deed in (
        ("gate", key, ("take", {"thing": "key"})),
        (key, door, ("unlock", {})),
        (door, "vault", ("take", {"thing": "crown"})),
    ):
        calls += [*(("go", {"way": way}) for way in path(doors, start, goal)), deed]
    return calls + [("go", {"way": way}) for way in path(doors, "vault", "gate")]


def path(doors: Doors, start: str, goal: str) -> list[str]:
    """Return the directions of the shortest walk."""
    queue, reached = deque([(start, list[str]())]), {start}
    while queue:
        room, ways = queue.popleft()
        if room == goal:
            return ways
        for way, following in sorted(doors[room].items()):
            if following not in reached:
                reached.add(following)
                queue.append((following, [*ways, way]))
    raise ValueError(f"there is no walk from {start} to {goal}")
