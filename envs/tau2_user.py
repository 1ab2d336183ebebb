"""The users of tau2-bench's tasks: a script that says what its scenario says, or a chat model that plays it.

The script says the reason of its call, then what it knows, then its instructions, each as an answer to one message of
the agent. So it says its conditions outright, and is an easier user than a model. After that it says yes to what it is
asked, and ends the talk at the first message that asks nothing, or where it was transferred. A user who has tools runs
those that a message names, such as ``toggle_data()``, and says what they returned.
"""

from __future__ import annotations

import ast
import importlib.resources
import re
import warnings
from collections.abc import Mapping
from typing import Any, Final

from areal_agents.engine import ChatModel, Sampling
from areal_agents.envs.declared_tool import DeclaredTool
from areal_agents.envs.tau2_world import TRANSFER, World, declared_of
from areal_agents.errors import EngineError
from areal_agents.tools.ask_user import answered
from areal_agents.types import AssistantMessage, Message, system, tool_result, user

GREETING: Final = "Hi! How can I help you today?"
ENDS: Final = ("###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###")
"""What a model that plays the user ends the talk with, as tau2's guidelines tell it."""
MOST_ACTIONS: Final = 8
"""Tools that the script runs for one message."""
MOST_YES: Final = 5
MOST_ROUNDS: Final = 10
"""Messages with calls that a model may take for one answer."""
_PERSONS: Final = (
    (r"\b[Yy]ou are\b", "I am"), (r"\b[Yy]ou're\b", "I'm"), (r"\b[Yy]ou were\b", "I was"),
    (r"\b[Yy]ou('ve|'ll|'d)\b", r"I\1"), (r"\byourself\b", "myself"), (r"\byours\b", "mine"),
    (r"\bYour\b", "My"), (r"\byour\b", "my"),
    (r"\b(to|for|with|tells?|told|gives?|offers?|asks?|allows?|lets?|helps?|refunds?|of|from|at|cost|costs) you\b",
     r"\1 me"),
    (r"\b[Yy]ou\b", "I"),
)  # fmt: skip


def first_person(text: str) -> str:
    """Let a scenario, which says what "you" want, speak for itself."""
    for pattern, said in _PERSONS:
        text = re.sub(pattern, said, text)
    return text.strip()


def parts_of(task: Mapping[str, Any]) -> list[str]:
    """Return what the script says, one part a message; the first opens the talk."""
    instructions = task["user_scenario"]["instructions"]
    if isinstance(instructions, str):
        return [first_person(instructions)]
    known = [instructions.get("known_info"), instructions.get("unknown_info")]
    told = [instructions["reason_for_call"], "\n".join(filter(None, known)), instructions["task_instructions"]]
    return [first_person(part) for part in told if part and re.search(r"\w", part)]


class ScriptedUser:
    """The user whose words are those of the scenario."""

    def __init__(self, task: Mapping[str, Any], world: World) -> None:
        self._left = parts_of(task)[1:]
        self._world = world
        self._yes = 0
        self._tools = {tool.name: tool for tool in declared_of(world.domain, "user")}

    def reply(self, message: str) -> str | None:
        """Answer a message of the agent, or return None where the talk is over."""
        if any(call.name == TRANSFER and not call.failed for call in self._world.calls):
            return None
        if actions := self._actions(message):
            return "\n".join(f"{name}: {self._world.call('user', name, given)}" for name, given in actions)
        if self._left:
            return self._left.pop(0)
        self._yes += 1
        return "Yes, please." if "?" in message and self._yes <= MOST_YES else None

    def _actions(self, message: str) -> list[tuple[str, dict[str, Any]]]:
        if not self._tools:
            return []
        names = "|".join(sorted(map(re.escape, self._tools), key=len, reverse=True))
        found = re.finditer(rf"\b({names})\b(?:\(([^()]{{0,400}})\))?", message)
        return [(m[1], self._arguments(m[1], m[2] or "")) for m in found][:MOST_ACTIONS]

    def _arguments(self, name: str, text: str) -> dict[str, Any]:
        """Read what stands between a tool's parentheses: literals, by name or in order. Nothing is evaluated."""
        names = list(self._tools[name].parameters.get("properties", {}))
        try:
            with warnings.catch_warnings(action="ignore"):  # of an escape that is none, say
                call = ast.parse(f"f({text})", mode="eval").body
            assert isinstance(call, ast.Call)
            given = {n: ast.literal_eval(value) for n, value in zip(names, call.args, strict=False)}
            return given | {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg in names}
        except (SyntaxError, ValueError, RecursionError, MemoryError, AssertionError):
            return {}  # the tool says what it lacks


class ModelUser:
    """The user whom a chat model plays by tau2's guidelines, with the user's tools where there are some."""

    def __init__(self, task: Mapping[str, Any], world: World, model: ChatModel, seed: int) -> None:
        self._world, self._model, self._seed, self._asked = world, model, seed, 0
        self._specs = tuple(
            DeclaredTool(tool.name, tool.description, tool.parameters) for tool in declared_of(world.domain, "user")
        )
        name = "simulation_guidelines_tools.md" if self._specs else "simulation_guidelines.md"
        guidelines = (importlib.resources.files("tau2") / "data/tau2/user_simulator" / name).read_text("utf-8")
        self._talk: list[Message | AssistantMessage] = [
            system(f"{guidelines}\n\n<scenario>\n{scenario(task)}\n</scenario>")
        ]

    async def reply(self, message: str) -> str | None:
        """Answer a message of the agent, or return None where the talk is over.

        Raises EngineError where the model says nothing, or nothing but calls.
        """
        self._talk.append(user(message))
        said = await answered(self._answer(), "the user")
        return None if any(end in said for end in ENDS) else said

    async def _answer(self) -> str:
        for _ in range(MOST_ROUNDS):
            self._asked += 1
            sampling = Sampling(max_tokens=512, temperature=0.0, seed=(self._seed + self._asked) % 2**31)
            reply = await self._model.chat(self._talk, self._specs, sampling)
            self._talk.append(reply)
            if not reply.tool_calls:
                if not reply.spoken.strip():
                    raise EngineError("the model that plays the user said nothing")
                return reply.spoken.strip()
            self._talk += [tool_result(self._run(call.name, call.arguments), call=call) for call in reply.tool_calls]
        raise EngineError(f"the model that plays the user made calls alone in {MOST_ROUNDS} messages")

    def _run(self, name: str, arguments: Mapping[str, Any]) -> str:
        spec = next((s for s in self._specs if s.name == name), None)
        if spec is None:
            return f"Error: there is no tool {name[:64]!r}"
        checked = spec.validate(arguments)
        return f"Error: {checked}" if isinstance(checked, str) else self._world.call("user", name, checked["arguments"])


def scenario(task: Mapping[str, Any]) -> str:
    """Write a task's scenario for the model that plays its user."""
    said = task["user_scenario"]
    instructions = said["instructions"]
    lines = [f"Persona: {said['persona']}"] if said.get("persona") else []
    if isinstance(instructions, str):
        return "\n".join([*lines, instructions])
    names = {
        "reason_for_call": "Reason for call", "known_info": "Known info", "unknown_info": "Unknown info",
        "task_instructions": "Task instructions",
    }  # fmt: skip
    return "\n".join(
        [*lines, *(f"{named}: {instructions[key]}" for key, named in names.items() if instructions.get(key))]
    )
