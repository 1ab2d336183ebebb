"""The times at which a request may start and is tried again, computed from a clock that can be replaced."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class Clock:
    """The source of a client's times."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    """Seconds since 1970. Only dates in headers are compared with it."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Pace:
    """A limit of one start every ``60 / per_minute`` seconds, in the order of asking.

    So no window of a minute holds more than ``per_minute`` starts. None sets no limit.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._clock = clock
        self._next = 0.0

    async def turn(self, latest: float) -> bool:
        """Wait for the next start, and return True.

        Returns False, at once, where it would be later than ``latest`` (on the clock).
        """
        now = self._clock.monotonic()
        start = max(now, self._next)
        if start > latest:
            return False
        self._next = start + self._interval  # before the sleep: who asks meanwhile comes after this one
        if start > now:
            await self._clock.sleep(start - now)
        return True


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with full jitter: uniform in [0, min(cap, base * 2^attempt)].

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """

    rng: random.Random
    base: float = 0.5
    """Seconds."""
    cap: float = 30.0

    def pause(self, attempt: int) -> float:
        """Return the seconds before try ``attempt + 1``, where the first attempt is 0."""
        return self.rng.uniform(0.0, min(self.cap, self.base * 2.0 ** min(attempt, 60)))


def retry_after(value: str | None, *, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for.

    The header is a number, or an HTTP date that is compared with ``now`` (seconds since 1970). Returns None where there
    is no header, or one that is neither (RFC 9110, 10.2.3). Never negative.
    """
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None
