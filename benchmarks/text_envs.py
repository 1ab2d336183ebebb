"""Environments of the benchmarks: text only, no sandbox, a reward that any completion earns some of.

    text_envs:SingleTurn    four fixed questions, one turn each        (trl_step.py)
    text_envs:LongPrompt    the same behind long instructions          (trl_step.py)
    text_envs:LongTail      turns with a long tail, a slow tool        (async.py)

``share_of`` is the reward on both sides of the comparison with TRL: it differs between completions, so that every
group has a gradient, and costs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

LETTER = "e"
SYSTEM = "Answer the question. Think step by step."
RULES = (
    "Read the question twice before you begin.", "Write down every number that it names, and what it counts.",
    "Say which of them the answer needs and which it does not.", "Do one operation a step, and write a step a line.",
    "Keep units beside numbers, and never add numbers of different units.", "Round nothing before the last step.",
    "If a number is missing, say so, and do not make one up.", "If there are several ways, take the shortest.",
    "Check each result by the inverse operation.", "When a check fails, go back to the step that it belongs to.",
    "Do not repeat the question, and do not comment on it.", "Use plain words and short sentences.",
    "Give no examples of your own.", "Do not ask anything back.", "Write numbers as digits.",
    "Put nothing behind the answer.", "A wrong answer that is well explained is still wrong.",
    "A right answer that is not explained counts in full.", "Stop as soon as you have it.",
    "Say the answer in a line of its own at the end.",
)  # fmt: skip
LONG_SYSTEM = " ".join((SYSTEM, *RULES))
"""Some 270 tokens: a prompt with it is more than four times as long as a completion of 64."""
SLOWEST_MS, FASTEST_MS = 500, 100
MOST_TURNS = 12
_MU, _SIGMA = 0.9, 0.8


def share_of(text: str) -> float:
    """The share of the letter e in ``text``; 0 where it is empty."""
    return text.count(LETTER) / max(len(text), 1)


def messages(question: str, instructions: str = SYSTEM) -> list[dict[str, str]]:
    """The conversation's opening, as chat templates take it."""
    return [{"role": "system", "content": instructions}, {"role": "user", "content": question}]


def turns_of(seed: int) -> int:
    """Turns of a task: log-normal (median 2.5, mean 3.4 before the cut), 1 to MOST_TURNS."""
    return max(1, min(MOST_TURNS, round(Random(f"turns/{seed}").lognormvariate(_MU, _SIGMA))))


def tool_seconds(seed: int, turn: int) -> float:
    """How long the tool takes in this turn of this task."""
    return Random(f"tool/{seed}/{turn}").uniform(FASTEST_MS, SLOWEST_MS) / 1000


try:
    from areal_agents import LazyTasks, Task, registry
    from areal_agents.env import AgentEnv
    from areal_agents.types import AssistantMessage, Info, Observation, StopReason, system, user
except ImportError:  # TRL's own virtual environment: it needs the functions above alone
    pass
else:

    def questions(split: str, n: int) -> list[str]:
        """Word problems of ``areal/Arithmetic-v0``."""
        tasks = registry.spec("areal/Arithmetic-v0").tasks(split, difficulty=None)
        return [str(tasks[i].payload["question"]) for i in range(n)]

    class SingleTurn(AgentEnv):
        """One question, one answer."""

        count = 4
        instructions = SYSTEM
        scores_cut_messages = True

        @classmethod
        def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
            return [
                Task.make(f"{split}-{i}", split=split, seed=i, payload={"question": q})
                for i, q in enumerate(questions(split, cls.count))
            ]

        async def areset(
            self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
        ) -> tuple[Observation, Info]:
            task = self.begin(seed, options)
            return (system(self.instructions), user(str(task.payload["question"]))), {}

        async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
            return (), share_of(action.text), True, False, {"stop_reason": "answer"}

    class LongPrompt(SingleTurn):
        """The same question behind instructions that are longer than four completions."""

        instructions = LONG_SYSTEM

    class LongTail(AgentEnv):
        """A task of a fixed number of turns; between two turns the model waits for a tool of 100 to 500 ms."""

        scores_cut_messages = True
        first_train_reset: float | None = None
        """``time.time()`` of the process's first training episode."""

        @classmethod
        def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
            offset = 0 if split == "train" else 1_000_000
            texts = questions(split, 64)

            def make(i: int) -> Task:
                payload = {"question": texts[i % len(texts)], "turns": turns_of(offset + i), "index": i}
                return Task.make(f"{split}-{i}", split=split, seed=offset + i, payload=payload)

            return LazyTasks(4096, make)

        async def areset(
            self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
        ) -> tuple[Observation, Info]:
            task = self.begin(seed, options)
            if task.split == "train" and LongTail.first_train_reset is None:
                LongTail.first_train_reset = time.time()
            self._turn, self._said = 0, 0.0
            return (system(SYSTEM), user(str(task.payload["question"]))), {}

        async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
            self._turn += 1
            reward = share_of(action.text)
            if self._turn >= int(self.task.payload["turns"]):
                return (), reward, True, False, {"stop_reason": "answer"}
            await asyncio.sleep(tool_seconds(self.task.seed, self._turn))
            return (user(f"Noted, part {self._turn}. Go on."),), reward, False, False, {}

        async def afinish(self, reason: StopReason) -> tuple[float, Info]:
            return 0.0, {"stop_reason": reason}
