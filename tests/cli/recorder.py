"""What stands in for a training or an evaluation where the command line alone is tested."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

from areal_agents.settings.config import EnvConfig, TrainConfig


@dataclass
class Recorder:
    """Stands where ``train`` and ``evaluate`` are imported from; keeps what it was called with."""

    calls: list[Any] = field(default_factory=list)
    error: BaseException | None = None

    async def train(self, config: TrainConfig, *, resume: bool = False) -> Any:
        self.calls.append(config)
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(table=lambda: "TABLE", out=config.out, model=config.out / "model")

    async def evaluate(self, env: EnvConfig, **kwargs: Any) -> Any:
        print("progress")
        self.calls.append((env, kwargs))
        return types.SimpleNamespace(
            table=lambda: "TABLE",
            to_json=lambda: {"pass_at_1": 0.5, "pass_at_k": float("nan")},
            served="a at b",
            infra_rate=0.0,
        )
