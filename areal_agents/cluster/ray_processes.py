"""The processes of a private Ray, found and ended for certain.

They are known by their environment, their command line or their open files.

    python -m areal_agents.cluster.ray_processes FOLDER     ends them once its standard input is closed (no driver)

Without this program, some of Ray's own processes outlive a killed driver by more than a minute, and a stopped one
(SIGSTOP) outlives it for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import areal_agents

MARKER = "AREAL_RAY_FOLDER"
"""The variable that names the folder of the private Ray that a process belongs to.

It is in the environment of Ray's workers and of all that they start. It is never in the driver's own environment,
because what the driver starts meanwhile (W&B's process, for one) would seem to be Ray's.
"""
_SPEC = importlib.util.find_spec("ray")
_RAY = str(Path(_SPEC.origin).parent) if _SPEC is not None and _SPEC.origin else "no Ray"
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 3.0
_ROUNDS = 20

RayProcess = tuple[int, int]
"""Process id and start time, which together are never used twice."""


def of(folder: str) -> set[RayProcess]:
    """Find the processes of the Ray in ``folder``, with those that its actors started."""
    found: set[RayProcess] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if _belongs(entry, folder):
                    found.add((int(entry.name), _started(int(entry.name))))
    return found


def _belongs(entry: Path, folder: str) -> bool:
    environment = (entry / "environ").read_bytes()
    if f"{MARKER}={folder}".encode() in environment.split(b"\0"):
        return True
    command = (entry / "cmdline").read_bytes()
    of_ray = f"{_RAY}/".encode() in command
    if of_ray and f"{folder}/".encode() in command.replace(b"\0", b"/"):  # the folder, or something in it
        return True
    if environment.strip(b"\0") and not command.startswith(b"ray"):
        return False
    # Ray writes a process's title over its environment and command line. Its log files still lie in the folder.
    for file in (entry / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(file).startswith(f"{folder}/"):
                return True
    return False


def end(processes: Collection[RayProcess], seconds: float) -> list[int]:
    """Wait for the end of ``processes``, and kill what is left after ``seconds``.

    Returns the ids of those that had to be killed. It blocks, so call it in a thread.
    """
    limit = time.monotonic() + seconds
    while (left := [p for p in processes if _alive(*p)]) and time.monotonic() < limit:
        time.sleep(_POLL_SECONDS)
    for pid, started in left:
        with contextlib.suppress(OSError):
            if _alive(pid, started):  # asked again, for another process may have its id by now
                os.kill(pid, signal.SIGKILL)
    return [pid for pid, _ in left]


def start_reaper(folder: str) -> subprocess.Popen[bytes]:
    """Start a process that ends all processes of the Ray in ``folder``, and removes the folder.

    It begins when this process is gone, or closes the pipe to it.
    """
    root = str(Path(areal_agents.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "areal_agents.cluster.ray_processes", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is the driver's
    )


def reap(folder: str) -> None:
    """End the processes of the Ray in ``folder``, and remove the folder."""
    for n in range(_ROUNDS):  # until none of them has started another one meanwhile
        if not (found := of(folder)):
            break
        end(found, 0.0 if n else _GRACE_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int, started: int) -> bool:
    """Say whether the process still runs, which a zombie does not."""
    with contextlib.suppress(OSError):
        return _started(pid) == started and _fields(pid)[0] not in "ZX"
    return False


def _fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _started(pid: int) -> int:
    """Return the start time of a process in clock ticks since the boot.

    Raises OSError where it is gone.
    """
    return int(_fields(pid)[19])


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(sys.argv[1])
