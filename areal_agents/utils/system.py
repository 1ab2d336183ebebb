"""The operating system: what of it is there, and what needs Linux."""

from __future__ import annotations

import os
import sys

from areal_agents.errors import ConfigError


def available_cores() -> int:
    """Return the cores that this process may use; where the system cannot say, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_linux() -> bool:
    """Say whether this system has what engines, weights and sandboxes are made of."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def require_linux(what: str) -> None:
    """Raise ConfigError on another system, with what works there. ``what`` begins the message."""
    if not is_linux():
        system = "this system" if sys.platform == "linux" else sys.platform
        raise ConfigError(
            f"{what} needs Linux (memfd_create, pidfd_open and /proc), which {system} lacks. What works here: to "
            "evaluate a model behind an OpenAI-compatible server (areal-agents eval ENV_ID --model openai:MODEL --url "
            "URL), with an environment whose tools need no sandbox"
        )
