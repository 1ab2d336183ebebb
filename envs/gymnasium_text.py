"""``areal/GymnasiumText-v0``: any ``gymnasium.Env``, or one in GEM's style, whose observations and actions are texts.

    areal-agents eval areal/GymnasiumText-v0 --env.kwargs.env textgames.guess:Guess --model smollm2
    [env]
    id = "areal/GymnasiumText-v0"
    kwargs = { env = "gem:make", env_kwargs = { env_id = "game:Mastermind-v0-easy" } }

``env`` is a Gymnasium id, or ``module:name`` of a class, or of a function that makes one. It is reset with the task's
seed and plays in a process of its own (``forked_game.py``). ``terminated`` and ``truncated`` are its own, and its last
observation is shown. An environment that only says ``done`` is refused, since nobody knows which of the two it means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from areal_agents.context import ContextLike
from areal_agents.env import LazyTasks
from areal_agents.envs.forked_game import TEST_SEEDS_FROM, ForkedGame
from areal_agents.errors import ConfigError, TaskError
from areal_agents.spaces import TextSpace
from areal_agents.types import Task
from areal_agents.utils.short_text import short

ID = "areal/GymnasiumText-v0"
SAMPLE = "areal_agents.envs.gymnasium_text:Repeat"


class Repeat(gymnasium.Env[str, str]):
    """A game to try the adapter with: say a number twice."""

    def __init__(self) -> None:
        self.observation_space = self.action_space = TextSpace()  # type: ignore[assignment]
        self._word = ""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._word = _word(self.np_random)
        return f"Say {self._word} twice.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action.split() == [self._word] * 2
        return ("Right." if right else "Wrong."), float(right), True, False, {}


class GymnasiumText(ForkedGame):
    """Play a text environment of another package. What an agent must learn is that environment's to say."""

    def __init__(
        self,
        *,
        env: str = SAMPLE,
        env_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str = "",
        max_turns: int | None = None,
        step_timeout: float = 30.0,
        context: ContextLike | None = None,
    ) -> None:
        """Make an environment.

        Args:
            env: a Gymnasium id, or ``module:name`` of a class or function.
            env_kwargs: arguments of it, which must be JSON.
            system_prompt: shown before the first observation. Empty is none.
            max_turns: after which an episode is truncated, besides the environment's own limit.
            step_timeout: seconds for one reset or step.
            context: as ``ForkedGame`` has it.
        """
        super().__init__(
            env, env_kwargs or {}, system_prompt=system_prompt, max_turns=max_turns, step_timeout=step_timeout,
            context=context,
        )  # fmt: skip
        self._source: dict[str, Any] = {"env": env, "env_kwargs": env_kwargs}

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        difficulty: float | None = None,
        env: str = SAMPLE,
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> Sequence[Task]:
        """Return the tasks of a split: seeds, which no two splits share.

        The difficulty is that of the environment, whatever is asked for: its arguments set it. Raises ConfigError for a
        split that is not there.
        """
        if split not in cls.sizes:
            raise ConfigError(f"{ID} has no split {split!r}: its splits are {', '.join(cls.sizes)}")
        first = 0 if split == "train" else TEST_SEEDS_FROM

        def make(i: int) -> Task:
            payload = {"env": env, "env_kwargs": dict(env_kwargs or {}), "seed": first + i}
            return Task.make(f"{split}-{i}", split=split, seed=first + i, payload=payload)

        return LazyTasks(cls.sizes[split], make)

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def require_own(self, task: Task) -> None:
        given = task.payload.get("env_kwargs", self._arguments)
        other = task.payload.get("env", self._entry), json.loads(json.dumps(given or {}))
        if other != (self._entry, self._arguments):
            raise TaskError(
                f"task {task.id!r} belongs to {_named(*other)}, and this environment plays "
                f"{_named(self._entry, self._arguments)}"
            )

    @classmethod
    def gold(cls, task: Task) -> str | None:
        """Return what the sample wants to hear. Of others nobody knows it."""
        if task.payload["env"] != SAMPLE:
            return None
        word = _word(gymnasium.utils.seeding.np_random(task.payload["seed"])[0])
        return f"{word} {word}"


def _named(env: object, arguments: Mapping[str, Any]) -> str:
    return short(env) + (f" with {short(arguments)}" if arguments else "")


def _word(rng: np.random.Generator) -> str:
    return str(rng.integers(1000, 10000))
