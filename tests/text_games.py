"""Text environments as other packages have them, in a module that imports little: each is imported by a process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import gymnasium
import numpy as np

from areal_agents.spaces import TextSpace


class Dice:
    """An environment in GEM's style: no gymnasium.Env, ``reset`` without options, the global generator."""

    def __init__(self, sides: int = 6) -> None:
        self.sides = sides
        self.colour = random.choice(["red", "green", "blue", "black", "white"])

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.thrown = random.randint(1, self.sides)  # seeded by nobody here
        return f"1 to {self.sides}?", {}

    def step(self, action: str) -> tuple[Any, ...]:
        match action:
            case "done":
                return "", 0.0, True, {}
            case "limit":
                return "too long", 0.25, False, True, {}
            case "both":
                return "at the limit", 1.0, True, True, {}
            case "hang":
                time.sleep(3600)
            case "raise":
                raise KeyError("lost")
            case "die":
                os._exit(3)
            case "exit":
                sys.exit("enough")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)  # as a machine without memory does
            case "hang up":
                os.closerange(3, 100)
                time.sleep(3600)
            case "input":
                return input(), 0.0, False, False, {}
            case "cat":
                return subprocess.run("cat", stdout=subprocess.PIPE, check=True).stdout.decode(), 0.0, False, False, {}
            case "colour":
                return self.colour, 0.0, False, False, {}
            case "spawn":
                return str(subprocess.Popen(["sleep", "600"]).pid), 0.0, False, False, {}
            case "hash":
                return str(hash("a text")), 0.0, False, False, {}
            case "print":
                print("noise")
                return "quiet", 0.0, False, False, {}
        hit = action == str(self.thrown)
        return f"it was {self.thrown}", np.float64(hit), np.bool_(hit), False, {}


def make_dice(sides: int) -> Dice:
    """What stands for ``gem.make``: a function that makes an environment."""
    return Dice(sides)


class Registered(gymnasium.Env[str, str]):
    def __init__(self) -> None:
        self.observation_space = self.action_space = TextSpace()  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return str(self.np_random.integers(1000)), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return action, 0.0, False, False, {}


gymnasium.register("tests/Registered-v0", entry_point="tests.text_games:Registered", disable_env_checker=True)
