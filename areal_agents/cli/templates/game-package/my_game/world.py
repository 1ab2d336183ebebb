"""The world: rooms with exits, a key, a vault and a pit. It knows nothing of models or rewards."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass
class World:
    """The state of one game. The tools change it."""

    exits: dict[str, dict[str, str]]
    """Room → direction → the next room."""
    at: str
    key: str
    """The room that the key lies in."""
    vault: str
    """The room with the vault."""
    pit: str | None
    """The room that ends the game, where there is one."""
    has_key: bool = False
    opened: bool = False

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> World:
        """Make the world that a task begins with."""
        return cls(payload["exits"], payload["start"], payload["key"], payload["vault"], payload["pit"])

    def describe(self) -> str:
        """Say what can be seen in the room."""
        ways = ", ".join(f"{way} to the {room}" for way, room in sorted(self.exits[self.at].items()))
        things = ["a key"] * (self.at == self.key and not self.has_key) + ["the vault"] * (self.at == self.vault)
        return f"You are in the {self.at}. Here: {', '.join(things) or 'nothing'}. Exits: {ways}."


def path(exits: Mapping[str, Mapping[str, str]], start: str, goal: str, avoid: str | None) -> list[str]:
    """Return the directions of the shortest way from ``start`` to ``goal``."""
    queue, seen = deque([(start, list[str]())]), {start, avoid}
    while queue:
        room, ways = queue.popleft()
        if room == goal:
            return ways
        for way, following in sorted(exits[room].items()):
            if following not in seen:
                seen.add(following)
                queue.append((following, [*ways, way]))
    raise ValueError(f"there is no way from {start} to {goal}")
