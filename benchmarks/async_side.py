"""One run of ``benchmarks/async.py`` in a process of its own: ``train`` as a user calls it, and when the engine worked.

The engine is idle while it has no request. Requests are timed where the trainer makes them (``EnginePolicy.sample``).
The rest is read from what every run leaves behind, ``metrics.jsonl`` and the trajectories.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

from measure import covered, histogram
from measured_process import serve
from text_envs import LongTail

from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.token_policy import EnginePolicy
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.types import Completion, Prompt

requests: list[tuple[float, float]] = []
"""(start, end) of every request, ``time.time()``."""


class TimedPolicy:
    """``EnginePolicy.sample`` with its start and end noted."""

    plain = EnginePolicy.sample

    @staticmethod
    async def sample(self: EnginePolicy, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        start = time.time()
        try:
            return await TimedPolicy.plain(self, prompt, max_tokens, episode)
        finally:
            requests.append((start, time.time()))


def config_of(asked: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({
        "steps": asked["steps"], "seed": asked["seed"], "out": asked["out"],
        "model": {"path": asked["model"], "max_context": 1024},
        "env": {"id": "text_envs:LongTail"},
        "rollout": {
            "mode": "async" if asked["max_staleness"] else "sync", "max_staleness": asked["max_staleness"],
            "groups": asked["groups"], "group_size": asked["group_size"], "concurrency": asked["concurrency"],
            "max_turn_tokens": asked["turn_tokens"], "temperature": 1.0,
        },
        "engine": {"max_batch": asked["concurrency"]},
        "learner": {"lr": 1e-6},
        "eval": {"n": 1},
    })  # fmt: skip


def ages_of(out: Path) -> list[int]:
    """How many versions old each trained token was: step k trains on the weights of version k - 1."""
    return [
        record.step - 1 - version
        for record in read_records(out, kind="train")
        for turn in record.trajectory.turns
        for version in turn.completion.versions
    ]


def handle(asked: dict[str, Any]) -> dict[str, Any]:
    """Wall clock from the first training episode to the end of the last step, and who idled how long in it."""
    EnginePolicy.sample = TimedPolicy.sample  # type: ignore[method-assign]
    config = config_of(asked)
    asyncio.run(train(config, console=False))
    rows = read_metrics(config.out, kind="train")
    start, end = LongTail.first_train_reset, rows[-1]["time"]
    assert start is not None
    ages, turns = ages_of(config.out), Counter[int]()
    for record in read_records(config.out, kind="train"):
        turns[len(record.trajectory.turns)] += 1
    wall = end - start
    waited = sum(row["wait_seconds"] for row in rows)
    return {
        "wall_seconds": round(wall, 3),
        "engine_idle_seconds": round(wall - covered(requests, start, end), 3),
        "learner_idle_seconds": round(waited, 3),
        "updates": len(rows),
        "sampled_tokens": sum(row["sampled_tokens"] for row in rows),
        "age_histogram": histogram(ages),
        "age_max": max(ages),
        "turns_histogram": dict(sorted((str(k), v) for k, v in turns.items())),
        "step_seconds": [round(row["step_seconds"], 3) for row in rows],
        "wait_seconds": [round(row["wait_seconds"], 3) for row in rows],
        "ess": [row.get("off_policy/ess") for row in rows],
        "reward": [row["reward"] for row in rows],
    }


if __name__ == "__main__":
    serve(handle)
