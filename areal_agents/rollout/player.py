"""The players of episodes: their contract, the player of this process, and a recipe that travels to another one.

A player makes one attempt at an episode. ``EpisodeRunner`` (``retries.py``) counts the attempts and retries.
``LocalPlayer`` keeps environments on a thread of its own. A ``PlayerSpec`` is plain data and builds a ``LocalPlayer``
wherever it is opened.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.options import ChatOptions
from areal_agents.chat.toolcalls import MAX_CALLS
from areal_agents.context import context_of
from areal_agents.engine import Engine, Sampling, shortest_context
from areal_agents.env import AgentEnv
from areal_agents.errors import ConfigError, EnvError, FailureBudgetError, InfraError
from areal_agents.registry import EnvSpec, takes
from areal_agents.rollout.demonstrations import ExpertPolicy
from areal_agents.rollout.env_host import EnvHost, HostLost
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy
from areal_agents.rollout.history import require_room
from areal_agents.rollout.script import expert_of
from areal_agents.rollout.token_policy import EnginePolicy
from areal_agents.sandbox import Preparing, SandboxBackend, SandboxSpec, backends
from areal_agents.settings.config import TrainConfig
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task, Trajectory, system, user
from areal_agents.utils.short_text import text_of

EventSink = Callable[..., None]
"""``event(kind, **fields)``: one line in the run's event log."""

_MAX_HOSTS_LOST = 20
_TOOL_SECONDS = 60.0
"""What the calls of a tool are taken to need that is not known before its environment is made."""
_TASKS_AHEAD = 20_000
"""Tasks of a split whose sandboxes are looked at before a run."""
_MAX_BLOCKED = 2
"""Attempts at one task whose reset may block the thread."""


def no_events(kind: str, **fields: object) -> None:
    """Drop an event, for callers without a log."""


class EpisodePlayer(Protocol):
    """A player of episodes, many at once."""

    async def play(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory:
        """Make one attempt at one episode.

        Cancelling it closes the environment and aborts the engine's request.

        Args:
            task: the task to play.
            id: the attempt's own, and the engine's session.
            group: the group that the trajectory belongs to.
            seed: the environment is reset with it.

        Raises:
            InfraError: another attempt may succeed.
            RewardError: another attempt is useless.
            TaskError: every attempt at this task is.
        """
        ...

    async def close(self) -> None:
        """Cancel what still plays and end what the environments share (sandbox pools).

        It raises nothing on purpose.
        """
        ...


class LocalPlayer:
    """The player that keeps environments on an ``EnvHost`` of this process.

    The host is replaced when an environment wedges it, which is to block its thread.
    """

    def __init__(
        self,
        make_env: Callable[[], AgentEnv],
        policy: Callable[[Task], Policy],
        limits: Limits,
        *,
        event: EventSink = no_events,
    ) -> None:
        """Start the first host.

        Args:
            make_env: makes the environment of one attempt, on the host.
            policy: makes whoever takes the turns of one attempt at the task.
            limits: of every episode; the policy keeps those on tokens.
            event: is told host_lost (an innocent episode starts again, at no cost), host_replaced, close_failed,
                env_close_failed and env_task_failed.
        """
        self._make_env, self._policy, self._limits, self._event = make_env, policy, limits, event
        self._host = self._new_host()
        self._hosts_lost = 0
        self._blocking: dict[str, list[EnvError]] = {}
        """By task id: how its resets blocked the thread."""

    async def play(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory:
        """Make one attempt, as ``EpisodePlayer.play`` promises.

        Raises FailureBudgetError where hosts are lost again and again.
        """
        while True:
            blocked = self._blocking.get(task.id, [])
            if len(blocked) >= _MAX_BLOCKED:  # each costs a thread that nobody can end, and all others their turns
                raise copy(blocked[0])
            host = self._healthy_host()
            episode = EpisodeDriver(
                self._make_env, task, self._policy(task), host, id=id, seed=seed,
                step_timeout=self._limits.step_timeout, max_turns=self._limits.max_turns,
            )  # fmt: skip
            try:
                await episode.play()
                return episode.trajectory(group)
            except HostLost:  # another environment blocked the thread: this episode is innocent and starts again
                self._event("host_lost", episode=id, task=task.id)
            except EnvError as error:
                # Its own host: an innocent that heard of it first may have replaced the player's by now.
                if error.blame == "environment" and host.wedged and not episode.observation:
                    self._blocking.setdefault(task.id, []).append(error)
                raise
            finally:
                if (failed := episode.close_error) is not None:
                    self._event("env_close_failed", episode=id, task=task.id, detail=text_of(failed))

    def _new_host(self) -> EnvHost:
        return EnvHost(None if self._event is no_events else self._event)

    def _healthy_host(self) -> EnvHost:
        if self._host.wedged:
            self._hosts_lost += 1
            if self._hosts_lost > _MAX_HOSTS_LOST:
                raise FailureBudgetError(
                    f"environments blocked their event loop {self._hosts_lost} times: fix the environment's blocking "
                    "calls (events.jsonl names the tasks)"
                )
            self._event("host_replaced", lost=self._hosts_lost)
            self._host = self._new_host()
        return self._host

    async def close(self) -> None:
        """End what environments share (sandbox pools) and stop the host."""
        try:
            await self._host.close(backends().close_shared)
        except InfraError as error:  # noted, not raised: it must not hide why the run ends
            self._event("close_failed", error=type(error).__name__, detail=text_of(error))


@dataclass(frozen=True, slots=True)
class PlayerSpec:
    """A recipe for a ``LocalPlayer``, as plain data.

    It is picklable where the environment's keyword arguments are.
    """

    env: EnvSpec
    """The environment; its entry point must be importable where the player is built."""
    model: Path
    """The model's folder: its tokenizer and chat template make the prompts."""
    limits: Limits
    sampling: Sampling
    """How the engine samples, ``stop_ids`` included; ``limits`` may lower ``max_tokens``."""
    sandbox: str = "bubblewrap"
    """The sandbox backend that tools run in."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment's constructor, over the registered ones."""
    policy: Literal["engine", "expert"] = "engine"
    """Who takes the turns: the engine, or the environment's scripted expert."""
    chat: ChatOptions = field(default_factory=ChatOptions)
    """What the user chose about the chat format of ``model``."""

    @property
    def step_seconds(self) -> float:
        """Most seconds that one step may take beyond ``limits.step_timeout``, by what the class declares."""
        cls = self.env.env_class()
        tools: object = cls.tools
        known = isinstance(tools, Sequence)  # a property of the instances tells nothing here
        slowest = max((t.timeout for t in tools), default=0.0) if known else _TOOL_SECONDS  # type: ignore[attr-defined]
        own = cls.step_seconds
        return MAX_CALLS * slowest + (own if isinstance(own, float | int) else 0.0)

    def build(self, engine: Engine, *, fmt: ChatFormat | None = None, event: EventSink = no_events) -> LocalPlayer:
        """Build the player in this process.

        Args:
            engine: samples the turns. Where it takes shorter conversations than ``limits`` say, its own limit holds.
            fmt: the chat format of ``model`` with the options of ``chat``, where the caller has loaded it.
            event: as for ``LocalPlayer``, and is told context_limited where the engine's limit is the shorter one.

        Raises:
            ModelError: ``model`` has no tokenizer.
            RegistryError: the environment cannot be imported.
        """
        fmt = fmt or ChatFormat.load(self.model, self.chat)
        limits = self.limits
        if self.policy == "engine":  # an expert's turns are not sampled
            limits = replace(limits, max_context=shortest_context(limits.max_context, engine))
        if limits != self.limits:
            event("context_limited", asked=self.limits.max_context, limit=limits.max_context)
        make_env = env_maker(self.env, sandbox=self.sandbox, kwargs=self.kwargs)

        def policy(task: Task) -> Policy:
            if self.policy == "engine":
                return EnginePolicy(engine, self.sampling, fmt, limits)
            expert = expert_of(self.env, task)
            if expert is None:
                raise ConfigError(f"{self.env.id} has no expert: set warm_start.demonstrations = 0")
            return ExpertPolicy(expert, task, fmt, limits)

        return LocalPlayer(make_env, policy, limits, event=event)


def limits_of(config: TrainConfig) -> Limits:
    """Return the limits that the settings put on an episode."""
    return Limits(
        max_context=config.model.max_context,
        max_turn_tokens=config.rollout.max_turn_tokens,
        max_episode_tokens=config.rollout.episode_tokens,
        max_turns=config.rollout.max_turns,
        step_timeout=config.env.step_timeout,
        request_timeout=config.engine.request_timeout,
    )


def require_prompts(spec: EnvSpec, fmt: ChatFormat, limits: Limits) -> None:
    """Look, before anything slow starts, at what the environment would have the model shown.

    Raises TemplateError where its system prompt cannot be shown, and ConfigError where its rule for long histories
    cannot keep to ``limits``.
    """
    cls = spec.env_class()
    given = spec.kwargs.get("context") if takes(cls, "context") else None
    given = cls.context if given is None else given
    # A property of the instances tells nothing here.
    rule = None if given is None or isinstance(given, property) else context_of(given)
    if rule is not None:
        require_room(rule, limits, fmt)
    text = spec.kwargs.get("system_prompt", getattr(spec.env_class(), "system_prompt", ""))
    if isinstance(text, str) and text:
        fmt.first_prompt([system(text), user("")])


def env_maker(spec: EnvSpec, *, sandbox: str, kwargs: Mapping[str, Any]) -> Callable[[], AgentEnv]:
    """Return a constructor of ``spec``'s environment.

    ``sandbox`` is passed where the environment takes one and ``kwargs`` hold none.
    """
    given = dict(kwargs)
    if takes(spec.env_class(), "sandbox"):
        given.setdefault("sandbox", sandbox)
    return lambda: spec.make(**given)


async def prove_sandbox(spec: EnvSpec, sandbox: str, tasks: Sequence[Task] | None = None) -> None:
    """Probe the sandbox backend before anything slow starts, where a tool of ``spec`` needs one.

    What the sessions of ``tasks`` need is fetched, built or refused too; None are the environment's own, as many as
    are looked at ahead.

    Raises SandboxUnavailable, and ConfigError for sessions that the backend has not.
    """
    cls = spec.env_class()
    if not takes(cls, "sandbox") or not any(t.needs_sandbox for t in cls.tools):
        return
    backend: SandboxBackend = backends().get(sandbox)
    try:
        await backend.probe()
        specs = _sessions_of(spec, tasks)
        if isinstance(backend, Preparing):
            await backend.prepare(specs)
        else:
            for wanted in specs:
                async with backend.session(wanted):  # opened at its first call: what it refuses by itself is refused
                    pass
    finally:
        await backend.aclose()


def _sessions_of(spec: EnvSpec, tasks: Sequence[Task] | None) -> list[SandboxSpec]:
    """Return the different sessions that tasks of an environment have, as far as they are known ahead."""
    cls = spec.env_class()
    if not issubclass(cls, ToolEnv):
        return []
    if cls.sandbox_of.__func__ is ToolEnv.sandbox_of.__func__:  # type: ignore[attr-defined]
        return [cls.sandbox_spec]
    if tasks is None:
        tasks = [task for split in spec.splits for task in itertools.islice(spec.tasks(split), _TASKS_AHEAD)]
    return list(dict.fromkeys(cls.sandbox_of(task) for task in tasks))
