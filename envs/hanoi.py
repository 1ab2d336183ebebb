"""``areal/Hanoi-v0``: the tower of Hanoi, from any position to any peg."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
SHAPED = 0.5
"""What the moves of a solved puzzle earn together. The rest is paid at the end."""
PEGS = "ABC"
Peg = Literal["A", "B", "C"]


@dataclass
class Tower:
    """A position: the peg of each disc, the smallest first."""

    on: list[str]
    moves_left: int

    def top(self, peg: str) -> int | None:
        """Return the smallest disc on a peg, or None where it is empty."""
        return next((disc for disc, at in enumerate(self.on) if at == peg), None)

    def view(self) -> str:
        """Write each peg from its bottom to its top; disc 1 is the smallest."""
        pegs = {peg: [str(disc + 1) for disc, at in reversed(list(enumerate(self.on))) if at == peg] for peg in PEGS}
        return "; ".join(f"{peg}: {' '.join(discs) or 'empty'}" for peg, discs in pegs.items())


def moves_needed(on: Sequence[str], goal: str) -> int:
    """Return the least number of moves that bring every disc to ``goal``.

    The largest disc that lies elsewhere moves once, when all smaller ones are on the third peg; and from there a tower
    of k discs takes 2^k - 1 moves.
    """
    moves, target = 0, goal
    for disc in range(len(on) - 1, -1, -1):
        if on[disc] != target:
            moves += 2**disc
            target = next(peg for peg in PEGS if peg not in (on[disc], target))
    return moves


def next_move(on: Sequence[str], goal: str) -> tuple[str, str]:
    """Return the first move of a shortest way: the peg to take a disc from, and the peg to put it on."""
    move, target = ("", ""), goal
    for disc in range(len(on) - 1, -1, -1):
        if on[disc] != target:
            move = (on[disc], target)
            target = next(peg for peg in PEGS if peg not in move)
    return move


def solved(episode: Episode) -> Verdict:
    done = float(set(episode.state.on) == {episode.task.payload["goal"]})
    return Verdict((1 - SHAPED) * done, {"won": done})


class Hanoi(ToolEnv):
    """Bring all discs to one peg. An agent must learn to plan backwards: the largest disc first, others off its way.

    A move earns the share of the way that it makes, 0.5 × (moves needed before - after) / moves needed at the start. A
    step back is charged, so going round in circles earns nothing. The solved puzzle pays the other half. There are half
    as many moves again as needed, and two. ``difficulty``: 2 discs at 0, 3 at 0.5 (the default), 5 at 1.
    """

    system_prompt = "Move one disc at a time, from the top of a peg to another one, never onto a smaller disc."
    rubric = solved
    max_turns = 64
    chance = by_level(0.21, 0.03, 0.0)
    state: Tower

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        discs = round(2 * 2.5**level)
        return drawn_tasks("areal/Hanoi-v0", split, level, lambda rng: _position(rng, discs), buckets=2)

    def new_state(self, task: Task) -> Tower:
        return Tower(task.payload["on"], task.payload["moves"])

    def prompt(self, task: Task) -> str:
        p = task.payload
        return f"{Tower(p['on'], 0).view()}. Bring all to {p['goal']} in {p['moves']} moves. Disc 1 is the smallest."

    @tool()
    async def move(self, start: Peg, end: Peg) -> str:
        """Move the top disc of a peg to another peg."""
        tower, goal = self.state, self.task.payload["goal"]
        disc, below = tower.top(start), tower.top(end)
        if disc is None:
            raise ToolError(f"{start} is empty. {tower.view()}")
        if start == end:
            raise ToolError(f"the disc is on {end} already. {tower.view()}")
        if below is not None and below < disc:
            raise ToolError(f"disc {disc + 1} is larger than disc {below + 1} on {end}. {tower.view()}")
        before = moves_needed(tower.on, goal)
        tower.on[disc] = end
        tower.moves_left -= 1
        after = moves_needed(tower.on, goal)
        self.reward_turn(SHAPED * (before - after) / moves_needed(self.task.payload["on"], goal), "way")
        if not after or not tower.moves_left:
            self.end_episode()
        return f"{tower.view()}. {tower.moves_left} moves left."

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Go a shortest way."""
        tower = Tower(list(task.payload["on"]), 0)
        while moves_needed(tower.on, task.payload["goal"]):
            start, end = next_move(tower.on, task.payload["goal"])
            disc = tower.top(start)
            assert disc is not None
            tower.on[disc] = end
            yield call_text("move", start=start, end=end)


def _position(rng: Random, discs: int) -> dict[str, Any]:
    while True:
        on, goal = [rng.choice(PEGS) for _ in range(discs)], rng.choice(PEGS)
        if needed := moves_needed(on, goal):
            return {"on": on, "goal": goal, "moves": math.floor(1.5 * needed) + 2}
