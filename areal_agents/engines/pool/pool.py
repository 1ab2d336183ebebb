"""``EnginePool``: several replicas of an engine behind one ``Engine``.

    generate(session) ─▶ Router ─▶ Replica i: SupervisedEngine ─▶ Restartable (a process, a Ray actor)
         ▲                ▲  ▲          │ engine_lost: its requests move, its sessions are assigned anew
         └──── retried ───┘  │          └─▶ restarted, weights loaded ─▶ routed to again
                             │                   └─▶ failed for good ─▶ replica_lost: dropped while another is left
    resize(n) ── added once it serves the current weights; removed once its requests have ended
    update_weights ─▶ every replica at once ─▶ one report when all that are up have acknowledged

The pool uses asyncio only. A replica may live anywhere.

**Sessions** stay where their prefix is cached (``pool.router``). A request whose replica is lost is sent to another one
at once, not after the restart. Its deadline counts everything.

**Weights.** No replica takes a request before it serves the current weights.

* A replica's process may be gone when an update comes, or be lost during it. Then it does not hold the learner up while
  another one acknowledges. It gets the update in the background, and is routed to afterwards. The next update
  supersedes that one. So its load may read a buffer that the learner refills (``supervised`` says how long one stays
  whole), but only where a newer update has come. What it loaded is then replaced before any request.
* A replica that is up and takes or awaits weights is waited for like one that serves.
* Growth loads the acknowledged weights between two updates. After an update that failed it waits for the next one.
* A replica that refuses an update which another one took is ended, started again and updated in the background.
  Where all refuse it, the update is at fault. The error is raised, nothing is ended, and the old weights stay in use.

Waits for / unblocked by:

* ``generate`` waits for a replica that serves. Unblocked by the end of a restart, by growth, by the loss of the last
  replica or by its own deadline.
* ``update_weights`` waits for the acknowledgements and for a growing replica's load. Unblocked by ``update_seconds``
  each.
* ``resize`` downwards waits for running requests. Unblocked by ``drain_seconds``, after which they move.
* ``resize`` upwards waits for ``start``, unblocked by ``start_seconds``, and for an update, unblocked by its end. It
  does not wait for an update that nobody has begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self, Unpack

from areal_agents.engine import Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.engines.pool.members import Replicas
from areal_agents.engines.pool.replica import Replica, SupervisedSettings
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.engines.pool.update import PoolUpdate, summed
from areal_agents.errors import ConfigError, EngineError
from areal_agents.types import Completion, Prompt
from areal_agents.utils.closing import AsyncClosing

_MOVES = 4
"""How many replicas a request may lose. One that ends every replica it is sent to would end them all."""


class EnginePool(AsyncClosing):
    """An ``Engine`` made of several: ``async with EnginePool(start, replicas=2, event=...) as pool``.

    It belongs to the event loop that entered it.

    Args:
        start: ``start(index)`` starts a process of replica ``index``, the lowest free number. Its contract is
            ``SupervisedEngine``'s. Every process of any replica has a seed of its own. It cleans up where it is
            cancelled.
        replicas: how many to start with.
        event: ``event(kind, **fields)`` is told replica_added (replica, version), replica_removed (replica, left),
            replica_lost (replica, reason, left), update_failed (replica, version, reason), request_retried (session,
            attempt, version, replica), and the events of ``SupervisedEngine`` with their ``replica``.
        drain_seconds: how long a removed replica's requests may go on before they move.
        supervised: the settings of each replica's ``SupervisedEngine``.
    """

    def __init__(
        self,
        start: Callable[[int], Awaitable[Restartable]],
        *,
        replicas: int,
        event: Callable[..., None],
        drain_seconds: float = 600.0,
        **supervised: Unpack[SupervisedSettings],
    ) -> None:
        """Check the numbers, but start nothing yet.

        Raises ConfigError for a number out of range.
        """
        _check_replicas(replicas)
        if drain_seconds <= 0:
            raise ConfigError(f"the engine pool's drain_seconds must be positive, got {drain_seconds:g}")
        self._event, self._initial, self._drain_seconds = event, replicas, drain_seconds
        self._replicas = Replicas(start, self._load, event, supervised)
        self._updates = asyncio.Lock()
        self._resizing = asyncio.Lock()
        self._ref: WeightsRef | None = None
        self._ref_valid = True
        self._version = 0

    async def __aenter__(self) -> Self:
        """Start every replica at once.

        Raises what ``start`` raises, and EngineError past ``start_seconds``.
        """
        self._replicas.failed = ""
        try:
            await self._replicas.grow(self._initial)
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def version(self) -> int:
        """The lowest version that a replica serves, or without such a replica the last one acknowledged."""
        up = [r for r in self._replicas if r.state in ("serving", "draining")]
        return min((r.engine.version for r in up), default=self._version)

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion that every replica takes, in tokens. 0 where none says."""
        return min((r.engine.max_context for r in self._replicas if r.engine.max_context), default=0)

    @property
    def replicas(self) -> int:
        """Number of replicas that serve, start or restart."""
        return len(self._replicas)

    @property
    def failed(self) -> str:
        """The reason why no request will ever be served (again). Empty while one may be."""
        return self._replicas.failed

    # --- the contract ----------------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """Sample one turn like ``Engine.generate``.

        Args:
            prompt: token ids.
            sampling: how to sample, and what ends the turn.
            session: the conversation. Its turns stay on one replica, where their prefix is cached.
            deadline: seconds from now, with restarts, moves and repetitions counted.
        """
        loop, router = asyncio.get_running_loop(), self._replicas.router
        end = loop.time() + deadline
        for attempt in range(_MOVES):
            replica = await self._route(session, end - loop.time())
            if attempt:
                told = {"session": session, "attempt": attempt, "version": replica.engine.version}
                self._event("request_retried", **told, replica=replica.index)
            router.begin(replica.index)
            try:
                left = max(end - loop.time(), 0.0)
                done = await replica.generate(prompt, sampling, session=session, deadline=left)
            except EngineError:
                if not replica.engine.failed:  # the request's own error: refused, or past its deadline
                    raise
                self._replicas.drop(replica)
            else:
                if done is not None:  # else it was moved: it asks for another place
                    return done
            finally:
                router.end(replica.index)
        raise EngineError(
            f"the request of session {session!r} ({len(prompt.ids)} prompt tokens, max_tokens {sampling.max_tokens}) "
            f"lost {_MOVES} replicas in a row and is not sent to another one: the events engine_lost say why"
        )

    async def release(self, session: str) -> None:
        """Drop the session's KV, and its place on a replica."""
        if (replica := self._replicas.release(session)) is not None:
            await replica.engine.release(session)

    async def update_weights(
        self, ref: WeightsRef, *, mode: UpdateMode = "inflight", kv: KVPolicy = "recompute"
    ) -> UpdateReport:
        """Serve ``ref`` everywhere, as the module's docstring says.

        Returns the longest time without tokens, and sums over the replicas.

        Raises EngineError where no replica took ``ref`` or none is left.
        """
        async with self._updates:
            try:
                report = await self._update(PoolUpdate(ref, mode, kv))
            except BaseException:  # the next publish may overwrite the acknowledged buffer, see `supervised`
                self._ref_valid = False
                raise
            self._ref, self._ref_valid, self._version = ref, True, ref.version
            return report

    async def resize(self, replicas: int) -> None:
        """Grow or shrink to ``replicas`` while requests and updates go on.

        Growth returns when the new replicas serve the current weights. Where those are gone, it returns when the new
        replicas wait for the next update. Once all have settled, it raises the first error of a start, or of a replica
        that refuses the weights, and keeps those that started.

        Shrinkage first takes replicas that do not serve, then those with the fewest sessions. It returns when they have
        ended. A drain that was begun goes on where the caller is cancelled.

        Raises ConfigError for less than one replica.
        """
        _check_replicas(replicas)
        async with self._resizing:
            by = replicas - len(self._replicas)
            if by > 0:
                await self._replicas.grow(by)
            elif by < 0:
                await self._replicas.shrink(-by, seconds=self._drain_seconds)

    async def health(self) -> Health:
        """Return the replicas' numbers, added up.

        ``ok`` is True where one of them serves. ``detail`` has a line for each.
        """
        replicas = list(self._replicas)
        found = await asyncio.gather(*(r.health() for r in replicas))
        lines = [
            f"replica {r.index}: {r.state}, v{h.version}, {h.running} running, {h.waiting} waiting"
            + (f", not ok: {h.detail}" if not h.ok else "")
            for r, h in zip(replicas, found, strict=True)
        ]
        return Health(
            ok=any(h.ok and r.state == "serving" for r, h in zip(replicas, found, strict=True)),
            version=self.version,
            running=sum(h.running for h in found),
            waiting=sum(h.waiting for h in found),
            kv_tokens=sum(h.kv_tokens for h in found),
            sampled_tokens=sum(h.sampled_tokens for h in found),
            detail="\n".join(lines) or self.failed,
        )

    async def close(self) -> None:
        """End every replica, also in the middle of anything.

        Pending calls raise EngineError. May be called twice.
        """
        await self._replicas.close()

    # --- parts -----------------------------------------------------------------------------------------------------

    async def _route(self, session: str, seconds: float) -> Replica:
        """Return the replica of ``session``, after waiting for one that serves.

        Raises EngineError past ``seconds`` without one, or without hope for one.
        """
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                while not len(self._replicas.router):
                    if self.failed:
                        raise EngineError(self.failed)
                    await self._replicas.changed.wait()
        except TimeoutError as error:
            raise EngineError(
                f"the completion of session {session!r} met its deadline while no replica of the engine pool served "
                "(events.jsonl says why): raise engine.request_timeout if restarts take longer"
            ) from error
        return self._replicas.of(session)

    async def _load(self, replica: Replica) -> bool:
        """Load the current weights into a fresh ``replica``, and say whether it serves them.

        Returns False where they are gone. The next update's weights will do then.

        Raises EngineError where the replica failed for good, or refuses weights that others serve.
        """
        async with self._updates:  # between updates the acknowledged weights are whole, or known not to be
            ref = self._ref
            if replica.state != "joining" or ref is None:
                return True  # an update came first, or none yet: it serves what it was started with
            if not self._ref_valid:
                return False
            error = await replica.load(ref, mode="inflight", kv="recompute")
        if isinstance(error, EngineError):
            raise error
        return True

    async def _update(self, update: PoolUpdate) -> UpdateReport:
        targets = [r for r in self._replicas if not r.engine.failed]  # one that has not started yet loads by itself
        if not targets:
            raise EngineError(self.failed or "the engine pool has no replica: resize it")
        update.begin(targets)
        await update.acknowledged(lambda: self._replicas.changed)
        if self.failed:
            raise EngineError(self.failed)
        reports, refusals = update.reports, update.refusals
        for replica in reports:
            self._replicas.serve(replica)
        for replica in update.late:
            self._replicas.background(self._follow(replica, update))
        for replica, error in refusals.items():
            if replica.engine.failed:
                self._replicas.drop(replica)
            elif reports and replica.state != "draining":  # another one took it: this replica is at fault
                self._refused(replica, update, error)
                self._replicas.withdraw(replica)
                update.again(replica)
                self._replicas.background(self._follow(replica, update))
        if not reports:
            gone = EngineError(f"weights v{update.ref.version} reached no replica: all that were asked were removed")
            raise next(iter(refusals.values()), gone)
        return summed(update.ref.version, reports.values())

    async def _follow(self, replica: Replica, update: PoolUpdate) -> None:
        """Route to ``replica`` once it has the update.

        Without the update it waits for the next one, or has failed for good.
        """
        result = await update.result(replica)
        if isinstance(result, UpdateReport):
            self._replicas.serve(replica)
        elif replica.engine.failed:
            self._replicas.drop(replica)
        elif result is not None:
            self._refused(replica, update, result)

    def _refused(self, replica: Replica, update: PoolUpdate, error: EngineError) -> None:
        self._event("update_failed", replica=replica.index, version=update.ref.version, reason=str(error))


def _check_replicas(replicas: int) -> None:
    if replicas < 1:
        raise ConfigError(f"an engine pool needs at least 1 replica, got {replicas}")
