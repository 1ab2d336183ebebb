"""The learner on a Ray actor of its own.

It runs where the GPUs are, apart from the driver.

    RemoteLearner ── batch (object store) ──▶ LearnerActor ── TorchLearner
         ◀── metrics, version ── | ── WeightsRef (never tensors) ──▶ engines

Waits for / unblocked by: every call waits for the actor's answer. It is unblocked by the answer, by the actor's loss
(at once where it died, after ``hang_seconds`` where it hangs) or by ``call_seconds``.

A lost learner is not restarted here, because its weights and optimizer are gone with it. Every call raises LearnerLost,
and the run goes on from its last commit.

**Files.** ``save``, ``load`` and ``export`` work on the file system of the actor's node, and so do the locators that
``publish`` yields. On a cluster of several machines the run's folder must lie on a file system that they share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast

import ray

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.cluster.engine_actors import unplaced
from areal_agents.cluster.remote_errors import Failure
from areal_agents.cluster.watched_actor import ActorLost, ActorSilent, WatchedActor, process_here
from areal_agents.engine import WeightsRef
from areal_agents.errors import ArealError, ConfigError, EngineError, LearnerLost
from areal_agents.learner.contract import Metrics
from areal_agents.learner.critic import Values
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.passes import Logprobs
from areal_agents.utils.closing import AsyncClosing

Method = Literal["step", "logprobs", "values", "reference", "teacher", "sft_step", "save", "load", "export"]
_CLOSE_SECONDS = 30.0


class LearnerActor:
    """An async Ray actor that hosts a ``TorchLearner``.

    Its event loop stays free, because the learner works in its own thread.
    """

    def __init__(self) -> None:
        self._made: TorchLearner | None = None
        self._published: dict[int, AsyncExitStack] = {}
        self._publishing: dict[int, asyncio.Task[WeightsRef]] = {}
        self._given_up: set[int] = set()
        self._receivers = 0

    async def start(self, model: Path, settings: dict[str, Any], counted: bool) -> tuple[str, int, int] | Failure:
        """Load the model and return node, process id and version.

        ``counted`` says that ``publish`` will be told the number of receivers.
        """
        if counted:
            settings["receivers"] = lambda: self._receivers
        if settings.get("transport") in ("nccl", "gloo"):
            settings.setdefault("weights_host", ray.util.get_node_ip_address())
        try:
            self._made = await asyncio.to_thread(lambda: TorchLearner(model, **settings))
        except ArealError as error:
            return Failure.of(error)
        return *process_here(), self._made.version

    @property
    def _learner(self) -> TorchLearner:
        assert self._made is not None, "start comes first"
        return self._made

    async def ping(self) -> None:
        """Answer between two events of the loop.

        Silence means that the process is stopped or that its loop is blocked.
        """

    async def work(self, method: Method, subject: Any, options: dict[str, Any]) -> tuple[Any, int] | Failure:
        """Call ``TorchLearner.method(subject, **options)`` and return its result with the version after it."""
        try:
            return await getattr(self._learner, method)(subject, **options), self._learner.version
        except ArealError as error:
            return Failure.of(error)

    async def publish(self, ticket: int, receivers: int) -> WeightsRef | Failure:
        """Open a ``publish`` context for so many ``receivers``.

        ``unpublish(ticket)`` closes it.
        """
        if ticket in self._given_up:  # ``unpublish`` overtook it: Ray does not keep the order
            self._given_up.remove(ticket)
            return Failure.of(LearnerLost("the publication was given up"))
        self._receivers = receivers
        task = self._publishing[ticket] = asyncio.create_task(self._enter(ticket))
        await asyncio.wait({task})
        if task.cancelled():
            return Failure.of(LearnerLost("the publication was given up"))
        try:
            return task.result()
        except ArealError as error:
            return Failure.of(error)

    async def _enter(self, ticket: int) -> WeightsRef:
        async with AsyncExitStack() as stack:
            ref = await stack.enter_async_context(self._learner.publish())
            # From now on ``unpublish`` closes it. Up to here a cancellation does.
            self._published[ticket] = stack.pop_all()
            return ref

    async def unpublish(self, ticket: int) -> Failure | None:
        """Close the context, or give it up where it is not open yet."""
        task = self._publishing.pop(ticket, None)
        if task is None:
            self._given_up.add(ticket)
            return None
        task.cancel()
        await asyncio.wait({task})
        stack = self._published.pop(ticket, None)
        try:
            await (stack.aclose() if stack is not None else asyncio.sleep(0))
        except ArealError as error:
            return Failure.of(error)
        return None

    async def close(self) -> None:
        """Close the open contexts, finish the running call and free the buffers."""
        for ticket in list(self._publishing):
            await self.unpublish(ticket)
        if self._made is not None:
            await self._made.close()


class RemoteLearner(AsyncClosing):
    """A ``TorchLearner`` on a Ray actor, with the same methods.

    It belongs to the event loop that started it. Methods that wait for the actor raise LearnerLost where it is lost.
    """

    def __init__(
        self, actor: WatchedActor, version: int, *, call_seconds: float, receivers: Callable[[], int] | None
    ) -> None:
        """Wrap an actor that was started. Use ``start``, which calls this."""
        self._actor, self._version, self._seconds, self._receivers = actor, version, call_seconds, receivers
        self._tickets = itertools.count()
        self._closed = False

    @classmethod
    async def start(
        cls,
        model: str | Path,
        *,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        options: Mapping[str, Any] | None = None,
        place_seconds: float = 60.0,
        start_seconds: float = 600.0,
        call_seconds: float = 3600.0,
        hang_seconds: float = 60.0,
        health_interval: float = 5.0,
        receivers: Callable[[], int] | None = None,
        **settings: Any,
    ) -> Self:
        """Place the actor and load ``model``, a folder that its node can read.

        Args:
            model: the model's folder.
            num_cpus: CPUs that Ray reserves for the actor.
            num_gpus: GPUs that Ray reserves for the actor.
            options: more of Ray's actor options (``resources``, ``scheduling_strategy``, …).
            place_seconds: how long the actor may wait for its resources.
            start_seconds: deadline of the load.
            call_seconds: deadline of every call. A learner that misses one is lost.
            hang_seconds: after so long a silence the learner is lost.
            health_interval: seconds between two questions whether it lives.
            receivers: how many processes receive a broadcast, see ``BroadcastWeights``. ``publish`` calls it here.
            settings: other keyword arguments of ``TorchLearner``. ``weights_host`` is the actor's node by default.

        Raises:
            LearnerLost: the actor died or missed ``start_seconds``.
            ConfigError: a number is out of range, or no node has the resources within ``place_seconds``.
            ArealError: whatever ``TorchLearner`` raises.
        """
        placed = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_restarts": 0, "max_concurrency": 64}
        handle = ray.remote(LearnerActor).options(**placed, **(options or {})).remote()
        actor = WatchedActor(handle, "the learner", hang_seconds=hang_seconds, interval=health_interval)
        try:
            await _placed(
                actor, {"CPU": num_cpus, "GPU": num_gpus, **(options or {}).get("resources", {})}, place_seconds
            )
            node, pid, version = await actor.call(
                "start", _absolute(Path(model)), settings, receivers is not None, seconds=start_seconds
            )
        except ActorLost as error:
            await actor.end("it did not start")
            raise LearnerLost(
                f"{error} (reserved: {num_cpus:g} CPUs, {num_gpus:g} GPUs): `ray status` shows what is free"
            ) from error
        except BaseException:
            await actor.end("it did not start")
            raise
        actor.watch(node, pid)
        return cls(actor, version, call_seconds=call_seconds, receivers=receivers)

    @property
    def version(self) -> int:
        """Batches consumed, as of the last answer.

        Reading it asks the actor nothing.
        """
        return self._version

    @property
    def pid(self) -> int:
        """The actor's process id, on its node."""
        return self._actor.pid

    async def step(self, batch: Batch) -> Metrics:
        """Train on ``batch``, as ``TorchLearner.step`` does."""
        return cast(Metrics, await self._work("step", await _stored(batch)))

    async def logprobs(self, batch: Batch) -> Logprobs:
        """Compute log-probabilities, as ``TorchLearner.logprobs`` does."""
        return cast(Logprobs, await self._work("logprobs", await _stored(batch)))

    async def values(self, batch: Batch) -> Values:
        """Compute the critic's values, as ``TorchLearner.values`` does."""
        return cast(Values, await self._work("values", await _stored(batch)))

    async def reference(self, batch: Batch) -> tuple[Logprobs, float]:
        """Ask the reference policy, as ``TorchLearner.reference`` does."""
        return cast(tuple[Logprobs, float], await self._work("reference", await _stored(batch)))

    async def teacher(self, batch: Batch) -> Logprobs:
        """Ask the teacher, as ``TorchLearner.teacher`` does."""
        return cast(Logprobs, await self._work("teacher", await _stored(batch)))

    async def sft_step(self, rows: Sequence[Row], *, lr: float) -> Metrics:
        """Do one step of the warm start, as ``TorchLearner.sft_step`` does."""
        return cast(Metrics, await self._work("sft_step", await _stored(tuple(rows)), lr=lr))

    def publish(self) -> AbstractAsyncContextManager[WeightsRef]:
        """Publish the current weights and yield the reference to them.

        The reference is valid until the context closes, or the learner is lost.

        Entering raises LearnerLost. Leaving does not, so that what happened inside is not hidden. The next call raises
        it. But an EngineError inside gives way to LearnerLost where the learner is gone, for the weights went with it.
        """
        return self._publish()

    @asynccontextmanager
    async def _publish(self) -> AsyncIterator[WeightsRef]:
        ticket, quiet = next(self._tickets), True
        try:
            receivers = 0 if self._receivers is None else self._receivers()
            yield cast(WeightsRef, await self._call("publish", ticket, receivers))
        except EngineError:
            quiet = False  # the learner's loss, if there was one, is the cause
            raise
        finally:
            with contextlib.suppress(*([LearnerLost] if quiet else [])):
                await self._call("unpublish", ticket)

    async def save(self, path: Path) -> None:
        """Save to ``path`` on the actor's node, as ``TorchLearner.save`` does."""
        await self._work("save", _absolute(path))

    async def load(self, path: Path) -> None:
        """Load from ``path`` on the actor's node, as ``TorchLearner.load`` does."""
        await self._work("load", _absolute(path))

    async def export(self, path: Path) -> None:
        """Export to ``path`` on the actor's node, as ``TorchLearner.export`` does."""
        await self._work("export", _absolute(path))

    async def close(self) -> None:
        """Finish the running call, free the buffers and end the actor.

        It waits for nothing where the actor is lost. May be called twice.
        """
        try:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(ActorLost):
                    await self._actor.call("close", seconds=_CLOSE_SECONDS)
        finally:
            await self._actor.end("the learner was closed")

    async def _work(self, method: Method, subject: Any, **options: Any) -> Any:
        result, self._version = await self._call("work", method, subject, options)
        return result

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            return await self._actor.call(method, *args, seconds=self._seconds)
        except ActorLost as error:
            raise LearnerLost(
                f"{error}. Its weights since the last commit are gone; that commit is whole: go on with --resume"
            ) from error


async def _placed(actor: WatchedActor, asked: Mapping[str, float], seconds: float) -> None:
    """Wait until the actor runs.

    Raises ConfigError and not LearnerLost, because a learner that never ran is not lost, and is not tried again.
    """
    try:
        await actor.call("ping", seconds=seconds)
    except ActorSilent as error:
        said = await unplaced("a learner", asked, seconds, str(error))
        raise ConfigError(f"{said}. Lower cluster.learner_cpus or cluster.learner_gpus, or add nodes") from error
    except ActorLost as error:
        raise ConfigError(f"{error}: it did not start there") from error


def _absolute(path: Path) -> Path:
    """Make ``path`` absolute, because the actor's working directory is another one."""
    return path.absolute()


async def _stored(value: object) -> Any:
    """Put ``value`` into the object store and return a reference, for which the actor gets the value.

    Serialising goes on in a thread, beside the loop.
    """
    return await asyncio.to_thread(ray.put, value)
