"""The waiting of OpenMP's threads, which must not take the cores from whatever else runs.

PyTorch computes on processors with libgomp. Its threads meet at barriers, and by default one that waits spins. Where
another process has the core of the thread waited for, the spinning costs that thread its turn again and again: beside
one busy process, two cores become five times slower. Threads that sleep instead cost nothing on an idle machine.

libgomp reads its environment once, when torch is loaded. ``import areal_agents`` sets it, and child processes inherit
it: engines, learners on other cores, vLLM, Ray's actors.
"""

from __future__ import annotations

import os
import sys
import warnings

CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which a user says how threads wait. One that is set is left as it is."""
_late = False


def sleep_at_barriers() -> None:
    """Set ``GOMP_SPINCOUNT=0`` for this process and its children, unless the user has chosen."""
    global _late
    if not any(name in os.environ for name in CHOICES):
        _late = "torch" in sys.modules
        os.environ["GOMP_SPINCOUNT"] = "0"


def warn_where_threads_spin() -> None:
    """Warn where torch was loaded before ``sleep_at_barriers`` could set anything."""
    if _late and sys.platform == "linux":
        warnings.warn(
            "torch was imported before areal_agents, so its threads spin where they wait, which costs five times on a "
            "busy machine: import areal_agents first, or set GOMP_SPINCOUNT=0 in the environment",
            stacklevel=2,
        )
