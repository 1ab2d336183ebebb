"""A copy of the weights that train, which the model computes with for a while.

It costs no more than the copy itself, 4 bytes a number: the rest of the model is shared. Where adapters train, that is
the adapters alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from areal_agents.errors import ModelError


class WeightCopy:
    """The weights of a model that train, as they were when the copy was taken."""

    def __init__(self, model: nn.Module) -> None:
        """Take the copy of ``model`` as it is now."""
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.tensors = {n: p.detach().clone() for n, p in self._own.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the copy in the place of its weights while the context is open. Take no gradient in it."""
        kept = {name: parameter.data for name, parameter in self._own.items()}
        try:
            for name, parameter in self._own.items():
                parameter.data = self.tensors[name]
            yield
        finally:
            for name, parameter in self._own.items():
                parameter.data = kept[name]

    @torch.no_grad()
    def move(self, share: float = 1.0) -> None:
        """Move the copy by ``share`` of the way to the model's weights as they are now."""
        for name, parameter in self._own.items():
            if share == 1.0:
                self.tensors[name].copy_(parameter)
            else:
                self.tensors[name].lerp_(parameter, share)

    def save(self, file: Path) -> None:
        """Write the copy."""
        save_file({n: t.cpu().contiguous() for n, t in self.tensors.items()}, file)

    def load(self, file: Path) -> None:
        """Read what ``save`` wrote. Raises ModelError where it is of other weights."""
        found = load_file(file)
        if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in self.tensors.items()}:
            raise ModelError(f"{file} is of another model, or of other adapters")
        for name, copied in self.tensors.items():
            copied.copy_(found[name])
