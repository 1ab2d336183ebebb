"""The facts of the ``transformers`` engine.

Importing them imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from areal_agents.engine_kind import EngineKind


def _shape(model: Path, max_context: int) -> dict[str, Any]:
    from areal_agents.engines.cpu.architecture import Shape  # reading it imports transformers

    return {"shape": Shape.read(model, max_context)}


KIND = EngineKind(
    engine="areal_agents.engines.cpu.engine:TransformersEngine",
    start_seconds=300.0,
    takes_gpus=False,
    prepare=_shape,
)
