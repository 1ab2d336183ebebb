"""Weights in shared memory: one flat buffer a version, described by a ``WeightsRef``.

The buffer is an anonymous memory file (``memfd_create``): its locator ``/proc/<pid>/fd/<n>`` is readable by
processes of the same user and it vanishes with its owner, so no crash can leave shared memory behind.

``open_weights`` reads a ``WeightsRef`` of any transport; the others are in ``disk.py`` and ``broadcast.py``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from areal_agents.engine import TensorEntry, WeightsRef
from areal_agents.errors import EngineError

_ALIGN = 64


def layout(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, *, align: int = _ALIGN
) -> tuple[tuple[TensorEntry, ...], int]:
    """Offsets of ``tensors`` cast to ``dtype`` in one buffer, each a multiple of ``align``; and its size in bytes."""
    entries: list[TensorEntry] = []
    offset = 0
    for name, tensor in tensors:
        entries.append(TensorEntry(name, tuple(tensor.shape), str(dtype).removeprefix("torch."), offset))
        size = tensor.numel() * dtype.itemsize
        offset += -(-size // align) * align
    return tuple(entries), offset


def views(buffer: Tensor, manifest: Iterable[TensorEntry]) -> dict[str, Tensor]:
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


def adler32(view: memoryview, value: int = 1) -> int:
    """Adler-32 of ``view`` after what gave ``value``; chunked, so that other threads get their turn."""
    for start in range(0, len(view), 1 << 24):
        value = zlib.adler32(view[start : start + (1 << 24)], value)
    return value


def checksum(view: memoryview) -> str:
    """Adler-32 over the whole buffer as a reference names it; 135M bf16 parameters take about 0.1 s."""
    return f"adler32:{adler32(view):08x}"


def check(ref: WeightsRef, view: memoryview) -> None:
    """Raise EngineError unless ``view`` has the checksum of ``ref``."""
    if (found := checksum(view)) != ref.checksum:
        raise EngineError(f"weights v{ref.version}: checksum {found}, expected {ref.checksum}, at {ref.locator}")


class OpenWeights(Protocol):
    """Weights that were read; a context manager."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By state-dict name; valid until the context closes."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_weights(ref: WeightsRef, *, verify: bool = True) -> OpenWeights:
    """Read ``ref``, whatever its transport. Blocks; every wait in it has a deadline.

    verify: compare the checksum (about 1 s for 2 GB). Shared memory is mapped; ``disk``, ``gloo`` and ``nccl`` copy
    ``ref.nbytes`` into this process's memory.
    Raises EngineError where the weights are gone, damaged or do not arrive in time.
    """
    if ref.transport == "shm":
        return AttachedWeights(ref, verify=verify)
    if ref.transport == "disk":
        from areal_agents.weights.disk import read_disk

        return read_disk(ref, verify=verify)
    from areal_agents.weights.broadcast import receive

    return receive(ref, verify=verify)


class SharedWeights:
    """One writable buffer, owned by the learner's process."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.manifest, self.nbytes = layout(tensors.items(), dtype)
        self._fd = os.memfd_create("areal-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(self.nbytes, 1))
        self._map = mmap.mmap(self._fd, max(self.nbytes, 1))
        self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._tensors = views(self._buffer, self.manifest)

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
            fd = os.open(ref.locator, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise EngineError(
                f"weights v{ref.version} at {ref.locator} are gone: {error.strerror}. Shared memory reaches processes "
                'of the same user and host alone; elsewhere set transport = "disk"'
            ) from error
        try:
            self._map = mmap.mmap(fd, ref.nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        except (ValueError, OSError) as error:
            raise EngineError(f"weights v{ref.version}: {ref.nbytes} bytes cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if verify:
            check(ref, memoryview(self._map))
        self.tensors = views(torch.frombuffer(self._map, dtype=torch.uint8), ref.manifest)

    def __enter__(self) -> AttachedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensors = {}


class LoadedWeights:
    """Weights that were copied into a buffer of this process; a context manager."""

    def __init__(self, ref: WeightsRef, buffer: Tensor) -> None:
        self.tensors = views(buffer, ref.manifest)

    def __enter__(self) -> LoadedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensors = {}
