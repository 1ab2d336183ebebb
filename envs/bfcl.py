"""``areal/Bfcl-v0``: the multi-turn tasks of the Berkeley Function Calling Leaderboard, from the ``bfcl-eval`` package.

    request ─▶ calls, and their results ─▶ … ─▶ a message without calls ─▶ graded ─▶ the next request
                                                                                 └▶ the last one ─▶ the reward

Graded as the leaderboard does (bfcl-eval 2026.3.23, ``multi_turn_checker``): after each request, every interface must
be in the state in which the gold calls leave it, and the results of the gold calls of that request must be among all
results so far, in any order. A request whose gold has no calls cannot be met yet, and is not graded.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_agents.env import Expert
from areal_agents.envs.bfcl_apis import Function, TooLarge, called, functions_of, opened, same_state
from areal_agents.envs.bfcl_data import SPLITS, category_tasks, require_category
from areal_agents.envs.declared_tool import DeclaredTool
from areal_agents.envs.dialogue import Dialogue
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolError, ToolSpec, call_text
from areal_agents.types import AssistantMessage, Task


@dataclass
class Progress:
    """The interfaces as the agent has made them, beside those of the gold calls, and how far the talk is."""

    instances: dict[str, Any]
    wanted: dict[str, Any]
    requests: int
    """How many there are."""
    request: int = 0
    """The one that is being worked on."""
    results: list[str] = field(default_factory=list)
    """Of all calls so far."""
    acted: bool = False
    """Whether a call has run in this request."""
    graded: list[str] = field(default_factory=list)
    """What is wrong with each finished request, or nothing."""
    broken: str = ""
    """Why nothing can be called any more."""

    def grade(self, gold: Sequence[tuple[Function, Mapping[str, Any]]]) -> None:
        """Finish the request, whose gold calls are given."""
        wanted = [called(self.wanted, function, arguments) for function, arguments in gold]
        if self.broken or not gold:
            problem = self.broken
        elif not self.acted:
            problem = "nothing was called"
        elif not same_state(self.instances, self.wanted):
            problem = "the state is another"
        else:
            problem = "a result is missing" if Counter(wanted) - Counter(self.results) else ""
        self.graded.append(problem)
        self.acted = False


def met(episode: Episode) -> Verdict:
    """Pay 1 where every request was met."""
    state: Progress = episode.state
    right = float(len(state.graded) == state.requests and not any(state.graded))
    return Verdict(right, {"correct": right, "requests": state.graded.count("") / state.requests})


class Bfcl(Dialogue):
    """Do what a user asks for, request after request, with the functions of several interfaces.

    An agent must learn to call in the right order, to carry state from request to request, to do no more than was
    asked, and to say so where a function or a value is missing instead of making it up. The reward is 1 where every
    request was met. The share of met requests is a component. ``category`` is ``base``, ``miss_func`` (a function
    comes later), ``miss_param`` (a value comes later) or ``long_context`` (long results). There are no levels, so
    ``difficulty`` changes nothing.
    """

    system_prompt = (
        "You do what the user asks for by calling functions. Call until the request is met, and then answer without a "
        "call: the user will go on. If a function or a value is missing, do not guess: say what is missing."
    )
    splits = SPLITS
    rubric = met
    max_turns = 21
    """Messages of one request: 20 with calls, and one without."""
    state: Progress

    def __init__(self, *, category: str = "base", all_for_test: bool = False, **more: Any) -> None:
        """Make an environment.

        Args:
            category: of the tasks that are drawn where none is given.
            all_for_test: the test split has all tasks, the others none: for numbers to compare with others'.
            more: of ``ToolEnv``. ``max_turns`` is of one request.

        Raises:
            ConfigError: no such category, or the package is missing.
        """
        super().__init__(**{"sandbox": None, **more})
        require_category(category)
        self._source: dict[str, Any] = {"category": category, "all_for_test": all_for_test}
        self._per_request = self.max_turns

    @classmethod
    def tasks(
        cls, split: str, *, difficulty: float | None = None, category: str = "base", all_for_test: bool = False
    ) -> Sequence[Task]:
        require_category(category)
        return category_tasks(category, split, all_for_test=all_for_test)

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def tools_of(self, task: Task) -> Sequence[ToolSpec]:
        return _tools(task, 0)

    def new_state(self, task: Task) -> Progress:
        self.max_turns = self._per_request
        start = functools.partial(
            opened,
            task.payload["apis"],
            task.payload["scenario"],
            long_context=task.payload["category"] == "long_context",
        )
        return Progress(start(), start(), len(task.payload["requests"]))

    def prompt(self, task: Task) -> str:
        return str(task.payload["requests"][0])

    async def reply(self, action: AssistantMessage) -> str | None:
        """Grade the request, and go on to the next one."""
        task, state = self.task, self.state
        declared = _declared(task)
        state.grade([(declared[name], arguments) for name, arguments in task.payload["gold"][state.request]])
        if state.request + 1 == state.requests:
            return None
        state.request += 1
        self.max_turns = len(self._paid) + 1 + self._per_request
        held_back = task.payload["held_back"].get(str(state.request), [])
        if not held_back:
            return str(task.payload["requests"][state.request])
        self.offer(_tools(task, state.request))
        new = [declared[name] for name in held_back]
        shown = [{"name": f.name, "description": f.description, "parameters": f.parameters} for f in new]
        return f"From now on you can call these functions too. Please try again.\n{json.dumps(shown)}"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Say the data's own gold calls, those of a request in one message."""
        for calls in task.payload["gold"]:
            if calls:
                yield "\n".join(call_text(name, **arguments) for name, arguments in calls)
            yield "It is done." if calls else "I cannot do that: something that I need for it is missing."


async def _call(function: Function, *, arguments: dict[str, Any], state: Progress) -> str:
    """Call a function of the agent's own interfaces."""
    if state.broken:
        raise ToolError(f"error: {state.broken}")
    state.acted = True
    try:
        text = called(state.instances, function, arguments)
    except TooLarge:
        state.broken = "the file system has become too large"
        raise
    state.results.append(text)
    return text


@functools.cache
def _tool(function_of: str, name: str) -> ToolSpec:
    """Make the tool of one function of an interface."""
    function = next(f for f in functions_of(function_of) if f.name == name)
    return DeclaredTool(
        name,
        function.description,
        function.parameters,
        max_output_chars=100_000,  # long results are what one category is about
        injected={"state": "state"},
        function=functools.partial(_call, function),
        maker=(_tool, (function_of, name)),
    )


def _declared(task: Task) -> dict[str, Function]:
    return {f.name: f for api in task.payload["apis"] for f in functions_of(api)}


def _tools(task: Task, request: int) -> tuple[ToolSpec, ...]:
    """Return the tools that may be called in a request."""

    def hidden() -> Iterator[str]:
        for turn, names in task.payload["held_back"].items():
            if int(turn) > request:
                yield from names

    later = set(hidden())
    return tuple(_tool(f.api, f.name) for f in _declared(task).values() if f.name not in later)
