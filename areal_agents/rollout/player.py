"""Who plays an episode: the contract, the player of this process, and a recipe that travels to another one.

``EpisodeRunner`` (``retries.py``) counts and retries; a player makes one attempt. ``LocalPlayer`` keeps environments
on a thread of its own; a ``PlayerSpec`` is plain data and builds one wherever it is opened.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Engine, Sampling
from areal_agents.env import AgentEnv
from areal_agents.errors import ConfigError, FailureBudgetError, InfraError
from areal_agents.registry import EnvSpec
from areal_agents.rollout.demonstrations import ExpertPolicy
from areal_agents.rollout.env_host import EnvHost, HostLost
from areal_agents.rollout.episode import EnginePolicy, Limits, Policy, run_episode
from areal_agents.sandbox import SandboxBackend
from areal_agents.settings.config import TrainConfig
from areal_agents.types import Task, Trajectory

EventSink = Callable[..., None]
"""``event(kind, **fields)``: one line in the run's event log."""

_MAX_HOSTS_LOST = 20


def no_events(kind: str, **fields: object) -> None:
    """An event sink for callers without a log."""


class EpisodePlayer(Protocol):
    """Plays episodes, many at once."""

    async def play(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory:
        """One attempt at one episode; ``id`` is the attempt's own and the engine's session.

        Raises InfraError (try again) and RewardError (trying again is useless). Cancelling it closes the environment
        and aborts the engine's request.
        """
        ...

    async def close(self) -> None:
        """Cancel what still plays and end what the environments share (sandbox pools). Raises nothing deliberate."""
        ...


class HostPlayer:
    """Keeps environments on an ``EnvHost`` of this process, which is replaced when an environment wedges it.

    event: is told host_lost (an innocent episode starts again, at no cost), host_replaced and close_failed.
    """

    def __init__(self, make_env: Callable[[], AgentEnv], limits: Limits, *, event: EventSink = no_events) -> None:
        self._make_env, self._limits, self._event = make_env, limits, event
        self._host = EnvHost()
        self._hosts_lost = 0

    async def play(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory:
        """One attempt; see ``EpisodePlayer``. Raises FailureBudgetError where hosts are lost again and again."""
        while True:
            host = self._healthy_host()
            try:
                return await self._attempt(task, host, id=id, group=group, seed=seed)
            except HostLost:
                self._event("host_lost", episode=id, task=task.id)

    async def _attempt(self, task: Task, host: EnvHost, *, id: str, group: str, seed: int) -> Trajectory:
        """One attempt on ``host``. Raises HostLost, besides what ``play`` raises."""
        raise NotImplementedError

    def _healthy_host(self) -> EnvHost:
        if self._host.wedged:
            self._hosts_lost += 1
            if self._hosts_lost > _MAX_HOSTS_LOST:
                raise FailureBudgetError(
                    f"environments blocked their event loop {self._hosts_lost} times: fix the environment's blocking "
                    "calls (events.jsonl names the tasks)"
                )
            self._event("host_replaced", lost=self._hosts_lost)
            self._host = EnvHost()
        return self._host

    async def close(self) -> None:
        """End what environments share (sandbox pools) and stop the host."""
        try:
            await self._host.close(_close_sandboxes)
        except InfraError as error:  # noted, not raised: it must not hide why the run ends
            self._event("close_failed", error=type(error).__name__, detail=str(error))


class LocalPlayer(HostPlayer):
    """Plays turns of token ids. ``policy``: whoever takes those of one attempt at the task; called once an attempt."""

    def __init__(
        self,
        make_env: Callable[[], AgentEnv],
        policy: Callable[[Task], Policy],
        fmt: ChatFormat,
        limits: Limits,
        *,
        event: EventSink = no_events,
    ) -> None:
        super().__init__(make_env, limits, event=event)
        self._policy, self._fmt = policy, fmt

    async def _attempt(self, task: Task, host: EnvHost, *, id: str, group: str, seed: int) -> Trajectory:
        return await run_episode(
            self._make_env, task, self._policy(task), self._fmt, self._limits, id=id, group=group, seed=seed, host=host
        )


async def _close_sandboxes() -> None:
    await importlib.import_module("areal_agents.sandboxes").close_shared()


@dataclass(frozen=True, slots=True)
class PlayerSpec:
    """A ``LocalPlayer`` as plain data. It is picklable where the environment's keyword arguments are."""

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

    def build(self, engine: Engine, *, fmt: ChatFormat | None = None, event: EventSink = no_events) -> LocalPlayer:
        """The player, on this process. ``fmt``: the format of ``model`` where the caller has loaded it.

        Raises ModelError where ``model`` has no tokenizer and RegistryError where the environment cannot be imported.
        """
        fmt = fmt or ChatFormat.load(self.model)
        make_env = env_maker(self.env, sandbox=self.sandbox, kwargs=self.kwargs)

        def policy(task: Task) -> Policy:
            return self._expert(task, fmt) if self.policy == "expert" else EnginePolicy(engine, self.sampling)

        return LocalPlayer(make_env, policy, fmt, self.limits, event=event)

    def _expert(self, task: Task, fmt: ChatFormat) -> Policy:
        expert = self.env.expert(task)
        if expert is None:
            raise ConfigError(f"{self.env.id} has no expert: set warm_start.demonstrations = 0")
        return ExpertPolicy(expert, fmt)


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


def env_maker(spec: EnvSpec, *, sandbox: str, kwargs: Mapping[str, Any]) -> Callable[[], AgentEnv]:
    """A constructor of ``spec``'s environment; ``sandbox`` is passed where the environment takes one."""
    given = dict(kwargs)
    if "sandbox" in inspect.signature(spec.env_class()).parameters:
        given.setdefault("sandbox", sandbox)
    return lambda: spec.make(**given)


async def prove_sandbox(spec: EnvSpec, sandbox: str) -> None:
    """Probe the backend before anything slow starts, where a tool of ``spec`` needs one. Raises SandboxUnavailable."""
    cls = spec.env_class()
    if "sandbox" not in inspect.signature(cls).parameters or not any(t.needs_sandbox for t in cls.tools):
        return
    backend: SandboxBackend = importlib.import_module("areal_agents.sandboxes").get(sandbox)
    try:
        await backend.probe()
    finally:
        await backend.aclose()
