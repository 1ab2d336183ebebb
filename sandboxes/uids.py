"""One unprivileged uid for each sandbox, when the host is root.

Two processes of a host never hold the same slot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from areal_agents.errors import SandboxError

LOCKS = Path("/run/areal-agents/slots")
MAX_SLOTS = 4096
BASE = 200_000
"""The uid of slot 0, above those that a system gives to its users."""


@dataclass(slots=True)
class Slot:
    """A held slot, whose ``uid`` (and gid) is this sandbox's alone until ``release``."""

    index: int
    uid: int
    _descriptor: int

    def release(self) -> None:
        """Give the slot back.

        May be called twice.
        """
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def acquire(locks: Path = LOCKS) -> Slot:
    """Lock the first free slot.

    Its uid is ``BASE`` + index. The lock ends with the process that holds it. Raises SandboxError when all slots are
    held, or the lock folder cannot be written.
    """
    import fcntl  # not on every system

    try:
        locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        for index in range(MAX_SLOTS):
            descriptor = os.open(locks / f"{index}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            except BaseException:
                os.close(descriptor)
                raise
            return Slot(index, BASE + index, descriptor)
    except OSError as error:
        raise SandboxError(f"no sandbox slot: {error}. {locks} must be writable.") from error
    raise SandboxError(f"all {MAX_SLOTS} sandbox slots in {locks} are held. Close sessions or end stale processes.")
