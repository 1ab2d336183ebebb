"""``areal/HiddenNumber-v0``: find a number by questions that are answered "higher" or "lower"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Message, Task

DEFAULT_DIFFICULTY = 0.5
SHAPED = 0.5
"""What the turns of a won game earn together. The rest is paid at the end."""


@dataclass
class Search:
    """What is still possible: the numbers from low to high."""

    low: int
    high: int
    guesses_left: int
    found: bool = False


def won(episode: Episode) -> Verdict:
    found = float(episode.state.found)
    return Verdict((1 - SHAPED) * found, {"won": found})


class HiddenNumber(ToolEnv):
    """Guess a number. An agent must learn to halve what is still possible, which takes memory of every answer so far.

    A guess earns the share of the uncertainty that it removes, log(before / after) / log(all), times 0.5. Over a won
    game that is 0.5, however it was won, so no way of guessing earns more by turns than another; finding the number
    pays the other half. Repeating a guess earns nothing. Guesses are as many as halving needs, and one more.
    ``difficulty``: there are 10 numbers at 0, 100 at 0.5 (the default), 1,000 at 1. The first of them is any.
    """

    system_prompt = "Find the hidden number by guessing."
    rubric = won
    max_turns = 16
    chance = by_level(0.77, 0.3, 0.19)
    state: Search

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/HiddenNumber-v0", split, level, lambda rng: _hidden(rng, level))

    def new_state(self, task: Task) -> Search:
        return Search(task.payload["low"], task.payload["high"], task.payload["guesses"])

    def prompt(self, task: Task) -> str:
        p = task.payload
        return f"The number is from {p['low']} to {p['high']}. You have {p['guesses']} guesses."

    @tool()
    async def guess(self, number: int) -> str:
        """Guess the number."""
        lowest, highest, hidden = (self.task.payload[name] for name in ("low", "high", "number"))
        if not lowest <= number <= highest:
            raise ToolError(f"the number is from {lowest} to {highest}")
        s = self.state
        before = s.high - s.low + 1
        s.guesses_left -= 1
        if number == hidden:
            s.low = s.high = number
            s.found = True
        elif number < hidden:
            s.low = max(s.low, number + 1)
        else:
            s.high = min(s.high, number - 1)
        share = math.log(before / (s.high - s.low + 1)) / math.log(highest - lowest + 1)
        self.reward_turn(SHAPED * share, "narrowed")
        if s.found or not s.guesses_left:
            self.end_episode()
        if s.found:
            return "Found."
        return f"{'higher' if number < hidden else 'lower'}, {s.guesses_left} left"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Halve what is possible."""
        low, high = task.payload["low"], task.payload["high"]
        while True:
            number = (low + high) // 2
            observation = yield call_text("guess", number=number)
            answer = _last(observation)
            if answer.startswith("higher"):
                low = number + 1
            elif answer.startswith("lower"):
                high = number - 1
            else:
                return


def _last(observation: Sequence[Message]) -> str:
    return observation[-1].text if observation else ""


def _hidden(rng: Random, difficulty: float) -> dict[str, Any]:
    """Draw a range that begins anywhere, so that the numbers of one split say nothing of the other's."""
    count = round(10 ** (1 + 2 * difficulty))
    low = rng.randint(1, 9 * max(count, 100))  # of few numbers and few ranges, most tasks would be the same
    guesses = math.ceil(math.log2(count + 1)) + 1
    return {"low": low, "high": low + count - 1, "number": rng.randint(low, low + count - 1), "guesses": guesses}
