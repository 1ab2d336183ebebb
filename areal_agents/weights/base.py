"""Weights in one flat buffer, with the place of each tensor in it, its checksum and its readers."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Protocol, Self

import torch
from torch import Tensor

from areal_agents.engine import TensorEntry, WeightsRef
from areal_agents.errors import EngineError

_ALIGN = 64


def layout(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, align: int = _ALIGN
) -> tuple[tuple[TensorEntry, ...], int]:
    """Return the places of ``tensors`` in one buffer, and the buffer's size in bytes.

    The tensors are cast to ``dtype``. Each offset is a multiple of ``align`` bytes.
    """
    entries: list[TensorEntry] = []
    offset = 0
    for name, tensor in tensors:
        entries.append(TensorEntry(name, tuple(tensor.shape), str(dtype).removeprefix("torch."), offset))
        size = tensor.numel() * dtype.itemsize
        offset += -(-size // align) * align
    return tuple(entries), offset


def views(buffer: Tensor, manifest: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Return tensor views into a flat uint8 ``buffer``, by name."""
    out: dict[str, Tensor] = {}
    for entry in manifest:
        dtype = getattr(torch, entry.dtype)
        numel = 1
        for n in entry.shape:
            numel *= n
        flat = buffer[entry.offset : entry.offset + numel * dtype.itemsize].view(dtype)
        out[entry.name] = flat.view(entry.shape)
    return out


def adler32(view: memoryview, value: int = 1) -> int:
    """Return the Adler-32 of ``view`` appended to the bytes that gave ``value``.

    It goes chunk by chunk, so that other threads get their turn.
    """
    for start in range(0, len(view), 1 << 24):
        value = zlib.adler32(view[start : start + (1 << 24)], value)
    return value


def checksum(view: memoryview) -> str:
    """Return the Adler-32 over the whole buffer, as a reference names it.

    135M bf16 parameters take about 0.1 s.
    """
    return f"adler32:{adler32(view):08x}"


def check(ref: WeightsRef, view: memoryview) -> None:
    """Raise EngineError unless ``view`` has the checksum of ``ref``."""
    if (found := checksum(view)) != ref.checksum:
        raise EngineError(f"weights v{ref.version}: checksum {found}, expected {ref.checksum}, at {ref.locator}")


class OpenWeights(Protocol):
    """Weights that were read, as a context manager."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by state-dict name, valid until the context closes."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class LoadedWeights:
    """Weights in a buffer of this process, as a context manager."""

    def __init__(self, ref: WeightsRef, buffer: Tensor) -> None:
        self.tensors = views(buffer, ref.manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.tensors = {}
