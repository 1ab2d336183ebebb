"""What differs between two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from areal_agents.settings.config import TrainConfig


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return both values of each dotted key whose values differ, except ``out``."""
    a, b = values(old), values(new)
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k) and k != "out"}


def values(config: TrainConfig) -> dict[str, Any]:
    """Return every setting by its dotted key, as JSON has it."""
    return _flat(config.model_dump(mode="json"))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and prefix + name != "env.kwargs":
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
