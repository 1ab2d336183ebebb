"""The environment ``my_gym/Guess-v0``: the game in a process of its own, an episode each."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import ClassVar

from areal_agents import Message, Task, TextProcessEnv

from .game import HIGHEST


class Guess(TextProcessEnv):
    """Find a number by higher and lower. The model must halve what is left."""

    entry_point = "my_gym.game:GuessGame"  # or a Gymnasium id
    system_prompt = "You play a guessing game."
    sizes: ClassVar[Mapping[str, int]] = {"train": 1000, "test": 100}  # a task is a seed, and no seed is in two splits
    chance = 0.08  # eight of a hundred numbers

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        """Demonstrate ``task`` for the warm start, by what is answered."""
        low, high = 1, HIGHEST
        while True:
            guess = (low + high) // 2
            observation = yield str(guess)
            found = re.match(r"\d+ is too (low|high)", observation[-1].text) if observation else None
            if found is None:
                return
            low, high = (guess + 1, high) if found[1] == "low" else (low, guess - 1)
