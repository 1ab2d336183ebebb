"""Model folders and learner states on disk."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from areal_agents.errors import ModelError

WEIGHTS = "model.safetensors"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, source: Path, dtype: torch.dtype) -> None:
    """Write a transformers folder, which ``AutoModelForCausalLM.from_pretrained`` loads.

    The configuration is the source's with its dtype changed.

    Args:
        folder: an existing folder.
        tensors: the weights by state-dict name.
        source: the model folder whose small files are copied. Our cache's manifest.json is not, because it holds the
            checksums of the source.
        dtype: the weights are cast to it.
    """
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and file.name not in ("config.json", "manifest.json"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # A GPU that training filled has no room for a second model.
    cast = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes the file readable by its owner alone, but it is to be as open as the folder's other files.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def count_parameters(folder: Path) -> int:
    """Return how many numbers the weights in ``folder`` are, by the headers of its safetensors files.

    Of other files it is the least that they can hold, at four bytes a number.
    """
    if shapes := _shapes(folder):
        return sum(map(math.prod, shapes))
    return sum(file.stat().st_size // 4 for file in folder.glob("*.bin"))


def count_adapters(folder: Path, rank: int) -> int:
    """Return the most numbers that adapters of ``rank`` can be for the weights in ``folder``: one for every matrix.

    Without safetensors files it is the number of weights.
    """
    shapes = _shapes(folder)
    return sum(rank * sum(s) for s in shapes if len(s) == 2) if shapes else count_parameters(folder)


def _shapes(folder: Path) -> list[list[int]]:
    shapes: list[list[int]] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return shapes


def is_bf16(folder: Path) -> bool:
    """Say whether the folder's weights are safetensors files with bf16 numbers alone."""
    formats: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            formats |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return formats == {"BF16"}


def write_state(path: Path, state: Mapping[str, object]) -> None:
    """Write ``state`` to ``path`` with ``torch.save``.

    Raises OSError where the disk refuses.
    """
    with path.open("wb") as file:  # given the path instead, torch would hide the reason
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_weights(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Copy a folder's weights into ``into``.

    Raises ModelError unless names and shapes are the same.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        adapters = (folder / "adapter_config.json").is_file()
        hint = "it is of adapters: set learner.lora as it was" if adapters else "give the folder that the learner saved"
        raise ModelError(f"{folder} holds no {WEIGHTS}: {hint}")
    found = load_file(file)
    wrong = sorted(set(found) ^ set(into)) + sorted(
        n for n in set(found) & set(into) if found[n].shape != into[n].shape
    )
    if wrong:
        raise ModelError(f"{folder} is of another model: {len(wrong)} tensors differ, first {wrong[0]!r}")
    with torch.no_grad():
        for name, target in into.items():
            target.copy_(found[name])
