"""Environments made of a system prompt, tools and a rubric, which most authors subclass.

    message without calls ─▶ the final answer ─▶ rubric ─▶ terminated
    the same, but cut ─────▶ no answer ────────▶ rubric ─▶ truncated
    message with calls ────▶ check ─▶ run ─▶ one tool message a call ─▶ next turn
                                      └▶ a tool ended the episode ─▶ rubric ─▶ terminated

A malformed call costs a turn and is answered with a text that says how to do it right. The sandbox session is opened
at the first call that needs one and closed by ``aclose``. ``prepare`` writes a task's files into it, and ``inspect``
looks at what the episode left there, for the rubric (``episode.outcome``).

Tools that act on the episode are methods under ``@tool``, or ask for ``env`` or ``state``. They may pay for the turn
(``reward_turn``) and end the episode (``end_episode``). What they pay is added to what the rubric gives at the end.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar

from areal_agents.context import ContextLike, context_of
from areal_agents.env import AgentEnv
from areal_agents.errors import EnvError, InfraError, RewardError, SandboxUnavailable, TaskError
from areal_agents.reward import PAID, Episode, RewardLike, TaskCheck, judge, judging_seconds, task_checks
from areal_agents.sandbox import Sandbox, SandboxBackend, SandboxSpec
from areal_agents.served_model import ModelLike, chat_models
from areal_agents.tool import ToolResult, ToolSpec
from areal_agents.tool_dispatch import Dispatcher
from areal_agents.types import (
    AssistantMessage,
    Info,
    Message,
    Observation,
    StopReason,
    Task,
    ToolCall,
    system,
    tool_result,
    user,
)
from areal_agents.types import without_reasoning as without_reasoning  # its place for authors who override `answer`
from areal_agents.utils.json_value import json_copy
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import described, short

SUBMITTED = "submitted_answer"
"""The name of the message that keeps an answer given to ``end_episode``. It is the episode's last one."""


class ToolEnv(AgentEnv):
    """The base class of environments made of a system prompt, tools and a rubric.

    Implement ``prompt`` and ``tasks``, and set ``tools`` and ``rubric``. ``gold`` and ``expert`` make it auditable.
    """

    system_prompt: str = ""
    rubric: ClassVar[RewardLike]
    """Scores a finished episode: a Rubric, a Reward, or a function of an Episode that returns a number."""
    max_turns: int = 8
    turn_limit_stated: ClassVar[bool] = False
    """Whether the prompt tells the model of ``max_turns``. Reaching the limit then terminates, else it truncates."""
    sandbox_spec: ClassVar[SandboxSpec] = SandboxSpec()
    sandbox_seconds: ClassVar[float] = 60.0
    """Seconds that ``prepare`` may take, and ``inspect`` too."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a class whose rubric or sandbox takes long by its nature the time for it, where it does not say."""
        super().__init_subclass__(**kwargs)
        if vars(cls).keys() & {"rubric", "prepare", "inspect", "sandbox_seconds"} and "step_seconds" not in vars(cls):
            hooks = sum(cls._has(name) for name in ("prepare", "inspect"))
            rubric: RewardLike | None = getattr(cls, "rubric", None)
            judging = 0.0 if rubric is None else judging_seconds(rubric)
            cls.step_seconds = max(cls.step_seconds, judging + hooks * cls.sandbox_seconds)

    def __init__(
        self,
        *,
        sandbox: SandboxBackend | str | None = "bubblewrap",
        models: Mapping[str, ModelLike] | None = None,
        max_turns: int | None = None,
        system_prompt: str | None = None,
        context: ContextLike | None = None,
    ) -> None:
        """Make an environment, whose sandbox is opened when a tool needs it.

        Args:
            sandbox: a backend or the name of one. None where no tool needs it.
            models: judges and simulated users, by name. Tools and the rubric (``Episode.models``) get them.
            max_turns: at least 1, in place of the class's own.
            system_prompt: in place of the class's own; an empty one is none.
            context: in place of the class's own, as a rule or as ``context_of`` reads it.
        """
        super().__init__()
        self._rubric = getattr(type(self), "rubric", None)  # from the class: a function must not become a method
        if self._rubric is None:
            raise EnvError(f"{type(self).__name__} has no `rubric`: set it to a reward, for example boxed_number()")
        if max_turns is not None:
            self.max_turns = max_turns
        if self.max_turns < 1:
            raise EnvError(f"max_turns {self.max_turns} must be at least 1")
        if system_prompt is not None:
            self.system_prompt = self._text("system_prompt", system_prompt)
        if context is not None:
            self.context = context_of(context)
        self._models = chat_models(models or {})
        self._sandbox_missing = sandbox is None
        self._dispatcher = Dispatcher(
            self.tools, sandbox=sandbox, sandbox_spec=self.sandbox_spec, models=self._models, env=self,
            over=lambda: self._over, prepare=self._prepared,
        )  # fmt: skip
        self._messages: list[Message | AssistantMessage] = []
        self._results: list[ToolResult] = []
        self._running = self._over = False
        self._submitted: str | None = None
        self._paid: list[dict[str, float]] = []  # one a turn: what tools paid, by name
        self._turning = False

    # What an author implements or overrides

    def prompt(self, task: Task) -> str:
        """Return the first user message."""
        raise NotImplementedError(f"{type(self).__name__} must implement prompt")

    @classmethod
    def sandbox_of(cls, task: Task) -> SandboxSpec:
        """Return what the task's session gets: an image of its own, say, or services. By default ``sandbox_spec``."""
        return cls.sandbox_spec

    def new_state(self, task: Task) -> Any:
        """Return what ``state`` is at the start of an episode.

        It is copied (``copy.deepcopy``), so that no episode shares anything with the task or with another one.
        """
        return None

    async def prepare(self, sandbox: Sandbox) -> None:
        """Make a session ready for ``self.task``: write its files, for example.

        It is called before the session's first call, and again in each fresh session that takes a lost one's place,
        before the episode's earlier calls are repeated there. So it must do the same each time. It may not change
        ``state``.
        """

    async def inspect(self, sandbox: Sandbox) -> Any:
        """Return what the episode left in its sandbox, as JSON: the rubric's ``episode.outcome``, which is saved.

        It is asked once, at the end, however the episode ended. What a model left is hostile: read it with limits, and
        return what is wrong with it instead of raising (``tools/tree.py``).
        """
        return None

    def is_final(self, action: AssistantMessage) -> bool:
        """Say whether this message ends the task.

        By default a message without tool calls does. A call that cannot be read is a call too.
        """
        return not action.tool_calls

    def answer(self, action: AssistantMessage) -> str:
        """Return what the rubric gets to see of the final message.

        By default that is its text after the reasoning.
        """
        return action.spoken

    @classmethod
    def task_checks(cls) -> Sequence[TaskCheck]:
        rubric: RewardLike | None = getattr(cls, "rubric", None)
        return (*(() if rubric is None else task_checks(rubric)), *super().task_checks())

    # What an author's tools call

    def reward_turn(self, amount: float, name: str = "") -> None:
        """Pay for the turn whose calls are running.

        Amounts of one turn add up. They count whatever the rubric says at the end. ``name`` makes a component of its
        own, ``turn_reward.NAME``, beside ``turn_reward``.

        Raises:
            RewardError: ``amount`` is no finite number.
            EnvError: no call is running.
        """
        if not self._turning:
            raise EnvError(f"{type(self).__name__}.reward_turn: no turn is being taken; call it in a tool")
        try:
            value = finite(amount)
        except ValueError as wrong:
            raise RewardError(f"task {self.task.id!r}: reward_turn got {short(amount)}, which is {wrong}") from wrong
        for key in {PAID, f"{PAID}.{name}" if name else PAID}:
            self._paid[-1][key] = self._paid[-1].get(key, 0.0) + value

    def offer(self, tools: Sequence[ToolSpec]) -> None:
        """Let the model call these tools from now on, in place of those before.

        The first prompt has shown those of ``tools_of``. It stays as it is, so a message must say what is new.

        Raises EnvError for two tools of the same name.
        """
        self._dispatcher.offer(tools)
        self.tools = tuple(tools)

    def end_episode(self, answer: str | None = None) -> None:
        """End the episode with this turn, because the game is won or lost, or because ``answer`` was submitted.

        Later calls of the message are not run. The rubric is asked with ``answer`` and the stop reason ``answer``.

        Raises:
            EnvError: no call is running, or the answer is no text.
        """
        if not self._turning:
            raise EnvError(f"{type(self).__name__}.end_episode: no turn is being taken; call it in a tool")
        self._over, self._submitted = True, None if answer is None else self._text("end_episode", answer)

    # The contract

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        await self._dispatcher.aclose()
        self._running = False
        task = self.begin(seed, options)
        if self._sandbox_missing and self._has("inspect"):
            raise EnvError(f"{type(self).__name__}.inspect needs a sandbox, but the environment has sandbox=None")
        self._dispatcher.use(self.sandbox_of(task))
        if self._has("tools_of"):
            self.offer(self.tools_of(task))
        try:
            self.state = copy.deepcopy(self.new_state(task))
        except (TypeError, copy.Error) as error:
            raise EnvError(f"{type(self).__name__}.new_state: {described(error)} (the state is copied)") from error
        opening = (system(self.system_prompt),) if self.system_prompt else ()
        observation = (*opening, user(self._text("prompt", self.prompt(task))))
        self._messages, self._results, self._running = list(observation), [], True
        self._paid, self._over, self._submitted, self._turning = [], False, None, False
        return observation, {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        """Take one turn, which scores a final message or runs the tools that the message calls.

        A final message that was cut is no answer. It ends the episode as truncated, unless ``scores_cut_messages``.

        Raises:
            EnvError: the episode has ended, or a hook returned something else than it must.
            RewardError: the reward is broken.
            TaskError: the task cannot be scored.
            SandboxError: see ``Dispatcher``.
        """
        self._require_running()
        self._messages.append(action)
        self._paid.append({})
        if self._is_final(action):
            cut = action.cut({t.name for t in self.tools})
            if cut and not self.scores_cut_messages:
                reward, info = await self._score(cut, None)
                return (), reward, False, True, info
            reward, info = await self._score("answer", self._text("answer", self.answer(action)))
            return (), reward, True, False, info
        self._turning = True
        try:
            results = await self._dispatcher.run(action.tool_calls)
        finally:
            self._turning = False
        self._results += results
        observation = tuple(tool_result(r.text, call=c) for c, r in zip(action.tool_calls, results, strict=True))
        if self._submitted is not None:
            observation += (dataclasses.replace(user(self._submitted), name=SUBMITTED),)
        self._messages += observation
        info = {"tool_results": _records(action.tool_calls, results)}
        if self._dispatcher.replays:
            info["sandbox_replays"] = self._dispatcher.replays
        paid = self._paid[-1].get(PAID, 0.0)
        if self._paid[-1]:
            info["components"] = dict(self._paid[-1])
        if self._over:
            reward, scored = await self._score("answer", self._submitted)
            return observation, paid + reward, True, False, info | scored
        if len(self._paid) < self.max_turns:
            return observation, paid, False, False, info
        reward, scored = await self._score("max_turns", None)
        return observation, paid + reward, self.turn_limit_stated, not self.turn_limit_stated, info | scored

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        self._require_running()
        return await self._score(reason, None)

    async def aclose(self) -> None:
        self._running = False
        await self._dispatcher.aclose()

    def _require_running(self) -> None:
        if not self._running:
            raise EnvError(f"{type(self).__name__}: no episode is running; call reset first")

    def _text(self, hook: str, value: object) -> str:
        if not isinstance(value, str):
            raise EnvError(f"{type(self).__name__}.{hook} returned {short(value)}, which is not a text")
        return value

    def _is_final(self, action: AssistantMessage) -> bool:
        final: object = self.is_final(action)
        if not isinstance(final, bool):
            raise EnvError(f"{type(self).__name__}.is_final returned {short(final)}, which is not a bool")
        return final

    async def _score(self, reason: StopReason, answer: str | None) -> tuple[float, Info]:
        """End the episode and return what the rubric gives to the last turn, with the info that explains it."""
        self._running = False
        outcome = await self._dispatcher.look(self._inspected) if self._has("inspect") else None
        episode = Episode(
            self.task, tuple(self._messages), answer, tuple(self._results), reason, self._models, self.state, outcome
        )
        assert self._rubric is not None
        verdict = await judge(self._rubric, episode)
        paid = [turn.get(PAID, 0.0) for turn in self._paid]
        if any(self._paid) and PAID in verdict.components:
            raise RewardError(
                f"task {self.task.id!r}: the component {PAID!r} of the rubric is what tools pay: rename it"
            )
        info: Info = {"stop_reason": reason, "components": dict(verdict.components)}
        if outcome is not None:
            info["outcome"] = outcome
        if self._dispatcher.replays:
            info["sandbox_replays"] = self._dispatcher.replays
        if self._paid:
            info["components"] |= self._paid[-1]
        if verdict.status != "ok":
            info["verdict_status"] = verdict.status
        if not verdict.turn_rewards:
            return verdict.score, info
        info["turn_rewards"] = [a + b for a, b in zip(paid, verdict.turn_rewards, strict=True)]
        return verdict.turn_rewards[-1], info

    @classmethod
    def _has(cls, hook: str) -> bool:
        """Say whether the author wrote this hook."""
        return getattr(cls, hook) is not getattr(ToolEnv, hook)

    async def _prepared(self, sandbox: Sandbox) -> None:
        if self._has("prepare"):
            await self._hook("prepare", self.prepare, sandbox)

    async def _inspected(self, sandbox: Sandbox) -> Any:
        found = await self._hook("inspect", self.inspect, sandbox)
        try:
            return json_copy(found)
        except ValueError as wrong:
            raise EnvError(f"{type(self).__name__}.inspect returned {short(found)}, {wrong}") from wrong

    async def _hook(self, name: str, hook: Callable[[Sandbox], Awaitable[Any]], sandbox: Sandbox) -> Any:
        """Call the author's code in a session, which may take ``sandbox_seconds``."""
        where = f"{type(self).__name__}.{name}"
        if not inspect.iscoroutinefunction(hook):
            raise EnvError(f"{where} must be an `async def`")
        clock = asyncio.timeout(self.sandbox_seconds)
        try:
            async with clock:
                return await hook(sandbox)
        except TimeoutError as error:
            if not clock.expired():
                raise EnvError(f"{where} raised {described(error)}") from error
            slow = EnvError(f"{where} did not end within {self.sandbox_seconds:g} s (sandbox_seconds)")
            slow.blame = "hang"
            raise slow from error
        except (InfraError, SandboxUnavailable, RewardError, TaskError):
            raise
        except Exception as error:
            raise EnvError(f"{where} raised {described(error)}") from error


def _records(calls: Sequence[ToolCall], results: Sequence[ToolResult]) -> list[dict[str, Any]]:
    return [
        {"name": call.name, "status": result.status, "truncated": result.truncated}
        for call, result in zip(calls, results, strict=True)
    ]
