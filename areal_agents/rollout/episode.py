"""One episode: an environment and a model take turns until one of them is done.

    areset ─▶ Conversation ─▶ generate ─▶ astep ─▶ … ─▶ (terminated | truncated | afinish) ─▶ Trajectory

The generation slot is held per request, never across ``astep``. Whatever goes wrong is an InfraError (retried by
``retries.py``) or the environment author's RewardError; what the *model* does wrong is the environment's to answer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Engine, Sampling
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, EngineError, EnvError, InfraError, RewardError
from areal_agents.rollout.env_host import EnvHost
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Info,
    Observation,
    Prompt,
    StopReason,
    Task,
    ToolOutcome,
    Trajectory,
    Turn,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the runner allows one episode; tokens are sampled tokens unless said otherwise."""

    max_context: int
    """Prompt and completion together."""
    max_turn_tokens: int
    max_episode_tokens: int
    max_turns: int
    step_timeout: float
    """Seconds for one reset or step."""
    request_timeout: float
    """Seconds for one generation."""


class Policy(Protocol):
    """Whoever takes the model's turns."""

    async def act(self, prompt: Prompt, *, max_tokens: int, session: str, deadline: float) -> Completion: ...
    def observe(self, observation: Observation) -> None:
        """The messages the next prompt ends with; scripted policies read them."""
        ...

    async def release(self, session: str) -> None: ...


@dataclass(frozen=True, slots=True)
class EnginePolicy:
    """Samples from an engine."""

    engine: Engine
    sampling: Sampling

    async def act(self, prompt: Prompt, *, max_tokens: int, session: str, deadline: float) -> Completion:
        sampling = replace(self.sampling, max_tokens=min(max_tokens, self.sampling.max_tokens))
        return await self.engine.generate(prompt, sampling, session=session, deadline=deadline)

    def observe(self, observation: Observation) -> None:
        """The engine reads ids, not messages."""

    async def release(self, session: str) -> None:
        await self.engine.release(session)


@dataclass(slots=True)
class _State:
    """What an episode has gathered so far."""

    turns: list[Turn] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    terminated: bool = False
    truncated: bool = False
    reason: StopReason = "answer"

    def count(self, name: str, amount: float = 1.0) -> None:
        self.metrics[name] = self.metrics.get(name, 0.0) + amount


async def run_episode(
    make_env: Callable[[], AgentEnv],
    task: Task,
    policy: Policy,
    fmt: ChatFormat,
    limits: Limits,
    *,
    id: str,
    group: str,
    seed: int,
    host: EnvHost,
) -> Trajectory:
    """Play ``task`` once and return the trajectory.

    Raises InfraError (engine, sandbox or environment failed: try again) and RewardError (the reward is not a finite
    number: trying again is useless). The environment is closed and the engine's session released however it ends.
    """
    return await _Runner(task, policy, fmt, limits, id, host).run(make_env, group=group, seed=seed)


class EpisodeStates:
    """The environment's half of an episode: reset, steps, the end, rewards. Subclasses take the model's turns.

    Every call into the environment goes through ``_env``.
    """

    def __init__(self, task: Task, limits: Limits, id: str, host: EnvHost) -> None:
        self.task, self.limits, self.id, self.host = task, limits, id, host
        self.state = _State()
        self.observation: Observation = ()
        self._environment: AgentEnv | None = None

    async def run(self, make_env: Callable[[], AgentEnv], *, group: str, seed: int) -> Trajectory:
        """The whole episode, closed however it ends. Raises InfraError and RewardError."""
        try:
            await self._open(make_env, seed)
            await self.play()
        except InfraError as error:
            error.turns = len(self.state.turns)
            error.tokens = self._tokens()
            raise
        finally:
            await self.close()
        s = self.state
        return Trajectory(
            self.id, self.task, group, tuple(s.turns), s.terminated, s.truncated, s.reason, self.observation,
            dict(s.metrics),
        )  # fmt: skip

    async def play(self) -> None:
        """Turns until the environment or a limit ends the episode."""
        raise NotImplementedError

    async def _open(self, make_env: Callable[[], AgentEnv], seed: int) -> None:
        async def create() -> tuple[Observation, Info]:
            self._environment = make_env()
            return await self._environment.areset(seed=seed, options={"task": self.task})

        observation, _ = await self._env(create, "reset")
        self._observe(observation)

    def _tokens(self) -> int:
        """Tokens sampled so far."""
        return sum(len(t.completion.ids) for t in self.state.turns)

    async def close(self) -> None:
        environment = self._environment
        if environment is not None:
            # A failing close must not hide why the episode ended; the environment is gone either way.
            try:
                await self._env(environment.aclose, "close")
            except ArealError:
                self.state.count("close_errors")

    async def _step(
        self, message: AssistantMessage, completion: Completion, suffix: tuple[int, ...], parent: int | None
    ) -> None:
        environment = self._env_of()
        shown = self.observation
        start = time.perf_counter()
        observation, reward, terminated, truncated, info = await self._env(lambda: environment.astep(message), "step")
        self.state.count("env_seconds", time.perf_counter() - start)
        turn = Turn(
            suffix,
            completion,
            _with_statuses(message, info),
            _finite(reward, f"task {self.task.id}, turn {len(self.state.turns)}"),
            _components(info),
            parent,
            shown,
            info.get("state_key"),
            outcomes_of(info),
        )
        self.state.turns.append(turn)
        self.state.terminated, self.state.truncated = bool(terminated), bool(truncated)
        if terminated or truncated:
            self.state.reason = info.get("stop_reason", "answer" if terminated else "max_turns")
            self._credit(info)
        self._observe(observation)

    async def _finish(self, reason: StopReason) -> None:
        """The runner ends the episode: the environment scores what exists."""
        environment = self._env_of()
        reward, info = await self._env(lambda: environment.afinish(reason), "finish")
        self.state.truncated, self.state.reason = True, reason
        last = self.state.turns[-1]
        extra = _finite(reward, f"task {self.task.id}, at its end")
        self.state.turns[-1] = replace(
            last, reward=last.reward + extra, components={**last.components, **_components(info)}
        )
        self._credit(info)

    def _credit(self, info: Info) -> None:
        """Rewards that the environment assigns to earlier turns once the episode is over."""
        rewards = info.get("turn_rewards")
        if rewards is None:
            return
        if len(rewards) != len(self.state.turns):
            raise RewardError(
                f"task {self.task.id}: turn_rewards has {len(rewards)} entries for {len(self.state.turns)} turns"
            )
        self.state.turns = [
            replace(t, reward=_finite(r, f"task {self.task.id}, turn {k}"))
            for k, (t, r) in enumerate(zip(self.state.turns, rewards, strict=True))
        ]

    def _observe(self, observation: Observation) -> None:
        self.observation = observation

    def _env_of(self) -> AgentEnv:
        assert self._environment is not None
        return self._environment

    async def _env(self, make: Callable[[], Awaitable[T]], what: str) -> T:
        """Call into the environment. The boundary at which an author's exception becomes a counted EnvError."""
        label = f"{what} of task {self.task.id}"
        try:
            return await self.host.call(make, timeout=self.limits.step_timeout, what=label)
        except ArealError:
            raise
        except Exception as error:  # third-party code: recorded, attached, counted
            raise EnvError(f"{label} raised {type(error).__name__}: {error}") from error


class _Runner(EpisodeStates):
    """The state machine of ``run_episode``: the model's turns are token ids."""

    def __init__(self, task: Task, policy: Policy, fmt: ChatFormat, limits: Limits, id: str, host: EnvHost) -> None:
        super().__init__(task, limits, id, host)
        self.policy, self.fmt = policy, fmt

    async def play(self) -> None:
        conversation = Conversation(self.fmt, self.observation, self._env_of().tools)
        while True:
            prompt = conversation.prompt
            room, reason = self._room(len(prompt.ids))
            if reason is not None:
                return await self._finish(reason)
            suffix, parent = conversation.suffix, conversation.parent
            completion = await self._generate(prompt, room)
            message = conversation.add_completion(completion)
            await self._step(message, completion, suffix, parent)
            if self.state.terminated or self.state.truncated:
                return None
            conversation.add_observation(self.observation)

    async def close(self) -> None:
        with contextlib.suppress(EngineError):
            await self.policy.release(self.id)
        await super().close()

    def _observe(self, observation: Observation) -> None:
        super()._observe(observation)
        self.policy.observe(observation)

    def _room(self, used: int) -> tuple[int, StopReason | None]:
        """Tokens the next turn may sample, or why there is none."""
        limits, turns = self.limits, self.state.turns
        spent = sum(len(t.completion.ids) for t in turns)
        if not turns and used >= limits.max_context:
            raise EnvError(
                f"task {self.task.id}: the first prompt has {used} tokens, model.max_context is {limits.max_context}: "
                "raise it or shorten the task"
            )
        if len(turns) >= limits.max_turns:
            return 0, "max_turns"
        if used >= limits.max_context:
            return 0, "context"
        if spent >= limits.max_episode_tokens:
            return 0, "tokens"
        return min(limits.max_turn_tokens, limits.max_context - used, limits.max_episode_tokens - spent), None

    async def _generate(self, prompt: Prompt, max_tokens: int) -> Completion:
        start = time.perf_counter()
        completion = await self.policy.act(
            prompt, max_tokens=max_tokens, session=self.id, deadline=self.limits.request_timeout
        )
        self.state.count("generate_seconds", time.perf_counter() - start)
        if not completion.ids:
            raise EngineError(f"the engine returned no token for a prompt of {len(prompt.ids)} tokens")
        return completion


def _finite(value: Any, where: str) -> float:
    """``value`` as a float. Raises RewardError where it is no finite real number."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{where}: the reward {value!r} is not a number") from error
    if not math.isfinite(number):
        raise RewardError(f"{where}: the reward is {number}")
    return number


def _with_statuses(message: AssistantMessage, info: Info) -> AssistantMessage:
    """``message`` with what the environment found out about its calls: an unknown tool, invalid arguments (T7)."""
    results = info.get("tool_results", ())
    shaped = all(isinstance(r, Mapping) and "status" in r for r in results)
    if not shaped or len(results) != len(message.tool_calls):
        return message
    calls = tuple(
        replace(call, status=result["status"])
        if call.status == "ok" and result["status"] in ("unknown_tool", "invalid_arguments")
        else call
        for call, result in zip(message.tool_calls, results, strict=True)
    )
    return replace(message, tool_calls=calls)


def outcomes_of(info: Mapping[str, Any]) -> tuple[ToolOutcome, ...]:
    """What the environment said of this turn's tool calls; records of another shape are its own business."""
    records = info.get("tool_results", ())
    shaped = [r for r in records if isinstance(r, Mapping) and "status" in r]
    return tuple(ToolOutcome(str(r["status"]), bool(r.get("truncated", False))) for r in shaped)


def _components(info: Mapping[str, Any]) -> dict[str, float]:
    return {name: _finite(value, f"component {name!r}") for name, value in info.get("components", {}).items()}
