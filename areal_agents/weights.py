"""Weights in shared memory: one flat buffer a version, described by a ``WeightsRef``.

The buffer is an anonymous memory file (``memfd_create``): its locator ``/proc/<pid>/fd/<n>`` is readable by
processes of the same user and it vanishes with its owner, so no crash can leave shared memory behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from types import TracebackType

import torch
from torch import Tensor

from areal_agents.engine import TensorEntry, WeightsRef
from areal_agents.errors import EngineError

_ALIGN = 64


def layout(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> tuple[tuple[TensorEntry, ...], int]:
    """Offsets of ``tensors`` cast to ``dtype`` in one buffer, and the buffer's size in bytes."""
    entries: list[TensorEntry] = []
    offset = 0
    for name, tensor in tensors:
        entries.append(TensorEntry(name, tuple(tensor.shape), str(dtype).removeprefix("torch."), offset))
        size = tensor.numel() * dtype.itemsize
        offset += -(-size // _ALIGN) * _ALIGN
    return tuple(entries), offset


def _views(buffer: Tensor, manifest: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Tensor views into a flat uint8 ``buffer``."""
    out: dict[str, Tensor] = {}
    for entry in manifest:
        dtype = getattr(torch, entry.dtype)
        numel = 1
        for n in entry.shape:
            numel *= n
        flat = buffer[entry.offset : entry.offset + numel * dtype.itemsize].view(dtype)
        out[entry.name] = flat.view(entry.shape)
    return out


def checksum(view: memoryview) -> str:
    """Adler-32 over the whole buffer, chunked; 135M bf16 parameters take about 0.1 s."""
    value = 1
    for start in range(0, len(view), 1 << 24):
        value = zlib.adler32(view[start : start + (1 << 24)], value)
    return f"adler32:{value:08x}"


class SharedWeights:
    """One writable buffer, owned by the learner's process."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.manifest, self.nbytes = layout(tensors.items(), dtype)
        self._fd = os.memfd_create("areal-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(self.nbytes, 1))
        self._map = mmap.mmap(self._fd, max(self.nbytes, 1))
        self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._tensors = _views(self._buffer, self.manifest)

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> WeightsRef:
        """Copy (and cast) ``tensors`` in and return the reference to them."""
        with torch.no_grad():
            for name, target in self._tensors.items():
                target.copy_(tensors[name])
        return WeightsRef(
            version=version,
            locator=f"/proc/{os.getpid()}/fd/{self._fd}",
            manifest=self.manifest,
            checksum=checksum(memoryview(self._map)[: self.nbytes]),
            nbytes=self.nbytes,
        )

    def close(self) -> None:
        """Drop the owner's mapping and descriptor; readers keep theirs until they close."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._tensors = {}
            self._buffer = torch.empty(0, dtype=torch.uint8)
            # The mapping holds a descriptor of its own. Whoever still reads a tensor of it ends it later.
            with contextlib.suppress(BufferError):
                self._map.close()


class AttachedWeights:
    """A read-only view of a ``WeightsRef``; a context manager. Raises EngineError when it is gone or damaged."""

    def __init__(self, ref: WeightsRef, *, verify: bool = True) -> None:
        try:
            fd = os.open(ref.locator, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EngineError(f"weights v{ref.version} at {ref.locator} are gone: {error.strerror}") from error
        try:
            self._map = mmap.mmap(fd, ref.nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        except (ValueError, OSError) as error:
            raise EngineError(f"weights v{ref.version}: {ref.nbytes} bytes cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if verify and (found := checksum(memoryview(self._map))) != ref.checksum:
            raise EngineError(f"weights v{ref.version}: checksum {found}, expected {ref.checksum}")
        self.tensors = _views(torch.frombuffer(self._map, dtype=torch.uint8), ref.manifest)

    def __enter__(self) -> AttachedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensors = {}
