"""Two rollout workers on a real Ray, for tests that lose, add and remove them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Sampling
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.spec import EngineSpec
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import PlayerSpec
from areal_agents.types import Task, Trajectory

pytest.importorskip("ray")
from areal_agents.cluster.engine_actors import Resources
from areal_agents.cluster.pool_actor import PoolSettings, RemotePool
from areal_agents.cluster.rollout_workers import RolloutWorkers
from tests.cluster.conftest import RaySession

LIMITS = Limits(
    max_context=256, max_turn_tokens=16, max_episode_tokens=64, max_turns=8, step_timeout=300.0, request_timeout=300.0
)
ENV = "tests.cluster.worker_envs:Reported"


class Fleet:
    """Two workers, an engine pool of one actor, and the loop that they belong to."""

    def __init__(self, session: RaySession, model: Path) -> None:
        self.model, self.run = model, session.run
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.unrecorded: set[str] = set()
        """Kinds of events that cannot be recorded."""
        options: dict[str, Any] = {"precision": "fp32", "max_batch": 8, "kv_tokens": 4096, "max_context": 256}
        options["shape"] = Shape.read(model, 256)  # else the actor would import transformers to read it
        engines = PoolSettings(EngineSpec("transformers", str(model), options), 1, resources=Resources(0))
        self.engine = self.run(RemotePool.start(engines, event=self.event))
        self.workers = RolloutWorkers(
            self.engine, registry.spec(ENV), workers=2, episodes_per_worker=4, event=self.event, num_cpus=0,
            hang_seconds=10.0, health_interval=0.2, max_restarts=3,
        )  # fmt: skip
        self.run(self.workers.__aenter__())

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))
        if kind in self.unrecorded:
            raise OSError("No space left on device")

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():  # noqa: ASYNC110  what other processes do
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self.run(self.workers.close())
        self.run(self.engine.close())


def spec(fleet: Fleet, env: str = ENV, **changes: Any) -> PlayerSpec:
    sampling = Sampling(16, temperature=0.0, stop_ids=ChatFormat.load(fleet.model).stop_ids)
    return replace(PlayerSpec(registry.spec(env), fleet.model, LIMITS, sampling), **changes)


def tasks() -> list[Task]:
    return list(registry.spec(ENV).tasks("train"))


def log(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def count(folder: Path, what: str) -> int:
    return sum(line[0] == what for line in log(folder))


def said(trajectory: Trajectory) -> tuple[Any, ...]:
    """Everything that must not depend on where it was played."""
    turns = [
        (t.prompt_suffix, t.completion.ids, t.completion.versions, t.reward, t.observation, t.message)
        for t in trajectory.turns
    ]
    return trajectory.id, trajectory.task, turns, trajectory.terminated, trajectory.stop_reason
