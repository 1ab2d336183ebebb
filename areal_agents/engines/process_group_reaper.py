"""A script that ends a process group when the holder of a pipe dies, by whatever death.

It then removes the group's folder. It runs as ``python process_group_reaper.py FOLDER [GRACE]`` and is a member of the
group. Its stdin is a pipe that only the holder holds open. The holder is the group's leader, or another process. Where
it is another process, GRACE is given: the leader gets SIGTERM first and may end in order, within GRACE seconds.

Python's resource tracker is spared. It ends by itself once the others are gone, and then frees their shared memory.
The script uses the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_SECONDS = 5.0


def members(group: int) -> list[int]:
    """Return the process ids of the living members of a process group.

    None are known where there is no /proc (macOS).
    """
    out: list[int] = []
    if not os.path.isdir("/proc"):
        return out
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it may end while it is looked at
                # Behind the last ")": the command's name, which stands in parentheses, may hold spaces and more ")".
                state, _, pgrp = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state not in "ZX":
                    out.append(int(entry.name))
    return out


def killable(group: int) -> list[int]:
    """Return the members to kill, which are all but the resource trackers."""
    return [pid for pid in members(group) if not _tracker(pid)]


def start_guard(folder: str) -> subprocess.Popen[bytes]:
    """Guard the caller's process group.

    Keep the result for as long as the group is to live, because it holds the pipe open. ``folder`` is removed at the
    group's end.
    """
    return subprocess.Popen([sys.executable, "-I", "-S", __file__, folder], stdin=subprocess.PIPE)


def _tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _end_in_order(leader: int, grace: float) -> None:
    with contextlib.suppress(ProcessLookupError):  # its id is not given to another while the guard is in its group
        os.kill(leader, signal.SIGTERM)
    end = time.monotonic() + grace
    while leader in members(leader) and time.monotonic() < end:
        time.sleep(0.02)


def main() -> None:
    # A signal to the whole group must not end the guard before the others.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    group = os.getpgrp()
    os.read(0, 1)  # returns when the holder is gone: nobody writes into this pipe
    if len(sys.argv) > 2:
        _end_in_order(group, float(sys.argv[2]))
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:  # again and again: a member may fork while the others are killed
        found = [pid for pid in killable(group) if pid != os.getpid()]
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
