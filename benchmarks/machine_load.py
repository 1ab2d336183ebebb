"""What else a machine does while a benchmark runs: a record says it with each part, and a part may wait for quiet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import Progress
from record import Kept

LOOK = 0.5
"""Seconds of a look at what others do, in which the caller does nothing itself."""
QUIET = 0.1


def busy_share(before: str, after: str) -> float:
    """Return the share of all processors' time that was used between two texts of ``/proc/stat``."""
    ticks = [[int(word) for word in text.split("\n", 1)[0].split()[1:9]] for text in (before, after)]
    spent = [b - a for a, b in zip(*ticks, strict=True)]
    idle = spent[3] + spent[4]  # waiting for disks is idle too
    return round(1 - idle / sum(spent), 3) if sum(spent) else 0.0


def others_busy(seconds: float = LOOK) -> float:
    """Look at what share of the processors others use, while this process sleeps."""
    before = Path("/proc/stat").read_text()
    time.sleep(seconds)
    return busy_share(before, Path("/proc/stat").read_text())


class Patience:
    """Waits for a quiet machine, for so many seconds in all."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def __call__(self) -> float:
        """Wait until others use at most a tenth of the processors, or the patience is at its end; return the share."""
        while True:
            start = time.monotonic()
            share = others_busy()
            if share <= QUIET or self._left <= 0:
                return share
            time.sleep(min(2.0, self._left))
            self._left -= time.monotonic() - start


def under_load(patience: Patience, work: Callable[[], Any]) -> dict[str, Any]:
    """Do ``work``, and return what it ``found`` with the load before and after it."""
    others, before, start = patience(), os.getloadavg()[0], time.monotonic()
    found = work()
    return {
        "found": found,
        "others_busy_before": others,
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "seconds": round(time.monotonic() - start, 1),
    }


def do_parts(
    work: Mapping[str, Callable[[], Any]],
    kept: Kept,
    patience: Patience,
    minutes: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any] | None:
    """Do the parts of a record that are not kept yet, each under the load that it is told with.

    Args:
        work: the parts by name.
        kept: those that were done before, and where each is kept.
        patience: waits for a quiet machine before each.
        minutes: none begins later; 0 for no such limit.
        clock: seconds that pass.

    Returns:
        What ``under_load`` says of each, or None where some are left for the next run.
    """
    begun, parts, progress = clock(), dict[str, Any](), Progress(len(work))
    for name, do in work.items():
        if not kept.has(name) and minutes and clock() - begun > 60 * minutes:
            print(f"{len(parts)} of {len(work)} parts are kept: run this again.")
            return None
        told = parts[name] = kept.part(name, lambda do=do: under_load(patience, do))
        progress(f"{name}: {told['seconds']} s, others had {told['others_busy_before']:.0%} of the processors")
    return parts


def loads(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts without what they found, for the record."""
    return {name: {key: value for key, value in part.items() if key != "found"} for name, part in parts.items()}
