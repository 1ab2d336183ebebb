"""Weights in shared memory, one flat buffer a version, described by a ``WeightsRef``.

The buffer is an anonymous memory file (``memfd_create``). Its locator ``/proc/<pid>/fd/<n>`` is readable by processes
of the same user. It vanishes with its owner, so no crash can leave shared memory behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from areal_agents.engine import WeightsRef
from areal_agents.errors import EngineError
from areal_agents.weights.base import LoadedWeights, check, checksum, fill, layout, views


class SharedWeights:
    """A writable buffer, owned by the learner's process."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.manifest, self.nbytes = layout(tensors.items(), dtype)
        self._fd = os.memfd_create("areal-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(self.nbytes, 1))
        self._map = mmap.mmap(self._fd, max(self.nbytes, 1))
        self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._tensors = views(self._buffer, self.manifest)

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> WeightsRef:
        """Copy (and cast) ``tensors`` in and return the reference to them."""
        fill(self._tensors, tensors)
        return WeightsRef(
            version=version,
            locator=f"/proc/{os.getpid()}/fd/{self._fd}",
            manifest=self.manifest,
            checksum=checksum(memoryview(self._map)[: self.nbytes]),
            nbytes=self.nbytes,
        )

    def close(self) -> None:
        """Drop the owner's mapping and descriptor.

        Readers keep theirs until they close.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._tensors = {}
            self._buffer = torch.empty(0, dtype=torch.uint8)
            # The mapping holds a descriptor of its own. Whoever still reads a tensor of it ends it later.
            with contextlib.suppress(BufferError):
                self._map.close()


class AttachedWeights(LoadedWeights):
    """A read-only view of a ``WeightsRef``, as a context manager.

    Raises EngineError when the weights are gone or damaged.
    """

    def __init__(self, ref: WeightsRef, *, verify: bool = True) -> None:
        try:
            fd = os.open(ref.locator, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise EngineError(
                f"weights v{ref.version} at {ref.locator} are gone: {error.strerror}. Shared memory reaches processes "
                'of the same user and host alone; elsewhere set transport = "disk"'
            ) from error
        try:
            mapping = mmap.mmap(fd, ref.nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        except (ValueError, OSError) as error:
            raise EngineError(f"weights v{ref.version}: {ref.nbytes} bytes cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        if verify:
            check(ref, memoryview(mapping))
        super().__init__(ref, torch.frombuffer(mapping, dtype=torch.uint8))
