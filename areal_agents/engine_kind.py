"""The facts that a run must know of an engine before one is started.

Each engine states them in its own folder (``kind.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

KindName = Literal["transformers", "vllm"]

_PLACES: Mapping[KindName, str] = {
    "transformers": "areal_agents.engines.cpu.kind",
    "vllm": "areal_agents.engines.vllm.kind",
}


def _nothing(model: Path, max_context: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class EngineKind:
    """The facts of one engine."""

    engine: str
    """``module:Class``, whose ``start(model, seed=…, **options)`` starts a process."""
    start_seconds: float
    """How long a start may take."""
    takes_gpus: bool
    """Whether it computes on GPUs where there are some."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Settings of ``[engine]`` that no other engine reads, and the arguments of ``start`` that they are."""
    prepare: Callable[[Path, int], dict[str, Any]] = _nothing
    """Further arguments of ``start``, read once from the model's folder and ``max_context`` for all replicas."""

    def load(self) -> Any:
        """Import the engine's class."""
        module, _, name = self.engine.partition(":")
        return getattr(importlib.import_module(module), name)


def engine_kind(name: KindName) -> EngineKind:
    """Look up an engine's facts, and import no engine."""
    found: EngineKind = importlib.import_module(_PLACES[name]).KIND
    return found


def owner_of(setting: str) -> KindName | None:
    """Name the engine that alone reads ``engine.SETTING``, or return None where all do."""
    return next((name for name in get_args(KindName) if setting in engine_kind(name).own), None)
