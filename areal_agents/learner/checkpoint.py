"""Model folders and learner checkpoints on disk, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from areal_agents.errors import ModelError

WEIGHTS = "model.safetensors"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill; on a clean exit it is on disk and at ``path``, else it is gone.

    A folder already at ``path`` is replaced: it is moved aside first, so a crash between two renames leaves it under
    ``.NAME.old-PID`` beside the complete new one, ``.NAME.tmp-PID``.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in [*new.rglob("*"), new]:
            _fsync(file)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(new, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``; readers and crashes see the old content or the new. Raises OSError."""
    new = path.with_name(f".{path.name}.tmp")
    try:
        new.write_text(text, encoding="utf-8")
        _fsync(new)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    os.replace(new, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, source: Path, dtype: torch.dtype) -> None:
    """Write a transformers folder: ``tensors`` cast to ``dtype``, and the small files of ``source``
    (not our cache's manifest.json, which holds the checksums of the source).

    The configuration is the source's with its dtype changed, so ``AutoModelForCausalLM.from_pretrained`` loads it.
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
    # safetensors makes the file readable by its owner alone; the folder is to be as open as its other files.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def write_state(path: Path, state: Mapping[str, object]) -> None:
    """``torch.save`` to ``path``. Raises OSError where the disk refuses: given a path, torch hides the reason."""
    with path.open("wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def read_weights(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Copy a folder's weights into ``into``. Raises ModelError unless names and shapes are the same."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS}: give the folder that the learner saved")
    found = load_file(file)
    wrong = sorted(set(found) ^ set(into)) + sorted(
        n for n in set(found) & set(into) if found[n].shape != into[n].shape
    )
    if wrong:
        raise ModelError(f"{folder} is of another model: {len(wrong)} tensors differ, first {wrong[0]!r}")
    with torch.no_grad():
        for name, target in into.items():
            target.copy_(found[name])
