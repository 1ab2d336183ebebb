"""``SupervisedEngine``: an engine that outlives its process.

    serving ──died, or silent while calls are pending──▶ killed ──▶ started ──▶ weights back ──▶ serving
       ▲                                                   │ more than max_restarts within window_seconds
       └── pending requests are sent again                 └──▶ failed: every call raises EngineError

A request is repeated, not an episode. The conversation, the sandbox and the turns before it stay. The tokens that were
being sampled are lost. No request reaches a restarted engine before it serves the weights again, so the versions of
tokens stay true. Retried tokens are of one version.

**Weights.** A restart needs the weights that the last ``update_weights`` acknowledged. ``Learner.publish`` writes its
two buffers in turn, so these weights stay whole until the publish *after the next one*. An update in progress keeps its
own buffer open. Therefore:
* An update in progress when the engine is lost is applied at the restart, before any request, and then returns.
* After an update that failed or was cancelled, the next publish may overwrite the acknowledged buffer. A restart then
  waits for that publish's update, and requests wait with it until their deadlines.
* A buffer that was overwritten or closed all the same fails its checksum, with the same consequence.

Waits for / unblocked by: ``generate`` waits for a serving engine, until the end of the restart, its failure or its own
deadline. The restart waits for ``start`` and the load, the watcher for health answers, until their deadlines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Self

from areal_agents.engine import Bounded, Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.engines.pool.supervision import (
    Life,
    PendingUpdate,
    Restartable,
    RestartLimit,
    answers,
    lives,
)
from areal_agents.errors import ArealError, ConfigError, EngineError
from areal_agents.types import Completion, Prompt
from areal_agents.utils.closing import AsyncClosing

_END_SECONDS = 30.0


class SupervisedEngine(AsyncClosing):
    """An ``Engine`` around ``start() -> Restartable``: ``async with SupervisedEngine(start, event=...) as engine``.

    It belongs to the event loop that entered it. Refused requests (a prompt that does not fit, a missed deadline) are
    the request's own errors and restart nothing.

    Args:
        start: called for every process. It must clean up after itself where it is cancelled. It should give each
            process a seed of its own, because with the first one's seed a second one repeats its random numbers.
        event: ``event(kind, **fields)`` is told engine_lost (reason, stderr, pending), engine_restarted (seconds,
            version), request_retried (session, attempt, version) and weights_lost (version, reason).
        max_restarts: restarts allowed within the last ``window_seconds``. With one more the engine has failed for good.
        window_seconds: see ``max_restarts``.
        hang_seconds: without a health answer for so long while calls are pending, the engine is hung. Make it longer
            than its longest step, because health is answered between steps.
        health_interval: seconds between two health questions while calls are pending.
        start_seconds: deadline of ``start()``.
        update_seconds: deadline of ``update_weights``, restarts included.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Restartable]],
        *,
        event: Callable[..., None],
        max_restarts: int = 3,
        window_seconds: float = 600.0,
        hang_seconds: float = 60.0,
        health_interval: float = 5.0,
        start_seconds: float = 300.0,
        update_seconds: float = 300.0,
    ) -> None:
        """Start nothing yet. Raises ConfigError for a number out of range."""
        if min(hang_seconds, health_interval, start_seconds, update_seconds) <= 0:
            raise ConfigError("the supervised engine's interval and deadlines must be positive seconds")
        self._start, self._event = start, event
        self._restarts = RestartLimit(max_restarts, window_seconds)
        self._hang, self._interval = hang_seconds, health_interval
        self._start_seconds, self._update_seconds = start_seconds, update_seconds
        self._life: Life | None = None
        self.loading = False
        """True while a fresh process is up and takes, or waits for, its weights."""
        self._failed = "the engine was not started: enter it with `async with`"
        self._changed = asyncio.Event()
        self._engines: set[Restartable] = set()
        self._restart: asyncio.Task[None] | None = None
        self._pending = 0
        self._busy = asyncio.Event()
        self._version = 0
        self._max_context = 0
        self._ref: WeightsRef | None = None
        self._ref_valid = True
        self._update: PendingUpdate | None = None
        self._updates = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Start the first process. Raises what ``start`` raises, and EngineError past ``start_seconds``."""
        try:
            engine = await self._start_one()
        except TimeoutError as error:
            raise EngineError(f"the engine did not start within {self._start_seconds:g} s") from error
        self._version, self._failed = engine.version, ""
        self._serve(engine)
        return self

    @property
    def version(self) -> int:
        """The version served, or during a restart the one that was served before."""
        return self._version if self._life is None else self._life.engine.version

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens. 0 where the engine does not say."""
        return self._max_context

    @property
    def engine(self) -> Restartable | None:
        """The engine that serves now. None during a restart and after the last one."""
        return None if self._life is None else self._life.engine

    @property
    def failed(self) -> str:
        """The reason why it will never serve (again). Empty while it may."""
        return self._failed

    async def ready(self) -> None:
        """Wait until it serves. Raises EngineError where it never will."""
        while self._life is None:
            if self._failed:
                raise EngineError(self._failed)
            await self._changed.wait()

    # --- the contract ----------------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """Sample one turn like ``Engine.generate``, with restarts and repetitions counted in ``deadline``."""
        loop = asyncio.get_running_loop()
        end, attempt = loop.time() + deadline, 0
        while True:
            life = await self._serving(end - loop.time(), f"the completion of session {session!r}")
            if attempt:
                self._event("request_retried", session=session, attempt=attempt, version=life.engine.version)
            try:
                with self._calling():
                    return await life.engine.generate(
                        prompt, sampling, session=session, deadline=max(end - loop.time(), 0.0)
                    )
            except EngineError:
                if not self._lost(life):  # it lives: the error is the request's own
                    raise
            attempt += 1

    async def release(self, session: str) -> None:
        """Drop the session's KV. A restarted engine has none of it."""
        if self._life is not None:
            await self._life.engine.release(session)

    async def update_weights(
        self, ref: WeightsRef, *, mode: UpdateMode = "inflight", kv: KVPolicy = "recompute"
    ) -> UpdateReport:
        """Serve ``ref`` from now on, whatever happens to the process meanwhile, as the module's docstring says.

        Raises EngineError where the engine refuses ``ref``, misses ``update_seconds`` or has failed for good. The old
        weights then stay in use until the engine is lost. The next successful update heals it.
        """
        async with self._updates:
            update = PendingUpdate(ref)
            self._update = update
            self._notify()
            try:
                async with asyncio.timeout(self._update_seconds):
                    report = await self._apply(update, mode, kv)
            except BaseException as error:  # a cancelled caller too: the next publish may overwrite the old buffer
                self._ref_valid = False
                if isinstance(error, TimeoutError):
                    seconds = self._update_seconds
                    raise EngineError(f"weights v{ref.version} were not acknowledged within {seconds:g} s") from error
                raise
            finally:
                self._update = None
                if not update.applied.cancel() and not update.applied.cancelled():
                    update.applied.exception()  # retrieved: the caller may have been cancelled meanwhile
            return report

    async def health(self) -> Health:
        """Return the process's state, which is not ``ok`` during a restart and after the engine has failed for good."""
        life = self._life
        if life is None:
            detail = self._failed or "the engine is being restarted"
            return Health(False, self._version, 0, self._pending, 0, 0, detail)
        return await life.engine.health()

    async def close(self) -> None:
        """End the engine, also in the middle of a restart. Pending calls raise EngineError. May be called twice."""
        life, self._life = self._life, None
        self._failed = self._failed or "the engine was closed"
        self._notify()
        tasks = [t for t in (self._restart, life.watcher if life else None) if t is not None]
        for task in tasks:  # before the engines: a restart would start another one
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in list(self._engines):
            await (engine.close() if life is not None and engine is life.engine else self._end(engine))
        self._engines.clear()

    async def _serving(self, seconds: float, what: str) -> Life:
        """Wait for the engine that serves. Raises EngineError past ``seconds`` or where there will be none."""
        try:
            while self._life is None:
                async with asyncio.timeout(max(seconds, 0.0)):
                    await self.ready()
        except TimeoutError as error:
            raise EngineError(
                f"{what} met its deadline while the engine was being restarted (events.jsonl says why): raise "
                "engine.request_timeout if restarts take longer"
            ) from error
        return self._life

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """Count a pending call, because the watcher asks for health while there is one."""
        self._pending += 1
        self._busy.set()
        try:
            yield
        finally:
            self._pending -= 1
            if not self._pending:
                self._busy.clear()

    async def _apply(self, update: PendingUpdate, mode: UpdateMode, kv: KVPolicy) -> UpdateReport:
        while True:
            while self._life is None and not update.applied.done():  # a restart applies the update by itself
                if self._failed:
                    raise EngineError(self._failed)
                await self._changed.wait()
            if update.applied.done():
                return update.applied.result()
            life = self._life
            assert life is not None
            try:
                with self._calling():
                    report = await life.engine.update_weights(update.ref, mode=mode, kv=kv)
            except EngineError:
                if not self._lost(life):
                    raise
            else:
                self._acknowledged(update.ref)
                return report

    def _acknowledged(self, ref: WeightsRef) -> None:
        self._ref, self._ref_valid, self._version = ref, True, ref.version

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- lives -----------------------------------------------------------------------------------------------------

    def _serve(self, engine: Restartable) -> None:
        """Send requests to ``engine`` from now on."""
        life = self._life = Life(engine)
        if isinstance(engine, Bounded):
            self._max_context = engine.max_context
        life.watcher = asyncio.create_task(self._watch(life), name="engine-watcher")
        self._notify()

    def _lost(self, life: Life) -> bool:
        """Say whether the process of ``life`` is gone, and begin the restart where this is news."""
        failure = life.engine.failure
        if not life.lost and failure is not None:
            self._lose(life, failure)
        return bool(life.lost)

    def _lose(self, life: Life, reason: str) -> None:
        life.lost = reason
        if self._life is not life:  # closed meanwhile
            return
        self._life = None
        if life.watcher is not None and life.watcher is not asyncio.current_task():  # it may be the one that calls
            life.watcher.cancel()
        self._restart = asyncio.create_task(self._supervise_restart(life), name="engine-restart")

    async def _watch(self, life: Life) -> None:
        """Ask for health while calls are pending, else look for the process, until the life ends."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):  # not wait_for, which may swallow a cancellation
                    await self._busy.wait()
            if self._pending and not await lives(life.engine, self._hang):
                self._lose(life, f"the engine gave no sign of health for {self._hang:g} s with {self._pending} calls")
                return
            if self._lost(life):
                return
            await asyncio.sleep(self._interval)

    async def _supervise_restart(self, life: Life) -> None:
        try:
            await self._replace(life)
        except Exception as error:  # noqa: BLE001  boundary: nobody awaits this task; every pending call raises it
            detail = str(error) if isinstance(error, ArealError) else f"{type(error).__name__}: {error}"
            self._failed = self._failed or f"the engine was not restarted: {detail}"
            self._notify()

    async def _replace(self, life: Life) -> None:
        """Kill what is left of ``life`` and begin another one. Raises EngineError past the limit of restarts."""
        loop = asyncio.get_running_loop()
        engine: Restartable | None = life.engine
        reason = life.lost
        while True:
            stderr = engine.stderr if engine is not None else ""
            self._event("engine_lost", reason=reason, stderr=stderr, pending=self._pending)
            if engine is not None:
                await self._end(engine)
            self._restarts.count(reason, stderr)  # it may raise: the process has been ended before
            begin, engine = loop.time(), None  # None: where the start fails there is no process to end
            try:
                engine = await self._start_one()
                self.loading = True
                await self._equip(engine)
            except (EngineError, TimeoutError) as error:
                reason = str(error) or f"the engine did not start within {self._start_seconds:g} s"
                continue
            finally:
                self.loading = False
            self._event("engine_restarted", seconds=round(loop.time() - begin, 3), version=engine.version)
            return self._serve(engine)

    async def _start_one(self) -> Restartable:
        """Start a process. Raises TimeoutError past ``start_seconds``."""
        async with asyncio.timeout(self._start_seconds):
            engine = await self._start()
        self._engines.add(engine)
        return engine

    async def _equip(self, engine: Restartable) -> None:
        """Load the weights into a fresh engine. Raises EngineError where it was lost again."""
        while True:
            update = self._update
            ref = self._ref if update is None else update.ref
            if update is None and not self._ref_valid:
                await self._changed.wait()  # a later update, see the module's docstring
                continue
            if ref is None:
                return  # no update yet: it serves what it was started with
            report = await self._load(engine, ref, update)
            if report is None:
                continue
            if update is not None:
                if not update.applied.done():  # else its caller gave up, and may refill the buffer
                    self._acknowledged(ref)
                    update.applied.set_result(report)
                if not update.applied.cancelled() and update.applied.exception() is None:
                    return
            elif self._update is None and self._ref_valid:  # else an update came during the load: once more
                return

    async def _load(self, engine: Restartable, ref: WeightsRef, update: PendingUpdate | None) -> UpdateReport | None:
        """Load ``ref``, or return None where ``engine`` lives but refused it. Raises EngineError where it was lost."""
        try:
            async with asyncio.timeout(self._update_seconds):
                return await engine.update_weights(ref, mode="inflight", kv="recompute")
        except TimeoutError as error:
            raise EngineError(f"it did not load weights v{ref.version} within {self._update_seconds:g} s") from error
        except EngineError as error:
            if not await answers(engine, self._hang):  # it is lost: that says nothing about the weights
                raise
            self._event("weights_lost", version=ref.version, reason=str(error))
            self._ref_valid = False
            if update is not None and not update.applied.done():
                update.applied.set_exception(error)
                self._update = None
                self._notify()
            return None

    async def _end(self, engine: Restartable) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await engine.kill()
            self._engines.discard(engine)
