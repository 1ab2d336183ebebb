"""An engine under test, the model it serves, and what transformers says about its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from areal_agents.engine import Engine, Health, Sampling, UpdateReport, WeightsProbe, WeightsRef
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.types import Completion, Prompt
from areal_agents.weights.shared_memory import SharedWeights
from tests.tiny_models import VOCABULARY, forward_logprobs, save_tiny

T = TypeVar("T")
SECONDS = 600.0
"""Deadline of whatever an engine is asked in tests: only one that hangs meets it."""
_POLL_SECONDS = 0.002


class Run(Protocol):
    """Runs a coroutine on the event loop that an engine belongs to."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...


class ServedModel:
    """The model that is served, and two buffers in which the next ones are published in turn, as a learner does.

    make: ``make(seed=…)`` is a random model of one shape; ``make()`` is served first.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make, self.first = make, make()
        self.now = self.first
        self._buffers: list[SharedWeights] = []

    def fill(self, model: Any, version: int) -> WeightsRef:
        """Publish ``model`` with its probe. The buffer stays whole until the publish after the next one."""
        if not self._buffers:
            self._buffers = [SharedWeights(dict(model.named_parameters()), torch.float32) for _ in range(2)]
        return probed(self._buffers[version % 2].fill(dict(model.named_parameters()), version), model)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()


@dataclass(frozen=True)
class Served:
    """An engine, its model and its limits. Engines that are one inside the other share their model."""

    engine: Any
    """An ``Engine``; its own methods beside the contract's are for its own tests."""
    model: ServedModel
    run: Run
    context: int = 256
    kv_tokens: int = 1200
    batch: int = 4
    block: int = 1
    """Tokens a KV block: later turns reuse whole blocks."""
    long: int = 200
    """Tokens of a turn that can be met in its middle."""
    atol: float = 1e-4
    """Of log-probabilities, in nats."""
    gone: str = "are gone"
    """What is said of shared memory that its owner has closed, as a regular expression."""
    sessions: set[str] = field(default_factory=set)
    """Those that asked."""

    @property
    def version(self) -> int:
        version: int = self.engine.version
        return version

    async def ask(self, ids: tuple[int, ...], tokens: int, session: str, **sampling: Any) -> Completion:
        """Sample one turn."""
        self.sessions.add(session)
        return await ask(self.engine, ids, tokens, session, **sampling)

    async def release(self) -> None:
        """Release every session."""
        for session in self.sessions:
            await self.engine.release(session)
        self.sessions.clear()

    def check(self, prompt: tuple[int, ...], done: Completion, temperature: float = 1.0) -> None:
        """Every token has the log-probability that the served model's forward pass gives it."""
        assert_logprobs(self.model.now, prompt, done, temperature)

    def close(self, got: tuple[float, ...], want: torch.Tensor) -> None:
        """The log-probabilities are those wanted."""
        torch.testing.assert_close(torch.tensor(got), want, atol=self.atol, rtol=0)

    def reusable(self, tokens: int) -> int:
        """How many of a session's first ``tokens`` its next turn reads from the KV cache."""
        return tokens // self.block * self.block

    async def update(self, model: Any, **how: Any) -> UpdateReport:
        """Publish ``model`` as the next version and serve it."""
        return await self.serve(self.model.fill(model, self.version + 1), model, **how)

    async def serve(self, ref: WeightsRef, model: Any, **how: Any) -> UpdateReport:
        """Serve ``model``, which was published as ``ref``."""
        report: UpdateReport = await self.engine.update_weights(ref, **how)
        self.model.now = model
        assert self.version == report.version == ref.version
        return report

    async def until(self, condition: Callable[[Health], bool]) -> Health:
        """Ask for health until ``condition`` holds for it."""
        while True:
            health: Health = await self.engine.health()
            if condition(health):
                return health
            await asyncio.sleep(_POLL_SECONDS)

    async def idle(self) -> Health:
        """Wait until nothing runs and nothing waits."""
        return await self.until(lambda health: not (health.running or health.waiting))

    @contextlib.asynccontextmanager
    async def begun(self, *turns: Coroutine[Any, Any, Completion], tokens: int = 1) -> AsyncIterator[list[Turn]]:
        """``turns``, in progress: ``tokens`` were sampled since they began. They end with the context."""
        before = (await self.idle()).sampled_tokens
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(turn) for turn in turns]
            await self.until(lambda health: health.sampled_tokens >= before + tokens)
            yield tasks


Turn = asyncio.Task[Completion]


@contextlib.contextmanager
def served(
    model: ServedModel, folder: Path, start: Callable[..., Any] = TransformersEngine.start, **changes: Any
) -> Iterator[Served]:
    """An engine on a loop of its own.

    start: ``start(folder, …)`` is the engine. changes: of fields of ``Served``, or settings of the engine's own.
    """
    fields = {name: value for name, value in changes.items() if name in Served.__dataclass_fields__}
    settings = {name: value for name, value in changes.items() if name not in fields}
    with asyncio.Runner() as runner, contextlib.closing(model):

        def run(work: Coroutine[Any, Any, T]) -> T:
            return runner.run(asyncio.wait_for(work, SECONDS))

        it = Served(None, model, run, **fields)
        settings |= {"max_batch": it.batch, "kv_tokens": it.kv_tokens, "max_context": it.context}
        engine = run(start(save_tiny(folder, model.now), precision="fp32", **settings))
        try:
            yield replace(it, engine=engine)
        finally:
            run(engine.close())


def ids_of(n: int, seed: int) -> tuple[int, ...]:
    """``n`` random token ids."""
    return tuple(random.Random(seed).choices(range(VOCABULARY), k=n))


async def ask(
    engine: Engine, ids: tuple[int, ...], tokens: int, session: str, *, deadline: float = SECONDS, **sampling: Any
) -> Completion:
    """Sample one turn."""
    return await engine.generate(Prompt(ids), Sampling(tokens, **sampling), session=session, deadline=deadline)


def assert_logprobs(model: Any, prompt: tuple[int, ...], done: Completion, temperature: float = 1.0) -> None:
    """Every token has the log-probability that ``model``'s forward pass gives it."""
    want = forward_logprobs(model, prompt + done.ids, temperature)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)


def publish(model: Any, version: int, dtype: torch.dtype = torch.float32) -> tuple[SharedWeights, WeightsRef]:
    """``model`` in a buffer of its own, which the caller closes."""
    shared = SharedWeights(dict(model.named_parameters()), dtype)
    return shared, shared.fill(dict(model.named_parameters()), version)


def probed(ref: WeightsRef, model: Any, *, off: float = 0.0) -> WeightsRef:
    """``ref`` with what ``model`` says to a probe prompt, ``off`` nats besides the truth."""
    ids = ids_of(40, 999)
    return replace(ref, probe=WeightsProbe(ids, tuple(x + off for x in forward_logprobs(model, ids).tolist())))
