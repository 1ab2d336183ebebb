"""Weights in one flat buffer, with the place of each tensor in it, its checksum and its readers."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, Self

import torch
from torch import Tensor

from areal_agents.engine import TensorEntry, WeightsRef
from areal_agents.errors import EngineError
from areal_agents.utils.system import available_cores

_ALIGN = 64
_ADLER = 65521
_CHUNK = 1 << 24
_SUMMERS = 8
"""Threads of one checksum: memory feeds no more, and the engine beside it needs cores too."""


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


def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into ``targets`` of the same names, cast to their formats.

    A tensor on a GPU is cast there: a plain copy would bring its fp32 numbers over and cast them on one core, which
    took 4.8 s instead of 0.2 s for 3 GB (benchmarks/results/gpu.json).
    """
    with torch.no_grad():
        for name, target in targets.items():
            source = tensors[name]
            target.copy_(source if source.device.type == "cpu" else source.to(target.dtype))


def adler32(view: memoryview, value: int = 1) -> int:
    """Return the Adler-32 of ``view`` appended to the bytes that gave ``value``.

    Its chunks are summed on several cores, up to eight, without the interpreter's lock.
    """
    chunks = [view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK)]
    workers = min(len(chunks), available_cores(), _SUMMERS)
    if workers <= 1:
        for chunk in chunks:
            value = zlib.adler32(chunk, value)
        return value
    with ThreadPoolExecutor(workers, thread_name_prefix="adler32") as pool:
        for chunk, found in zip(chunks, pool.map(zlib.adler32, chunks), strict=True):
            value = _joined(value, found, len(chunk))
    return value


def _joined(first: int, second: int, length: int) -> int:
    """Return the Adler-32 of two parts one after the other, from each part's own and the second's length.

    With a = 1 + Σ byte and b = Σ a after each byte (RFC 1950, section 8.2): a = a₁ + a₂ − 1 and
    b = b₁ + b₂ + length · (a₁ − 1), modulo 65521.
    """
    a = (first & 0xFFFF) + (second & 0xFFFF) - 1
    b = (first >> 16) + (second >> 16) + length * ((first & 0xFFFF) - 1)
    return (b % _ADLER) << 16 | a % _ADLER


def checksum(view: memoryview) -> str:
    """Return the Adler-32 over the whole buffer, as a reference names it.

    One core sums 2.5 to 3.5 GB a second.
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
