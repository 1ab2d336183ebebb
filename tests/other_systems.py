"""Python as other systems than Linux have it, for a process of its own.

    python -m tests.other_systems macos '[["envs"], ["train", "--help"]]'

runs one command after the other, and ends what each wrote to its two streams with a line ``ENDED`` and its exit code.
What Linux alone has is deleted before any module of this package is imported. ``windows`` has no POSIX either.
"""

from __future__ import annotations

# Modules of others have versions for other systems. These are Linux's, which need what is deleted, so they come first.
import asyncio  # noqa: F401
import ctypes
import json
import multiprocessing.connection  # noqa: F401
import os
import signal
import socketserver  # noqa: F401
import ssl  # noqa: F401
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
from typing import Any

ENDED = "--- ended with"
LINUX = (
    "sched_getaffinity", "sched_setaffinity", "memfd_create", "MFD_CLOEXEC", "pidfd_open", "P_PIDFD", "pipe2",
    "eventfd", "posix_fadvise", "posix_fallocate", "copy_file_range", "splice", "O_TMPFILE", "O_PATH", "O_DIRECT",
)  # fmt: skip
POSIX = (
    "killpg", "getuid", "geteuid", "setsid", "getpgid", "fork", "WNOHANG", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY",
    "O_NONBLOCK", "waitid", "fchmod",
)  # fmt: skip
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGCHLD")


def become(system: str, *, evaluates: bool) -> None:
    """Take from this process what ``system`` (``macos`` or ``windows``) lacks."""
    if system == "windows":
        if evaluates:  # which loads it late; it takes seconds
            from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: F401

        usual = ctypes.CDLL

        def library(name: Any, *args: Any, **options: Any) -> Any:
            return usual(name + "", *args, **options)  # None is no library there: TypeError

        ctypes.CDLL = library  # type: ignore[misc, assignment]
        for name in MODULES:
            sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
        for name in SIGNALS:
            if hasattr(signal, name):
                delattr(signal, name)
    for name in LINUX + (POSIX if system == "windows" else ()):
        if hasattr(os, name):
            delattr(os, name)


def run(argv: list[str]) -> object:
    """The exit code of one command."""
    from areal_agents.cli.main import main

    try:
        return main(argv)
    except SystemExit as end:  # of --help
        return end.code or 0


if __name__ == "__main__":
    commands = json.loads(sys.argv[2])
    become(sys.argv[1], evaluates=any(argv[0] == "eval" for argv in commands))
    for argv in commands:
        code = run(argv)
        for stream in (sys.stdout, sys.stderr):
            print(f"\n{ENDED} {code}", file=stream, flush=True)
