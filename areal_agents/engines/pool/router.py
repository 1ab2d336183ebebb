"""``Router``: the choice of the replica that takes a session's next request.

It is pure bookkeeping, without asyncio, Ray or a clock.

A session stays on the replica that it was given first, where its prefix is cached. A new session, and one whose replica
is gone, goes to the least loaded replica: the fewest sessions, then the fewest running requests, then the lowest index.
Sessions count first because each of them comes back for its next turn. What runs at this moment only breaks ties.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from areal_agents.errors import EngineError

_SLACK = 64


@dataclass(eq=False, slots=True)
class _Member:
    """One stay of a replica in the router.

    A replica that comes back is another member.
    """

    index: int
    sessions: int = 0


class Router:
    """Sticky, least-loaded routing over replicas that come and go.

    Each call costs O(log n) amortised for n replicas. The least loaded one is on top of a heap. Outdated entries are
    skipped, and the heap is rebuilt before they outnumber the replicas. ``loads`` is O(n).
    """

    def __init__(self, replicas: Iterable[int] = ()) -> None:
        self._members: dict[int, _Member] = {}
        self._running: dict[int, int] = {}
        self._sessions: dict[str, _Member] = {}
        self._heap: list[tuple[int, int, int]] = []
        for replica in replicas:
            self.add(replica)

    def __len__(self) -> int:
        """Return the number of replicas that take requests."""
        return len(self._members)

    def __contains__(self, replica: object) -> bool:
        return replica in self._members

    def assign(self, session: str) -> int:
        """Return the replica of ``session``, which is the one it has, else the least loaded.

        Raises EngineError without replicas.
        """
        member = self._sessions.get(session)
        if member is None or not self._stays(member):
            member = self._sessions[session] = self._least()
            member.sessions += 1
            self._push(member)
        return member.index

    def release(self, session: str) -> None:
        """Forget ``session``, if it is known."""
        member = self._sessions.pop(session, None)
        if member is not None:
            member.sessions -= 1
            self._push(member)

    def replica(self, session: str) -> int | None:
        """Return the replica of ``session``, or None where it has none (any more)."""
        member = self._sessions.get(session)
        return member.index if member is not None and self._stays(member) else None

    def begin(self, replica: int) -> None:
        """Count a request that begins to run on ``replica``."""
        self._run(replica, 1)

    def end(self, replica: int) -> None:
        """Count the end of a request on ``replica``, however it ended.

        The replica may have been removed meanwhile. Raises ValueError for one end too many.
        """
        if not self._running.get(replica):
            raise ValueError(f"no request runs on replica {replica}")
        self._run(replica, -1)

    def running(self, replica: int) -> int:
        """Return the number of requests that run on ``replica``, removed or not."""
        return self._running.get(replica, 0)

    def add(self, replica: int) -> None:
        """Assign sessions to ``replica`` from now on.

        Raises ValueError where that is so already.
        """
        if replica in self._members:
            raise ValueError(f"replica {replica} is routed to already")
        member = self._members[replica] = _Member(replica)
        self._push(member)

    def remove(self, replica: int) -> None:
        """Assign no more requests to ``replica``, if it is known.

        Its sessions move at their next ``assign``.
        """
        self._members.pop(replica, None)

    def loads(self) -> dict[int, int]:
        """Return the number of sessions by replica."""
        return {index: member.sessions for index, member in self._members.items()}

    # --- the heap --------------------------------------------------------------------------------------------------

    def _stays(self, member: _Member) -> bool:
        return self._members.get(member.index) is member

    def _key(self, member: _Member) -> tuple[int, int, int]:
        return member.sessions, self._running.get(member.index, 0), member.index

    def _run(self, replica: int, by: int) -> None:
        count = self._running.get(replica, 0) + by
        if count:
            self._running[replica] = count
        else:
            self._running.pop(replica, None)
        if (member := self._members.get(replica)) is not None:
            self._push(member)

    def _push(self, member: _Member) -> None:
        """Enter a member's changed key into the heap.

        Its older entries stay there. An entry that no longer is a member's key is outdated.
        """
        if not self._stays(member):
            return
        heapq.heappush(self._heap, self._key(member))
        if len(self._heap) > 2 * len(self._members) + _SLACK:
            self._heap = [self._key(member) for member in self._members.values()]
            heapq.heapify(self._heap)

    def _least(self) -> _Member:
        while self._heap:
            member = self._members.get(self._heap[0][2])
            if member is not None and self._heap[0] == self._key(member):
                return member
            heapq.heappop(self._heap)
        raise EngineError("the engine pool has no replica that takes requests")
