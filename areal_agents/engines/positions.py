"""The number of positions that a model's configuration allows.

It imports next to nothing, since the engines' workers read it while they start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SIZES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a model's configuration allows, or None where it does not say.

    YaRN stretches them by its factor, also where ``max_position_embeddings`` still holds the number before that.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, Mapping) else config
    base = next((v for name in _SIZES if isinstance(v := config.get(name), int) and v > 0), None)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if base is None or not isinstance(rope, Mapping):
        return base
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    yarn = rope.get("rope_type", rope.get("type")) == "yarn"
    if not yarn or not isinstance(factor, int | float):
        return base
    return max(base, int((original if isinstance(original, int) else base) * factor))


def read_positions(model: Path) -> int | None:
    """Return ``positions_of`` the model in a folder, or None where its configuration cannot be read."""
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with it
    return positions_of(config) if isinstance(config, dict) else None
