"""What becomes of the folders that an image declares as volumes, which an engine would put on its disk, unbounded.

A file system in memory is mounted at each instead. That is refused where it would hide a folder of ours, or where an
engine cannot do it: here by the name of the folder, and in a started container by what is mounted (a folder of the
image may be a link to another one).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from areal_agents.errors import SandboxUnavailable

SCRATCH: Final = ("/work", "/tmp", "/dev/shm")
"""What code of a session may write to."""
PYTHON_AT: Final = "/.areal-agents"
"""Where the Python of pid 1 is mounted in an image that is not ours."""
_TAKEN: Final = ("/proc", "/sys", "/dev", PYTHON_AT)
_IN_MEMORY: Final = ("tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2")
Mount = tuple[str, str, bool]
"""Where, the kind of file system, and whether it can be written."""


def volumes(image: str, declared: Iterable[str]) -> tuple[str, ...]:
    """Return the folders of an image's volumes as absolute paths.

    Raises SandboxUnavailable for one at which nothing can be mounted.
    """
    found: dict[str, None] = {}
    for volume in declared:
        path = re.sub("^/+", "/", posixpath.normpath(posixpath.join("/", volume)))
        taken = next((own for own in _TAKEN if path == own or path.startswith(f"{own}/")), "")
        if path == "/" or (taken and not f"{path}/".startswith("/dev/shm/")):
            raise refused(image, volume, f"nothing can be mounted at {path}")
        if not volume.startswith("/"):
            raise refused(image, volume, "it is a relative path, which an engine would put on its disk all the same")
        found[path] = None
    return tuple(found)


def require_session(image: str, declared: Sequence[str]) -> None:
    """Raise SandboxUnavailable for volumes below the folders that code of a session has for itself."""
    for volume in declared:
        for own in SCRATCH:
            if volume.startswith(f"{own}/"):
                raise refused(image, volume, f"it would be a folder in {own} that code can neither fill nor remove")


def require_seen(image: str, declared: Sequence[str], folders: Mapping[str, str], mounts: Sequence[Mount]) -> None:
    """Check what a container of an image with volumes has found mounted, before anything of the image has run.

    Args:
        image: its name.
        declared: its volumes.
        folders: those that are ours alone, and what they are where a link of the image leads elsewhere.
        mounts: what pid 1 has found, in the order in which it was mounted.

    Raises:
        SandboxUnavailable: where a folder of ours is hidden, or one that can be written is on the engine's disk.
    """
    if not declared:
        return
    named = ", ".join(declared)
    for place, kind, writable in mounts:
        if writable and kind not in _IN_MEMORY:
            raise refused(image, named, f"{place} is on the engine's disk ({kind}), where nothing bounds it")
    for folder, real in folders.items():
        last = next(((kind, writable) for place, kind, writable in reversed(mounts) if place == real), None)
        below = next((place for place, *_ in mounts if place.startswith(f"{real}/")), "")
        if last != ("tmpfs", True) or below:
            raise refused(image, named, f"{below or folder} is not what code needs: a volume's folder leads into it")


def require_apart(image: str, folders: Mapping[str, str]) -> None:
    """Raise SandboxUnavailable where a link of the image makes one of the folders of code another one, or a part of it.

    To empty /tmp would empty /work then.
    """
    for folder, real in folders.items():
        for other, its in folders.items():
            if other != folder and f"{real}/".startswith(f"{its}/"):
                problem = f"image {image!r} has a link at {folder} or {other}: {real} is in {its}"
                raise SandboxUnavailable("docker", problem, "Make folders of their own of /work, /tmp and /dev/shm.")


def refused(image: str, volume: str, why: str) -> SandboxUnavailable:
    return SandboxUnavailable(
        "docker",
        f"image {image!r} declares the volume {volume!r}: {why}",
        "Take its VOLUME line out. What is built FROM it keeps the volume, and this does not: docker export $(docker "
        "create IMAGE x) | docker import - NAME.",
    )
