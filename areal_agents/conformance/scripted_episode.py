"""Scripted episodes, which play fixed texts against an environment and record everything it returns.

    script (texts) ─▶ EpisodeDriver ─▶ astep ─▶ trace: one plain JSON value a call, taken before anything reads it

Traces can be compared, also across processes. ``python -m areal_agents.conformance.scripted_episode`` plays episodes
in a process of its own (for ``conformance.check``). Its request is JSON on standard input. Its answer is a JSON file
that the request names.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import itertools
import json
import math
import pickle
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from areal_agents.env import AgentEnv, Expert
from areal_agents.errors import ArealError, CheckError, EnvError
from areal_agents.registry import EnvSpec
from areal_agents.rollout.env_results import RETURNS, Call
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.script import Script, ScriptPolicy, expert_of
from areal_agents.sandbox import backends
from areal_agents.types import AssistantMessage, Task, ToolCall
from areal_agents.utils.exits import guard_tasks, no_exit
from areal_agents.utils.outcomes import to_its_end, unheard
from areal_agents.utils.short_text import described, short

T = TypeVar("T")
ScriptName = Literal["main", "clumsy"]
MAX_TURNS = 12
"""Turns of an episode, where no more are asked for: enough to compare episodes, and an end of scripts without one."""
AT_ONCE = 8
"""Episodes that play together where nothing is compared, of environments that keep them apart."""
CLUMSY = (
    '<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call><tool_call>{"name": </tool_call>',
    "<tool_call>{",
    "I do not know.",
)


def repeat(*texts: str) -> Script:
    """Make a script that says ``texts`` in order and then the last one for ever."""

    def play() -> Expert:
        for turn in itertools.count():
            yield texts[min(turn, len(texts) - 1)]

    return lambda first: play()


def script_for(spec: EnvSpec, task: Task, name: ScriptName) -> Script:
    """Return the script ``name`` for one task.

    ``main`` is the environment's expert, else its gold answer, else small talk. ``clumsy`` makes mistakes.
    """
    if name == "clumsy":
        return repeat(*CLUMSY)
    expert = expert_of(spec, task)
    if expert is not None:
        return lambda first: expert
    gold = spec.gold(task)
    return repeat("Let me think.", "I do not know.") if gold is None else repeat(gold)


class OwnLoop:
    """The running event loop as an episode's ``Host``.

    It is the checks' own loop, because they count its turns and its tasks. Whatever goes wrong is an EnvError that
    names the call.
    """

    async def call(self, make: Callable[[], Awaitable[T]], *, timeout: float, what: str) -> T:
        """Await ``make()`` for at most ``timeout`` seconds.

        Raises EnvError after that, even where the call ignores its cancellation.
        """
        guard_tasks(asyncio.get_running_loop())
        task = asyncio.ensure_future(make())
        try:
            # Not asyncio.timeout, which would wait on where the cancellation is ignored.
            await asyncio.wait({task}, timeout=timeout)
            if not task.done():
                raise EnvError(f"{what} did not return within {timeout:g} s")
        finally:
            if not task.done():  # the caller may be cancelled too
                task.cancel()
                unheard(task)
        try:
            return task.result()
        except asyncio.CancelledError as error:
            raise EnvError(f"{what} cancelled itself") from error
        except Exception as error:  # the environment's own code: whatever it raises is the finding
            raise EnvError(f"{what} raised {described(error)}") from error


class ScriptedEpisode(EpisodeDriver):
    """One episode that a script plays and that is recorded.

    ``trace`` has one entry a call. ``returned`` holds the very objects that the calls returned.
    """

    def __init__(
        self, make: Callable[[], AgentEnv], task: Task, seed: int, script: Script, timeout: float,
        max_turns: int = MAX_TURNS,
    ) -> None:  # fmt: skip
        try:
            with no_exit():
                self.env = make()
        except ArealError:
            raise
        except Exception as error:  # the environment's own code
            raise CheckError(f"making the environment raised {described(error)}") from error
        self.script = ScriptPolicy(script, task)
        self.trace: list[Any] = []
        self.returned: list[Any] = []
        super().__init__(
            lambda: self.env, task, self.script, OwnLoop(), task.id, seed, timeout, max_turns, self._record
        )

    def _record(self, call: Call, result: object) -> None:
        if call in RETURNS:
            self.returned.append(result)
            self.trace.append({"call": call, "returned": plain(result)})

    async def close(self) -> None:
        """Close the environment, also one that was never opened, and where another check's failure cancels this one.

        Raises CheckError where that fails, because it is a finding.
        """
        try:
            await self.script.close(self)
        finally:
            await to_its_end(lambda: self.call("aclose", self.env.aclose))

    @property
    def total(self) -> float:
        return math.fsum(turn.reward for turn in self.turns)


async def in_turns(works: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """Do ``works``, ``at_once`` at a time, and return what each gave.

    The first error ends the others, and is raised.
    """
    slots = asyncio.Semaphore(at_once)

    async def one(work: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            return await work()

    tasks = [asyncio.ensure_future(one(work)) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def plain(value: Any) -> Any:
    """Return a JSON value that is equal for equal values in every process.

    Sets and mappings are sorted.
    """
    if isinstance(value, int) and value.bit_length() > 1024:
        return hex(value)  # JSON would want its digits, and Python refuses to print very many
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
    text = repr(value)  # with an address in it, it would differ between processes
    return type(value).__qualname__ if " at 0x" in text else text


def difference(one: Any, two: Any, path: str = "") -> str | None:
    """Return where two plain values first differ, with both values, or None where they are equal."""
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
    return f"{path.lstrip('.')}: {short(one)} and {short(two)}"


def trace_difference(one: list[Any], two: list[Any]) -> str | None:
    """Return the ``difference`` of two traces, with the call in words."""
    for i, (a, b) in enumerate(itertools.zip_longest(one, two)):
        if a is None or b is None or a["call"] != b["call"]:
            return f"call {i}: {a['call'] if a else 'the end'} and {b['call'] if b else 'the end'}"
        for name, x, y in zip(RETURNS[a["call"]], a["returned"], b["returned"], strict=False):
            found = difference(x, y, name)
            if found:
                return f"call {i} ({a['call']}), {found}"
    return None


def spoil(value: Any) -> None:
    """Write junk into every mutable container inside ``value``.

    Messages, calls and tasks, which the caller itself passed in, are left alone.
    """
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


def _main() -> None:
    """Write tasks and traces of the requested environment to the requested file, as a child process."""
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    kwargs = pickle.loads(base64.b64decode(request["kwargs"]))
    spec = EnvSpec(request["id"], request["entry_point"], kwargs, difficulty=request["difficulty"])
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
                trace: list[Any] = []
                try:
                    script = script_for(spec, task, name)
                    episode = ScriptedEpisode(spec.make, task, seed, script, request["timeout"])
                    trace = episode.trace
                    await episode.play()
                except ArealError as error:
                    trace.append({"call": f"failed: {error}", "returned": []})
                answer["traces"].append(trace)
        await backends().close_shared()

    asyncio.run(traces())
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    _main()
