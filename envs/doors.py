"""``areal/Doors-v0`` and ``areal/DoorsAtTheEnd-v0``: a long way through doors, paid at each door or at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
Colour = Literal["red", "blue", "green", "black", "white", "brown", "pink", "grey"]
KEYS = ("iron", "brass", "silver", "gold", "bone", "glass", "stone", "wood")
Key = Literal["iron", "brass", "silver", "gold", "bone", "glass", "stone", "wood"]
Pay = Literal["turn", "end"]


@dataclass
class Way:
    """The doors, and how many are open."""

    doors: list[str]
    tries_left: int
    pay: Pay
    opened: int = 0


def arrived(episode: Episode) -> Verdict:
    """Pay the share of the doors that are open, where the doors themselves did not."""
    way = episode.state
    share = way.opened / len(way.doors)
    return Verdict(share if way.pay == "end" else 0.0, {"doors": share, "won": float(share == 1)})


class Doors(ToolEnv):
    """Open door after door, each with the key that the first message names for its colour.

    An agent must learn to look a key up in a table far back, turn after turn, and to go on after a failure. A key that
    does not fit costs a try, and no door falls shut. Each door pays 1 / doors when it opens; with ``pay = "end"`` the
    same sum comes with the last turn, so both twins have the same returns, and differ in nothing but when they say so.
    ``difficulty``: 4 doors at 0, 12 at 0.5 (the default), 20 at 1; a quarter more tries than doors.
    """

    system_prompt = "Open every door with the key for its colour."
    rubric = arrived
    max_turns = 32
    chance = by_level(0.16, 0.15, 0.16)
    state: Way

    def __init__(self, *, pay: Pay = "turn", **more: Any) -> None:
        """Make a way.

        Args:
            pay: ``turn`` or ``end``.
            more: of ``ToolEnv``.

        Raises:
            ConfigError: ``pay`` is neither.
        """
        super().__init__(**more)
        if pay not in ("turn", "end"):
            raise ConfigError(f"pay {pay!r}: there are 'turn' and 'end'")
        self._pay = pay

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Doors-v0", split, level, lambda rng: _doors(rng, 4 + round(16 * level)))

    def new_state(self, task: Task) -> Way:
        return Way(task.payload["doors"], task.payload["tries"], self._pay)

    def prompt(self, task: Task) -> str:
        p = task.payload
        table = ", ".join(f"{colour}: {key}" for colour, key in p["keys"].items())
        return (
            f"Keys: {table}. There are {len(p['doors'])} doors and {p['tries']} tries. You see a {p['doors'][0]} door."
        )

    @tool(name="open")
    async def open_door(self, key: Key) -> str:
        """Try a key on the door that you see."""
        way, p = self.state, self.task.payload
        way.tries_left -= 1
        fits = p["keys"][way.doors[way.opened]] == key
        way.opened += fits
        if fits and way.pay == "turn":
            self.reward_turn(1 / len(way.doors), "door")
        if way.opened == len(way.doors) or not way.tries_left:
            self.end_episode()
        if way.opened == len(way.doors):
            return "The last door opens."
        return f"{'It opens' if fits else 'It does not fit'}. You see a {way.doors[way.opened]} door."

    @classmethod
    def expert(cls, task: Task) -> Expert:
        for colour in task.payload["doors"]:
            yield call_text("open", key=task.payload["keys"][colour])


def _doors(rng: Random, count: int) -> dict[str, Any]:
    keys = dict(zip(COLOURS, rng.sample(KEYS, len(KEYS)), strict=True))
    doors = [rng.choice(COLOURS) for _ in range(count)]
    return {"keys": keys, "doors": doors, "tries": count + count // 4}
