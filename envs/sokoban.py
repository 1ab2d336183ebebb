"""``areal/Sokoban-v0``: push boxes onto goals in a small room."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.errors import EnvError
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
SHAPED = 0.5
"""What the boxes of a solved room earn when they reach their goals. The rest is paid at the end."""
SIZES: Final = {"train": 1024, "test": 256}
WAYS: Final[Mapping[str, tuple[int, int]]] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
MOST_STEPS = 12
"""Steps of one call."""
Place = tuple[int, int]


@dataclass
class Room:
    """A room: ``height`` × ``width`` places within its outer walls."""

    height: int
    width: int
    walls: frozenset[Place]
    goals: frozenset[Place]
    boxes: set[Place]
    player: Place
    steps_left: int = 0

    def free(self, place: Place) -> bool:
        inside = 0 <= place[0] < self.height and 0 <= place[1] < self.width
        return inside and place not in self.walls and place not in self.boxes

    def step(self, way: str) -> bool:
        """Take one step, which may push a box. Return False where something is in the way."""
        down, right = WAYS[way]
        ahead = (self.player[0] + down, self.player[1] + right)
        if ahead in self.boxes:
            behind = (ahead[0] + down, ahead[1] + right)
            if not self.free(behind):
                return False
            self.boxes.remove(ahead)
            self.boxes.add(behind)
        elif not self.free(ahead):
            return False
        self.player = ahead
        return True

    def placed(self) -> int:
        return len(self.boxes & self.goals)

    def view(self) -> str:
        """Draw the room: # wall, @ you, $ box, . goal, * box on a goal, + you on a goal."""
        rows = ["#" * (self.width + 2)]
        for y in range(self.height):
            rows.append("#" + "".join(self._sign((y, x)) for x in range(self.width)) + "#")
        return "\n".join([*rows, rows[0]])

    def _sign(self, place: Place) -> str:
        if place in self.walls:
            return "#"
        goal = place in self.goals
        if place == self.player:
            return "+" if goal else "@"
        if place in self.boxes:
            return "*" if goal else "$"
        return "." if goal else " "


def shortest(room: Room) -> str:
    """Return a shortest way that brings every box to a goal.

    Raises EnvError where there is none.
    """
    start = (room.player, frozenset(room.boxes))
    came: dict[Any, tuple[Any, str]] = {start: (None, "")}
    waiting = deque([start])
    while waiting:
        at = waiting.popleft()
        if at[1] == room.goals:
            ways: list[str] = []
            while came[at][0] is not None:
                at, way = came[at]
                ways.append(way)
            return "".join(reversed(ways))
        for way in WAYS:
            tried = Room(room.height, room.width, room.walls, room.goals, set(at[1]), at[0])
            if tried.step(way) and (after := (tried.player, frozenset(tried.boxes))) not in came:
                came[after] = (at, way)
                waiting.append(after)
    raise EnvError("this room has no solution")


def solved(episode: Episode) -> Verdict:
    room = episode.state
    done = float(room.placed() == len(room.goals))
    return Verdict((1 - SHAPED) * done, {"won": done})


class Sokoban(ToolEnv):
    """Push every box onto a goal. An agent must learn to read the map, and to look ahead: a box cannot be pulled.

    A box that comes onto a goal earns 0.5 / the boxes that were off theirs at the start, and one that leaves it pays
    that back. The solved room pays the other half. There are twice as many steps as a shortest way has, and four.
    ``difficulty``: one box in 4 × 4 at 0, in 5 × 5 at 0.5 (the default), two boxes in 6 × 6 at 1. A shortest way has at
    least as many steps as the room has rows.
    """

    system_prompt = (
        "Push all boxes onto the goals. Map: # wall, @ you, $ box, . goal, * box on a goal, + you on a goal. "
        "Steps: U up, D down, L left, R right. Walking into a box pushes it."
    )
    rubric = solved
    max_turns = 24
    chance = by_level(0.05, 0.02, 0.04)
    state: Room

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        size, boxes = 4 + round(2 * level), 1 + (level >= 0.75)
        return drawn_tasks(
            "areal/Sokoban-v0", split, level, lambda rng: _drawn(rng, size, boxes), SIZES, alike=_unturned
        )

    def new_state(self, task: Task) -> Room:
        return room_of(task)

    def prompt(self, task: Task) -> str:
        return f"{room_of(task).view()}\nYou have {task.payload['steps']} steps."

    @tool()
    async def walk(self, steps: str) -> str:
        """Take steps.

        Args:
            steps: letters, such as UULR; at most 12
        """
        if not re.fullmatch(f"[UDLR]{{1,{MOST_STEPS}}}", steps):
            raise ToolError(f"steps are 1 to {MOST_STEPS} of the letters U, D, L and R")
        room, said = self.state, ""
        before = room.placed()
        for number, way in enumerate(steps, 1):
            if not room.step(way):
                said = f"Step {number} ({way}) is blocked.\n"
                break
            room.steps_left -= 1
            if not room.steps_left or room.placed() == len(room.goals):
                break
        off = len(room.goals) - room_of(self.task).placed()
        self.reward_turn(SHAPED * (room.placed() - before) / off, "boxes")
        if said:
            room.steps_left -= 1  # a blocked step is one too
        if room.steps_left <= 0 or room.placed() == len(room.goals):
            self.end_episode()
        return f"{said}{room.view()}\n{max(0, room.steps_left)} steps left."

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Go a shortest way, a few steps a turn."""
        way = shortest(room_of(task))
        for i in range(0, len(way), 4):
            yield call_text("walk", steps=way[i : i + 4])


def room_of(task: Task) -> Room:
    """Read the room that a task's map draws."""
    rows = task.payload["map"]
    signs = {(y, x): sign for y, row in enumerate(rows) for x, sign in enumerate(row)}

    def where(some: Iterable[str]) -> set[Place]:
        return {place for place, sign in signs.items() if sign in some}

    (player,) = where("@+")
    return Room(
        len(rows), len(rows[0]), frozenset(where("#")), frozenset(where(".*+")), where("$*"), player,
        task.payload["steps"],
    )  # fmt: skip


def _unturned(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a room has in common with those that it is turned or mirrored."""
    rows, ways = list(payload["map"]), list[list[str]]()
    for _ in range(4):
        rows = ["".join(column) for column in zip(*reversed(rows), strict=True)]
        ways += [rows, rows[::-1]]
    return {"map": min(ways)}


def _drawn(rng: Random, size: int, boxes: int) -> dict[str, Any]:
    """Draw a solved room and go backwards from it, pulling boxes: so it can be solved."""
    while True:
        places = [(y, x) for y in range(size) for x in range(size)]
        rng.shuffle(places)
        walls, goals = frozenset(places[: size - 2]), frozenset(places[size - 2 : size - 2 + boxes])
        room = Room(size, size, walls, goals, set(goals), places[-1])
        _pull(room, rng)
        if room.placed():
            continue
        least = len(shortest(room))
        if least >= size:  # else it is one push from its end, or nearly
            lines = room.view().splitlines()[1:-1]
            return {"map": [line[1:-1] for line in lines], "steps": 2 * least + 4}


def _pull(room: Room, rng: Random) -> None:
    """Walk backwards at random, mostly with a box in tow."""
    for _ in range(12 * room.height):
        down, right = WAYS[rng.choice("UDLR")]
        back = (room.player[0] - down, room.player[1] - right)
        ahead = (room.player[0] + down, room.player[1] + right)
        if not room.free(back):
            continue
        if ahead in room.boxes and rng.random() < 0.9:
            room.boxes.remove(ahead)
            room.boxes.add(room.player)
        room.player = back
