"""A small text environment and a scripted policy, for tests of the code that runs episodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_agents.chat.format import ChatFormat
from areal_agents.env import AgentEnv
from areal_agents.errors import SandboxError
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.token_policy import TokenPolicy
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Info,
    Observation,
    Prompt,
    StopReason,
    Task,
    system,
    user,
)
from tests.tiny_tokenizer import CHATML, tiny

LIMITS = Limits(
    max_context=400, max_turn_tokens=20, max_episode_tokens=100, max_turns=8, step_timeout=60.0, request_timeout=60.0
)


FMT = ChatFormat(tiny(CHATML))


def task(i: int = 0, **payload: Any) -> Task:
    return Task.make(f"task-{i}", split="train", seed=i, payload={"i": i, **payload})


@dataclass
class Script:
    """What the environments of one test do and what was done to them; shared by all instances."""

    turns: int = 2
    reward: Any = 1.0
    on_step: Callable[[int], Any] = lambda k: None
    """Called with the turn's index; may raise."""
    made: int = 0
    closed: int = 0
    finished: list[StopReason] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    turn_rewards: list[Any] | None = None


class ScriptedEnv(AgentEnv):
    """Answers "next" until ``script.turns`` turns are played, then pays ``script.reward``."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.k = 0
        script.made += 1

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [task(i) for i in range(4)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.script.seeds.append(seed)
        return (system("play"), user(f"task {self.task.payload['i']}")), {"state_key": "k0"}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        result = self.script.on_step(self.k)
        if asyncio.iscoroutine(result):
            await result
        self.k += 1
        if self.k < self.script.turns:
            return (user("next"),), 0.0, False, False, {"state_key": f"k{self.k}"}
        info: Info = {"stop_reason": "answer", "components": {"correct": 1.0}}
        if self.script.turn_rewards is not None:
            info["turn_rewards"] = self.script.turn_rewards
        return (), self.script.reward, True, False, info

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        self.script.finished.append(reason)
        return 0.25, {"stop_reason": reason}

    async def aclose(self) -> None:
        self.script.closed += 1


class ScriptedPolicy(TokenPolicy):
    """Says the same ids every turn; ``version`` labels them."""

    def __init__(
        self,
        ids: tuple[int, ...],
        version: int = 0,
        limits: Limits = LIMITS,
    ) -> None:
        super().__init__(FMT, limits)
        self.ids, self.version = ids, version
        self.released: list[str] = []
        self.prompts: list[tuple[int, ...]] = []

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        self.prompts.append(prompt.ids)
        ids = self.ids[:max_tokens]
        finish = "stop" if len(ids) == len(self.ids) else "length"
        return Completion(ids, (-0.5,) * len(ids), (self.version,) * len(ids), finish)  # type: ignore[arg-type]

    async def close(self, episode: EpisodeDriver) -> None:
        self.released.append(episode.id)


def block_the_loop(seconds: float) -> None:
    """What an author should never do inside an async environment."""
    time.sleep(seconds)  # the very misbehaviour under test


def broken_sandbox(_: int) -> None:
    raise SandboxError("the sandbox died")
