"""Environments for ``tests/conformance/test_check.py``: a good one, and one for each way to break the contract."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from areal_agents.env import AgentEnv, Expert
from areal_agents.errors import TaskError
from areal_agents.reward import Episode, Gate, TaskCheck
from areal_agents.rewards import boxed_math
from areal_agents.tool import call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Info, Message, Observation, StopReason, Task, system, user

Stepped = tuple[Observation, float, bool, bool, Info]


class Good(AgentEnv):
    r"""Double a number within three turns; the whole message must be ``\boxed{answer}``."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        start = 100 if split == "train" else 200
        return [cls.task_of(split, n) for n in range(start, start + 8)]

    @classmethod
    def task_of(cls, split: str, n: int) -> Task:
        return Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n})

    @classmethod
    def task_checks(cls) -> Sequence[TaskCheck]:
        return (cls._require_number,)

    @staticmethod
    def _require_number(task: Task) -> None:
        if "n" not in task.payload:
            raise TaskError(f"task {task.id!r} has no number")

    @classmethod
    def gold(cls, task: Task) -> str | None:
        return rf"\boxed{{{2 * task.payload['n']}}}"

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        def play() -> Expert:
            observation = yield "Which number?"
            yield rf"\boxed{{{2 * int(observation[-1].text.split()[-1])}}}"

        return play()

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        task = self.begin(seed, options)
        self.turns = 0
        self.history: list[str] = []
        self.lucky = int(self.np_random.integers(1000))
        await asyncio.sleep(0)
        return self.opening(task), {"lucky": self.lucky}

    def opening(self, task: Task) -> Observation:
        return (user(f"Double {task.payload['n']}."),)

    async def astep(self, action: AssistantMessage) -> Stepped:
        self.turns += 1
        self.history.append(action.text)
        await asyncio.sleep(0.001)
        if self.correct(action.text):
            return (), 1.0, True, False, self.info("answer")
        if self.turns == 3:
            return (), 0.0, False, True, self.info("max_turns")
        return self.reply(), 0.0, False, False, self.info(None)

    def correct(self, text: str) -> bool:
        return text == self.gold(self.task)

    def reply(self) -> Observation:
        return (user(f"turn {self.turns}: the number is {self.task.payload['n']}"),)

    def info(self, reason: StopReason | None) -> Info:
        info: Info = {"history": list(self.history), "seen": {"turns": [self.turns]}}
        return info if reason is None else {**info, "stop_reason": reason}


class Unaudited(Good):
    gold = AgentEnv.gold
    expert = AgentEnv.expert

    def correct(self, text: str) -> bool:
        return text == str(2 * self.task.payload["n"])


class IgnoresSeed(Good):
    def reply(self) -> Observation:
        return (user(f"{np.random.default_rng().integers(10**9)} {self.task.payload['n']}"),)


class HashSeedDependent(Good):
    def opening(self, task: Task) -> Observation:
        return (user("Double " + " ".join({"one", "two", "three", "four", "five", "six"})),)


class HashSeedTasks(Good):
    @classmethod
    def task_of(cls, split: str, n: int) -> Task:
        return Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n, "salt": hash(f"{split}{n}")})


class OverlappingSplits(Good):
    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [cls.task_of(split, n) for n in range(100, 108)]


class AliasesHistory(Good):
    def info(self, reason: StopReason | None) -> Info:
        return {**super().info(reason), "history": self.history}


class ReadsBackItsInfo(Good):
    def info(self, reason: StopReason | None) -> Info:
        if self.turns == 1:
            self.shared = {"score": [7]}
        return {**super().info(reason), "state": self.shared}


class LeaksBetweenEpisodes(Good):
    episodes: ClassVar[int] = 0

    def opening(self, task: Task) -> Observation:
        LeaksBetweenEpisodes.episodes += 1
        return (user(f"Episode {self.episodes}: double {task.payload['n']}."),)


class SharesState(Good):
    current: ClassVar[list[Any]] = []

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        result = await super().areset(seed=seed, options=options)
        self.current[:] = [self.task.payload["n"]]
        return result

    def reply(self) -> Observation:
        return (user(f"the number is {self.current[0]}"),)


class SeedsGlobally(Good):
    def opening(self, task: Task) -> Observation:
        random.seed(task.seed)
        return (user(f"Double {task.payload['n']}; {random.random()}"),)


class TakesAnyAnswer(Good):
    def correct(self, text: str) -> bool:
        return r"\boxed" in text


class FindsTheAnswerAnywhere(Good):
    def correct(self, text: str) -> bool:
        return str(2 * self.task.payload["n"]) in text


class RewardsSilence(Good):
    def correct(self, text: str) -> bool:
        return not text.strip() or super().correct(text)


class WrongGold(Good):
    expert = AgentEnv.expert

    @classmethod
    def gold(cls, task: Task) -> str | None:
        return "three"

    def correct(self, text: str) -> bool:
        return text == str(2 * self.task.payload["n"])


class RewardsNan(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        observation, _, terminated, truncated, info = await super().astep(action)
        return observation, float("nan"), terminated, truncated, info


class RewardsText(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        observation, _, terminated, truncated, info = await super().astep(action)
        return observation, "1.0", terminated, truncated, info  # type: ignore[return-value]


class Raises(Good):
    def reply(self) -> Observation:
        raise KeyError("no reply")


class Exits(Good):
    def opening(self, task: Task) -> Observation:
        sys.exit(3)


class ExitsInATask(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        async def leave() -> None:
            sys.exit(3)

        await asyncio.gather(leave())
        return await super().astep(action)


class ExitsWhenMade(Good):
    def __init__(self) -> None:
        sys.exit(4)


class ExitsInACallback(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        asyncio.get_running_loop().call_soon(sys.exit, 6)
        return await super().astep(action)


class ExpertExits(Good):
    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        def play() -> Expert:
            yield "Which number?"
            sys.exit(0)

        return play()


class GoldExits(Good):
    @classmethod
    def gold(cls, task: Task) -> str | None:
        sys.exit(5)


class RewardsHuge(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        observation, _, terminated, truncated, info = await super().astep(action)
        return observation, 10**5000, terminated, truncated, info


class SaysNothingFirst(Good):
    def opening(self, task: Task) -> Observation:
        return ()


class RepeatsHistory(Good):
    def reply(self) -> Observation:
        return (*self.opening(self.task), *super().reply())


class ReturnsLists(Good):
    def opening(self, task: Task) -> Observation:
        return list(super().opening(task))  # type: ignore[return-value]


class Hangs(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        await asyncio.Event().wait()
        return await super().astep(action)


class HangsOnCancel(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            await asyncio.Event().wait()
        return await super().astep(action)


class LeavesTasksBehind(Good):
    left: ClassVar[list[asyncio.Task[None]]] = []

    async def astep(self, action: AssistantMessage) -> Stepped:
        self.left.append(asyncio.create_task(forever()))
        return await super().astep(action)


async def forever() -> None:
    await asyncio.Event().wait()


class CancelBreaksNeighbours(Good):
    """The lock that all episodes share stays taken when its holder is cancelled."""

    broken: ClassVar[list[bool]] = []

    async def astep(self, action: AssistantMessage) -> Stepped:
        try:
            return await super().astep(action)
        except asyncio.CancelledError:
            self.broken.append(True)
            raise

    def reply(self) -> Observation:
        return (user(f"broken: {self.task.payload['n']}"),) if self.broken else super().reply()


RELEASE = threading.Event()


class Blocks(Good):
    async def astep(self, action: AssistantMessage) -> Stepped:
        RELEASE.wait(60)
        return await super().astep(action)


class SkipsBegin(Good):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        task = (options or {}).get("task") or self.tasks("train")[0]
        self.task, self.turns, self.history = task, 0, []
        return self.opening(task), {}


class TwoUserMessages(Good):
    def opening(self, task: Task) -> Observation:
        return (user("Hello."), *super().opening(task))


class SystemFirst(Good):
    def opening(self, task: Task) -> Observation:
        return (system("Be brief."), *super().opening(task))


class ShowsOneTool(Good):
    def reply(self) -> Observation:
        return (Message("tool", super().reply()[0].parts),)


class BadGolds(ToolEnv):
    """Of eight test tasks, 2 and 5 have no gold answer that can be read; of as many training tasks, all have one."""

    rubric = Gate({"correct": boxed_math()})
    reveals_gold = True

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        wrong = {2: r"\frac{1}{", 5: ""} if split == "test" else {}
        golds = [wrong.get(i, str(i)) for i in range(8)]
        payloads = [{"split": split, "i": i, "answer": gold} for i, gold in enumerate(golds)]
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload=p) for i, p in enumerate(payloads)]

    def prompt(self, task: Task) -> str:
        return f"Say {task.payload['i']} in a box."


def due(task: Task) -> int:
    """The number that tools must be called with. It is shown nowhere, so that chance does not find it."""
    return 7 * int(task.payload["n"]) + 3


def call(name: str, task: Task) -> str:
    return call_text(name, n=due(task))


def _paid(episode: Episode) -> float:
    return float(episode.state["paid"])


class Stateful(ToolEnv):
    """Tools act on a state; two of them the expert never calls."""

    rubric = _paid

    def new_state(self, task: Task) -> dict[str, Any]:
        return {"paid": False, "seen": dict(task.payload)}

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = 0 if split == "test" else 100
        return [Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n}) for n in range(first, first + 8)]

    def prompt(self, task: Task) -> str:
        return f"Take {self.state['seen'].pop('n')}."

    @tool()
    async def take(self, n: int) -> str:
        """Take it."""
        if n == due(self.task):
            self.reward_turn(0.1)
        return "Taken."

    @tool()
    async def pay(self, n: int) -> None:
        """Pay."""
        self.state["paid"] = n == due(self.task)
        self.end_episode()

    @tool()
    async def drop(self) -> None:
        """Drop it."""

    @tool()
    async def rest(self) -> None:
        """Rest."""

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        def play() -> Expert:
            yield call("take", task)
            yield call("drop", task)  # which has no parameter
            yield call("pay", task)

        return play()


class StatefulWithoutPay(Stateful):
    """The expert of odd tasks forgets to pay."""

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        if task.payload["n"] % 2 == 0:
            return super().expert(task)

        def play() -> Expert:
            yield call("take", task)
            yield "Done."

        return play()
