"""Scripted episodes: play fixed texts against an environment and record everything it returns, comparably.

    script (texts) ─▶ parse_text ─▶ astep ─▶ trace: one plain JSON value a call, taken when the call returned

``python -m areal_agents.conformance.scripted_episode`` plays episodes in a process of its own (for
``conformance.check``): the request is JSON on standard input, the answer a JSON file that the request names.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import importlib
import itertools
import json
import math
import pickle
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import AgentEnv, Expert
from areal_agents.errors import CheckError
from areal_agents.registry import EnvSpec
from areal_agents.types import AssistantMessage, Info, Observation, Task, ToolCall

T = TypeVar("T")
ScriptName = Literal["main", "clumsy"]
MAX_TURNS = 12
CLUMSY = (
    '<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call><tool_call>{"name": </tool_call>',
    "<tool_call>{",
    "I do not know.",
)


Script = Callable[[Observation], Expert]
"""Makes the player of one episode from its first observation; the player is then sent each new observation."""


def repeat(*texts: str) -> Script:
    """Say ``texts`` in order and then the last one for ever."""

    def play() -> Expert:
        for turn in itertools.count():
            yield texts[min(turn, len(texts) - 1)]

    return lambda first: play()


def script_for(spec: EnvSpec, task: Task, name: ScriptName) -> Script:
    """``main`` is the environment's expert, else its gold answer, else small talk; ``clumsy`` makes mistakes."""
    if name == "clumsy":
        return repeat(*CLUMSY)
    expert = spec.expert(task)
    if expert is not None:
        return lambda first: expert
    gold = spec.gold(task)
    return repeat("Let me think.", "I do not know.") if gold is None else repeat(gold)


async def bounded(work: Coroutine[Any, Any, T], what: str, timeout: float) -> T:
    """``await work``. Raises CheckError after ``timeout`` seconds, even where ``work`` ignores its cancellation."""

    async def guarded() -> T:
        try:
            return await work
        except SystemExit as error:  # asyncio would end the whole loop with it
            raise CheckError(f"{what} called sys.exit({error.code!r})") from error

    task = asyncio.ensure_future(guarded())
    await asyncio.wait({task}, timeout=timeout)
    if not task.done():
        task.cancel()
        raise CheckError(f"{what} did not return within {timeout:g} s")
    try:
        return task.result()
    except CheckError:
        raise
    except asyncio.CancelledError as error:
        raise CheckError(f"{what} cancelled itself") from error
    except Exception as error:  # the environment's own code: whatever it raises is the finding
        raise CheckError(f"{what} raised {type(error).__name__}: {error}") from error


class Episode:
    """One scripted episode, call by call. ``trace`` has one entry a call; ``returned`` the very objects."""

    def __init__(self, make: Callable[[], AgentEnv], task: Task, seed: int, script: Script, timeout: float) -> None:
        self.env = make()
        self.task = task
        self.seed = seed
        self.timeout = timeout
        self.trace: list[Any] = []
        self.returned: list[Any] = []
        self.rewards: list[float] = []
        self.observations: list[Observation] = []
        self.said = ""
        """The last text."""
        self.done = False
        self._script = script
        self._player: Expert | None = None

    async def open(self) -> None:
        result = await self.call(self.env.areset(seed=self.seed, options={"task": self.task}), "areset")
        self._record("areset", result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise CheckError(f"areset returned {_short(result)}, not (observation, info)")
        self.observations.append(result[0])

    def next_text(self) -> str:
        """What the script says now."""
        try:
            if self._player is None:
                self._player = self._script(self.observations[0])
                self.said = next(self._player)
            else:
                self.said = self._player.send(self.observations[-1])
        except StopIteration as error:
            raise CheckError(f"the expert of task {self.task.id} stopped before the episode ended") from error
        except Exception as error:  # the author's own code
            raise CheckError(f"the expert of task {self.task.id} raised {type(error).__name__}: {error}") from error
        return self.said

    async def step(self) -> None:
        """One turn; after the last one the episode is finished as a runner would finish it."""
        text = self.next_text()
        result = await self.call(self.env.astep(parse_text(text)), "astep")
        self._record("astep", result)
        if not isinstance(result, tuple) or len(result) != 5:
            raise CheckError(f"astep returned {_short(result)}, not (observation, reward, terminated, truncated, info)")
        observation, reward, terminated, truncated, info = result
        self.observations.append(observation)
        self.rewards.append(finite(reward, "astep"))
        self.done = bool(terminated or truncated)
        if not self.done and len(self.rewards) == MAX_TURNS:
            extra, info = await self.finish()
            self.rewards[-1] += extra
        if self.done:
            self._credit(info)

    async def finish(self) -> tuple[float, Info]:
        result = await self.call(self.env.afinish("max_turns"), "afinish")
        self._record("afinish", result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise CheckError(f"afinish returned {_short(result)}, not (reward, info)")
        self.done = True
        return finite(result[0], "afinish"), result[1]

    async def play(self) -> Episode:
        """The whole episode; the environment is closed however it ends."""
        try:
            await self.open()
            while not self.done:
                await self.step()
        finally:
            await self.close()
        return self

    async def close(self) -> None:
        if self._player is not None:
            self._player.close()
        await self.call(self.env.aclose(), "aclose")

    async def call(self, work: Coroutine[Any, Any, T], what: str) -> T:
        return await bounded(work, f"{what} (task {self.task.id}, turn {len(self.rewards)})", self.timeout)

    @property
    def total(self) -> float:
        return math.fsum(self.rewards)

    def _credit(self, info: Any) -> None:
        rewards = info.get("turn_rewards") if isinstance(info, dict) else None
        if rewards is None:
            return
        if len(rewards) != len(self.rewards):
            raise CheckError(f"info['turn_rewards'] has {len(rewards)} entries for {len(self.rewards)} turns")
        self.rewards = [finite(r, "info['turn_rewards']") for r in rewards]

    def _record(self, what: str, result: Any) -> None:
        self.returned.append(result)
        self.trace.append({"call": what, "returned": plain(result)})


def finite(value: Any, where: str) -> float:
    """``value`` as a float. Raises CheckError where it is no finite number."""
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        raise CheckError(f"{where} returned the reward {_short(value)}, which is not a number")
    number = float(value)
    if not math.isfinite(number):
        raise CheckError(f"{where} returned the reward {number}, which is not finite")
    return number


def plain(value: Any) -> Any:
    """A JSON value that is equal for equal values in every process. Sets and mappings are sorted."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        items = {k if isinstance(k, str) else repr(plain(k)): plain(v) for k, v in value.items()}
        return {k: items[k] for k in sorted(items)}
    if isinstance(value, set | frozenset):
        return sorted((plain(v) for v in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def difference(one: Any, two: Any, path: str = "") -> str | None:
    """Where two plain values first differ, with both values; None where they are equal."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in [*one, *(k for k in two if k not in one)]:
            found = difference(one.get(key, "(absent)"), two.get(key, "(absent)"), f"{path}.{key}")
            if found:
                return found
        return None
    if isinstance(one, list) and isinstance(two, list):
        for i, (a, b) in enumerate(itertools.zip_longest(one, two, fillvalue="(absent)")):
            found = difference(a, b, f"{path}[{i}]")
            if found:
                return found
        return None
    if type(one) is type(two) and one == two:
        return None
    return f"{path.lstrip('.')}: {_short(one)} and {_short(two)}"


def trace_difference(one: list[Any], two: list[Any]) -> str | None:
    """``difference`` of two traces, with the call in words."""
    for i, (a, b) in enumerate(itertools.zip_longest(one, two)):
        if a is None or b is None or a["call"] != b["call"]:
            return f"call {i}: {a['call'] if a else 'the end'} and {b['call'] if b else 'the end'}"
        names = ("observation", "info") if a["call"] == "areset" else _NAMES[a["call"]]
        for name, x, y in zip(names, a["returned"], b["returned"], strict=False):
            found = difference(x, y, name)
            if found:
                return f"call {i} ({a['call']}), {found}"
    return None


_NAMES = {"astep": ("observation", "reward", "terminated", "truncated", "info"), "afinish": ("reward", "info")}


def spoil(value: Any) -> None:
    """Write junk into every mutable container inside ``value``; what the caller itself passed in is left alone."""
    if isinstance(value, AssistantMessage | ToolCall | Task):
        return
    if isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value.clear()
        value["spoiled"] = True
    elif isinstance(value, list):
        for item in value:
            spoil(item)
        value[:] = ["spoiled"]
    elif isinstance(value, set):
        value.add("spoiled")
    elif isinstance(value, np.ndarray):
        value.fill(0)
    elif isinstance(value, tuple):
        for item in value:
            spoil(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            spoil(getattr(value, f.name))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "…"


async def close_sandboxes() -> None:
    """End the sandbox pools of this event loop, if an environment opened any."""
    if "areal_agents.sandboxes" in sys.modules:
        await importlib.import_module("areal_agents.sandboxes").close_shared()


def _main() -> None:
    """The child process: tasks and traces of the requested environment, written to the requested file."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    spec = EnvSpec(request["id"], request["entry_point"], pickle.loads(base64.b64decode(request["kwargs"])))
    answer: dict[str, Any] = {"tasks": {}, "traces": []}
    for split in request["splits"]:
        tasks = spec.tasks(split)
        count = min(len(tasks), request["tasks"])
        answer["tasks"][split] = [[t.id, t.content_hash] for t in (tasks[i] for i in range(count))]

    async def traces() -> None:
        tasks = spec.tasks(request["splits"][0])
        for name in ("main", "clumsy"):
            for seed in range(min(2, len(tasks))):
                task = tasks[seed]
                episode = Episode(spec.make, task, seed, script_for(spec, task, name), request["timeout"])
                try:
                    await episode.play()
                except CheckError as error:
                    episode.trace.append({"call": f"failed: {error}", "returned": []})
                answer["traces"].append(episode.trace)
        await close_sandboxes()

    asyncio.run(traces())
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    _main()
