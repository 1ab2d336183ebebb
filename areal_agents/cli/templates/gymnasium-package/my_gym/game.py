"""The game, as a plain ``gymnasium.Env`` over text. It knows nothing of areal-agents."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
from gymnasium.spaces import Text

HIGHEST, GUESSES = 100, 8


class GuessGame(gymnasium.Env[str, str]):
    """Find a hidden number: each guess is answered with higher or lower."""

    observation_space = action_space = Text(1000, min_length=0, charset=string.printable)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.hidden = int(self.np_random.integers(1, HIGHEST + 1))
        self.left = GUESSES
        return f"Find my number, from 1 to {HIGHEST}. You have {GUESSES} guesses. Say a number and nothing else.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        said = action.strip()
        self.left -= 1
        if said.isascii() and said.isdigit() and len(said) <= 3:
            if int(said) == self.hidden:
                return "Found.", 1.0, True, False, {}
            answer = f"{said} is too {'low' if int(said) < self.hidden else 'high'}."
        else:
            answer = "That is no number."
        return f"{answer} {self.left} guesses left.", 0.0, self.left == 0, False, {}
