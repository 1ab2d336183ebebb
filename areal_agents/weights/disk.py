"""Weights on disk, as one safetensors file a version on a file system that learner and engines share.

    weights_dir/areal-weights-<id>/owner.json          locked (flock) for as long as its owner lives
                                  /v7-3.safetensors    what the third ``fill`` wrote: version 7

A buffer holds one version. Its file is written under another name, flushed and renamed, so readers see it whole or not
at all. The next ``fill`` removes it first. Any program that reads safetensors can read it.

A killed owner leaves its folder. The next start in the same ``weights_dir`` removes the folders whose lock is free and
that this machine made. Over a network a lock may be visible on its own node alone, so folders of other nodes are left
to a start over there, or to you.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from areal_agents.engine import WeightsRef
from areal_agents.errors import ConfigError, EngineError
from areal_agents.utils.files import atomic_file
from areal_agents.weights.base import LoadedWeights, adler32, check, layout

_PREFIX = "areal-weights-"
_OWNER = "owner.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""The names that safetensors gives to formats."""


class DiskWeights:
    """One version in a folder of its own under ``weights_dir``, owned by the learner's process."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, weights_dir: Path) -> None:
        """Make the folder, and remove what killed owners left beside it.

        ``tensors`` has the names and shapes of what ``fill`` will get. Raises ConfigError where the folder cannot be
        made.
        """
        if dtype not in _NAMES:
            raise ConfigError(f"weights cannot be published as {dtype}: use one of {', '.join(map(str, _NAMES))}")
        self._dtype = dtype
        # safetensors allows no holes between tensors.
        self.manifest, self.nbytes = layout(tensors.items(), dtype, align=1)
        self._fills = 0
        self._file: Path | None = None
        try:
            weights_dir = weights_dir.absolute()
            weights_dir.mkdir(parents=True, exist_ok=True)
            remove_leftovers(weights_dir)
            self.folder, self._lock = _new_folder(weights_dir)
        except OSError as error:
            raise ConfigError(
                f"the weights' folder {weights_dir} cannot be used: {error.strerror}. Choose an --out that "
                "this user may write and every engine may read"
            ) from error

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> WeightsRef:
        """Write ``tensors``, cast one after the other, and return the reference to them.

        The version that this buffer held is gone from the start of the call on. Raises EngineError where the disk
        refuses.
        """
        self._fills += 1
        path = self.folder / f"v{version}-{self._fills}.safetensors"
        try:
            if self._file is not None:
                self._file.unlink(missing_ok=True)
            # A plain file: engines may run as another user, and safetensors' own writer lets its user alone read.
            with atomic_file(path) as file:
                found = self._write(file, tensors, version)
        except OSError as error:
            raise EngineError(self._refused(version, error)) from error
        self._file = path
        return WeightsRef(version, str(path), self.manifest, f"adler32:{found:08x}", self.nbytes, transport="disk")

    def close(self) -> None:
        """Remove the folder.

        May be called twice.
        """
        if self._lock >= 0:
            os.close(self._lock)  # first: NFS keeps a folder whose files are open
            self._lock = -1
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, file: BinaryIO, tensors: Mapping[str, Tensor], version: int) -> int:
        found = 1
        file.write(self._header(version))
        with torch.no_grad():
            for entry in self.manifest:
                cast = tensors[entry.name].detach().to(self._dtype).cpu().contiguous()  # cast where it lies
                data = cast.reshape(-1).view(torch.uint8).numpy().data
                found = adler32(data, found)
                file.write(data)
        return found

    def _header(self, version: int) -> bytes:
        """Return the header of a safetensors file.

        It is the length of the JSON that follows (u64, little-endian), the JSON, and spaces up to a multiple of 8
        bytes.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt", "version": str(version)}}
        for entry in self.manifest:
            size = self._dtype.itemsize * torch.Size(entry.shape).numel()
            header[entry.name] = {
                "dtype": _NAMES[self._dtype],
                "shape": list(entry.shape),
                "data_offsets": [entry.offset, entry.offset + size],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _refused(self, version: int, error: OSError) -> str:
        text = f"weights v{version} cannot be written to {self.folder}: {error.strerror}"
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
            text += f" ({self.nbytes >> 20} MiB needed, {free >> 20} MiB free there)"
        return f"{text}. Make room there, or choose an --out on another disk; two versions lie there at a time"


def read_disk(ref: WeightsRef, *, verify: bool = True) -> LoadedWeights:
    """Read a version into this process, whatever happens to the file afterwards.

    A mapping would be cheaper but deadly, because a file that another node removes ends its readers by SIGBUS.
    Raises EngineError where the file is gone, of another size or damaged.
    """
    buffer = torch.empty(ref.nbytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with open(ref.locator, "rb", buffering=0) as file:
            header = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if size != 8 + header + ref.nbytes:
                raise EngineError(
                    f"weights v{ref.version} at {ref.locator}: {size} bytes, expected {8 + header + ref.nbytes}: the "
                    "file is damaged"
                )
            file.seek(8 + header)
            done = 0
            while done < ref.nbytes and (n := file.readinto(view[done : done + (1 << 26)])):
                done += n
    except OSError as error:
        raise EngineError(
            f"weights v{ref.version} at {ref.locator} are gone: {error.strerror}. `out` must be the same folder on "
            "the learner's and on every engine's node"
        ) from error
    if done < ref.nbytes:
        raise EngineError(f"weights v{ref.version} at {ref.locator} end after {done} of {ref.nbytes} bytes")
    if verify:
        check(ref, view)
    return LoadedWeights(ref, buffer)


def remove_leftovers(weights_dir: Path) -> list[Path]:
    """Remove the folders that dead owners on this machine left in ``weights_dir``, and return them.

    An owner is dead when its lock is free. The kernel drops the lock with the process, however it ended.
    """
    import fcntl  # not on every system

    removed = []
    for folder in sorted(weights_dir.glob(f"{_PREFIX}*")):
        try:
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # removed meanwhile, no folder of ours, or of another user
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _made_here(os.read(lock, 4096)):
                removed.append(folder)
        except OSError:  # its owner lives, or the file system knows no locks
            continue
        finally:
            os.close(lock)
    for folder in removed:  # a dead owner takes no lock again
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def _machine() -> dict[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot": boot}


def _made_here(owner: bytes) -> bool:
    """Say whether ``owner`` names this machine, by its boot or by its host name."""
    try:
        found = json.loads(owner)
    except ValueError:
        return False
    here = _machine()
    return isinstance(found, dict) and any(here[key] and found.get(key) == here[key] for key in here)


def _new_folder(weights_dir: Path) -> tuple[Path, int]:
    """Make a folder and return it with the descriptor that holds its lock.

    It gets its name once it is locked, so that no other start may find it free.
    """
    import fcntl  # not on every system

    name = uuid.uuid4().hex[:12]
    hidden, folder = weights_dir / f".new-{name}", weights_dir / f"{_PREFIX}{name}"
    hidden.mkdir()
    lock = os.open(hidden / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(lock, json.dumps({**_machine(), "pid": os.getpid()}).encode())
        with contextlib.suppress(OSError):  # without locks nobody takes the folder for a leftover
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(hidden, folder)
    except OSError:
        os.close(lock)
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return folder, lock
