"""The slots in which calls of one reward function run, as many at once in this process as it allows.

    take ─▶ held ─▶ release ─▶ the first who waits on each event loop is woken, and one of them takes it

Loops come and go: one that an environment blocked is abandoned with whoever waits on it. So a free slot is offered to
every loop and belongs to the one that takes it. A call on a thread holds its slot until the thread ends, however late.
A coroutine whose loop does not even end it at its deadline runs nothing, and loses its slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass

from areal_agents.errors import InfraError

_LOST_AFTER = 10.0
"""Seconds past its deadline after which a coroutine is taken for one whose loop is blocked or gone."""
_LOOK_SECONDS = 1.0
"""How often whoever waits looks for slots that nobody gives back."""


@dataclass(eq=False, slots=True)
class Slot:
    """One running call."""

    deadline: float
    """By the monotonic clock."""
    thread: bool
    """Whether a thread holds it, which nothing can end."""


class CallSlots:
    """The slots of one reward function. They are shared by all event loops and threads of the process."""

    def __init__(self, count: int, timeout: float) -> None:
        self.count, self.timeout = count, timeout
        self._lock = threading.Lock()
        self._held: set[Slot] = set()
        self._waiting: dict[asyncio.AbstractEventLoop, deque[asyncio.Event]] = {}

    @property
    def held(self) -> int:
        """How many calls run now, late ones included."""
        return len(self._held)

    @property
    def late(self) -> int:
        """How many calls still run that had to end before now."""
        now = time.monotonic()
        with self._lock:
            return sum(now >= slot.deadline for slot in self._held)

    async def take(self, name: str, *, thread: bool) -> Slot:
        """Wait for a slot, first come first served on each loop.

        It waits for calls to end, and is unblocked by ``release``. Raises InfraError where every slot is held by a
        thread that has passed its deadline: no wait is known to end.
        """
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            queue = self._waiting.setdefault(loop, deque())
            queue.append(woken)
        try:
            while True:
                with self._lock:
                    now = time.monotonic()
                    self._held = {s for s in self._held if s.thread or now < s.deadline + _LOST_AFTER}
                    if queue[0] is woken and len(self._held) < self.count:
                        slot = Slot(now + self.timeout, thread)
                        self._held.add(slot)
                        return slot
                    if len(self._held) >= self.count and all(s.thread and now >= s.deadline for s in self._held):
                        raise InfraError(
                            f"reward {name!r}: all {self.count} threads are held by calls that did not end within "
                            f"{self.timeout:g} s, so no other call can run: mend the function, or run what hangs in a "
                            "process that can be killed"
                        )
                woken.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), _LOOK_SECONDS)
        finally:
            with self._lock:
                queue.remove(woken)
                if not queue:
                    self._waiting.pop(loop, None)
                self._wake()

    def release(self, slot: Slot) -> None:
        """Give a slot back, from any thread. A second call does nothing."""
        with self._lock:
            self._held.discard(slot)
            self._wake()

    def _wake(self) -> None:
        """Have the first who waits on each loop look for a slot. The lock is held."""
        if len(self._held) >= self.count:
            return
        for loop, queue in list(self._waiting.items()):
            try:
                loop.call_soon_threadsafe(queue[0].set)
            except RuntimeError:  # the loop is closed, and nobody waits there any more
                del self._waiting[loop]
