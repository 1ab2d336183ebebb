"""The parameters of a model's folder, read without transformers.

Importing transformers takes longer than all else of a start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from areal_agents.engines.cpu.architecture import Shape
from areal_agents.errors import EngineError


def read_parameters(model: str, shape: Shape) -> Mapping[str, Tensor] | None:
    """Return what the safetensors files of ``model`` hold, if that is ``shape``'s parameters and nothing else.

    Returns None where it is not (a hub id, an adapter, quantized weights, older formats and names). Transformers knows
    how to read those.
    """
    folder = Path(model)
    if (folder / "adapter_config.json").exists():
        return None
    try:
        tensors: dict[str, Tensor] = {}
        for name in _files(folder):
            tensors |= load_file(folder / name)
        fits = all(tensor.is_floating_point() for tensor in shape.complete(tensors).values())
    except (OSError, SafetensorError, EngineError, ValueError, KeyError, TypeError):
        return None
    return tensors if fits else None


def _files(folder: Path) -> list[str]:
    single, index = "model.safetensors", folder / "model.safetensors.index.json"
    if (folder / single).exists() or not index.exists():
        return [single]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
