"""What differs between two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from areal_agents.settings.config import MixedEnv, TrainConfig


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return both values of each dotted key whose values differ, except ``out``."""
    a, b = values(old), values(new)
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k) and k != "out"}


def values(config: TrainConfig) -> dict[str, Any]:
    """Return every setting by its dotted key, as JSON has it.

    Those of several environments are ``env.LABEL.NAME``, and ``env.labels`` has their order.
    """
    tree = config.model_dump(mode="json")
    mixture = tree.pop("mixture")
    if not mixture:
        return _flat(tree)
    del tree["env"]
    mixed = {f"env.{one['label']}.{name}": value for one in mixture for name, value in one.items() if name != "label"}
    return _flat(tree) | {"env.labels": [one["label"] for one in mixture]} | mixed


def plain_key(key: str) -> str:
    """Return what a setting of one of several environments is of a single one: ``env.split`` of ``env.math.split``."""
    parts = key.split(".")
    return f"env.{parts[2]}" if len(parts) == 3 and parts[0] == "env" and parts[2] in MixedEnv.model_fields else key


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and prefix + name != "env.kwargs":
            out |= _flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
