"""The engine's own process: ``python -m areal_agents.engines.cpu.worker``, started by ``TransformersEngine``.

    reader thread ──commands──▶ loop: commands, admit, one prefill chunk, one decode step ──▶ replies on the pipe
         │  end of pipe: exit at once            ▲
         └─ updater thread: attach, verify, pack ┘ swapped in between two decode steps

The process ends when its parent does: the pipe closes (also while decoding), and Linux sends SIGKILL as a second means.
Stray prints go to stderr, because descriptors 0 and 1 are moved away before anything else runs.
"""

from __future__ import annotations

import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO

from areal_agents.engine import Health, UpdateReport
from areal_agents.engines import protocol as p
from areal_agents.errors import ArealError
from areal_agents.utils.memory import trim
from areal_agents.utils.parent import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, dtype

    from areal_agents.engines.cpu.architecture import Shape
    from areal_agents.engines.cpu.decoder import CPUDecoder, Weights
    from areal_agents.engines.cpu.scheduler import Request, Scheduler

PREFILL_WHILE_DECODING = 256
"""Prompt tokens computed between two decode steps. Running requests stall for a fraction of a second at most."""
PREFILL_ALONE = 1024
_PIPE_BYTES = 1 << 20


@dataclass(slots=True)
class Prepared:
    """New weights on their way from the updater thread to the loop, or the error that they met."""

    update: p.Update
    weights: Weights | None
    error: str = ""


Inbox = queue.SimpleQueue[object]


class Updater(threading.Thread):
    """The thread that attaches, verifies and packs new weights beside the loop, one update after the other."""

    def __init__(self, shape: Shape, decoder: CPUDecoder, inbox: Inbox) -> None:
        super().__init__(name="updater", daemon=True)
        self.updates: queue.SimpleQueue[p.Update] = queue.SimpleQueue()
        self._shape, self._dtype, self._inbox = shape, decoder.dtype, inbox

    def run(self) -> None:
        from areal_agents.engines.cpu.decoder import Weights
        from areal_agents.errors import EngineError
        from areal_agents.weights.transports import open_weights

        while True:
            update = self.updates.get()
            try:
                if update.ref.kind != "full":
                    raise EngineError("they are adapters, and this engine serves whole weights: publish merged ones")
                with open_weights(update.ref) as opened:
                    weights = Weights.build(self._shape, opened.tensors, self._dtype)
                self._inbox.put(Prepared(update, weights))
            except Exception as error:  # noqa: BLE001  boundary: the failure is the update's reply, the loop goes on
                detail = str(error) if isinstance(error, ArealError) else f"{type(error).__name__}: {error}"
                self._inbox.put(Prepared(update, None, f"weights v{update.ref.version} were not loaded: {detail}"))


class Worker:
    """The loop that takes commands, decodes and replies.

    Waits for: a command when idle, unblocked by the client or the end of the pipe. It never waits otherwise.
    """

    def __init__(
        self, decoder: CPUDecoder, scheduler: Scheduler, seed: int, inbox: Inbox, out: BinaryIO, updater: Updater
    ) -> None:
        self.decoder, self.scheduler = decoder, scheduler
        self.inbox, self.out, self.updater = inbox, out, updater
        self.sampled = 0
        self._seeds = random.Random(seed)
        """For requests without a seed."""
        self._draining: list[Prepared] = []

    def send(self, reply: p.Reply) -> None:
        self.out.write(p.encode(reply))

    def run(self) -> None:
        """Serve until ``Close``."""
        while True:
            busy = bool(self.scheduler.waiting or self.scheduler.running() or self._draining)
            command = self._next(block=not busy)
            while command is not None:
                if isinstance(command, p.Close):
                    return
                self._handle(command)
                command = self._next(block=False)
            if self._draining and not self.scheduler.running():
                self._swap_drained()
            self.scheduler.admit()
            self._prefill()
            self._decode()

    def _next(self, *, block: bool) -> object | None:
        try:
            return self.inbox.get(block=block)
        except queue.Empty:
            return None

    # --- commands --------------------------------------------------------------------------------------------------

    def _handle(self, command: object) -> None:
        match command:
            case p.Generate(id=id, session=session, ids=ids, sampling=sampling):
                if sampling.seed is None:
                    sampling = replace(sampling, seed=self._seeds.getrandbits(31))
                try:
                    self._check_ids(ids)
                    self.scheduler.submit(id, session, ids, sampling)
                except ArealError as error:
                    self.send(p.Failed(id, str(error)))
            case p.Cancel(id=id):
                self.scheduler.cancel(id)
            case p.Release(session=session):
                self.scheduler.release(session)
            case p.Update():
                self.updater.updates.put(command)
            case Prepared(weights=None):
                self.send(p.Failed(command.update.id, command.error))
            # Behind an update that drains the next ones wait too, whatever their mode: versions keep their order.
            case Prepared() if self._draining or (command.update.mode == "drain" and self.scheduler.running()):
                self.scheduler.admitting = False
                self._draining.append(command)
            case Prepared():
                self._swap(command)
            case p.AskHealth(id=id):
                self.send(p.HealthReport(id, self._health()))
            case _:
                raise AssertionError(f"unknown command {command!r}")

    def _check_ids(self, ids: tuple[int, ...]) -> None:
        from areal_agents.errors import EngineError

        vocabulary = self.decoder.shape.vocabulary
        if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
            raise EngineError(f"prompt ids range over {min(ids)}..{max(ids)}, the model's over 0..{vocabulary - 1}")

    def _swap(self, prepared: Prepared) -> None:
        start = time.perf_counter()
        assert prepared.weights is not None
        update = prepared.update
        self.decoder.swap(prepared.weights)
        running = len(self.scheduler.running())
        dropped = self.scheduler.update(update.ref.version, mode=update.mode, kv=update.kv)
        seconds = time.perf_counter() - start
        self.send(p.Updated(update.id, UpdateReport(update.ref.version, seconds, running, dropped)))
        trim()  # the old weights; a step's own buffers stay, see the client's environment

    def _swap_drained(self) -> None:
        for prepared in self._draining:
            self._swap(prepared)
        self._draining.clear()
        self.scheduler.admitting = True

    def _health(self) -> Health:
        s = self.scheduler
        return Health(True, s.version, len(s.running()), len(s.waiting), s.kv_in_use, self.sampled)

    # --- steps -----------------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        from areal_agents.engines.cpu.decoder import RowSegment

        decoding = any(request.pending == 1 for request in self.scheduler.running())
        plan = self.scheduler.prefill_plan(PREFILL_WHILE_DECODING if decoding else PREFILL_ALONE)
        if not plan:
            return
        segments = [
            RowSegment(request.row, request.computed, request.ids[request.computed : request.computed + n].tolist())
            for request, n in plan
        ]
        logits = self.decoder.prefill(segments)
        for request, n in plan:
            request.computed += n
        complete = [i for i, (request, _) in enumerate(plan) if request.pending == 0]
        if complete:
            self._sample(logits[complete], [plan[i][0] for i in complete])

    def _decode(self) -> None:
        if not any(request.pending == 1 for request in self.scheduler.running()):
            return
        self.scheduler.compact()
        running = self.scheduler.running()
        # Rows in the middle of a prefill ride along: what they write is overwritten by their next chunk.
        logits = self.decoder.decode([int(r.ids[r.computed]) for r in running], [r.computed for r in running])
        ready = [i for i, request in enumerate(running) if request.pending == 1]
        for i in ready:
            running[i].computed += 1
        if len(ready) < len(running):
            logits = logits[ready]
        self._sample(logits, [running[i] for i in ready])

    def _sample(self, logits: Tensor, requests: list[Request]) -> None:
        from areal_agents.engines.cpu.sampler import sample

        samplings = [request.sampling for request in requests]
        uniforms = [request.uniform() for request in requests]
        tokens, logprobs = sample(logits, samplings, uniforms, alone=self.decoder.deterministic)
        self.sampled += len(requests)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            if logprob != logprob:  # NaN
                self._fail_non_finite(request)
                continue
            finish = request.append(token, logprob, self.scheduler.version)
            if finish is not None:
                self.scheduler.finish(request)
                self.send(p.Done(request.id, request.completion(finish)))

    def _fail_non_finite(self, request: Request) -> None:
        self.decoder.wipe(request.row)  # NaN in its KV would reach the row's next request through masked positions
        self.scheduler.cancel(request.id)
        self.send(p.Failed(request.id, f"the model's logits are not finite at version {self.scheduler.version}"))


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the protocol's streams, on descriptors that no library prints to."""
    commands = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    try:
        import fcntl

        fcntl.fcntl(replies.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        pass  # a smaller pipe only makes the loop wait for a client that is slow to read
    return commands, replies


def _read(commands: BinaryIO, inbox: Inbox) -> None:
    while (message := p.read_frame(commands)) is not None:
        inbox.put(message)
    os._exit(0)  # the parent is gone; the loop may be in the middle of a step


def _build(settings: p.Settings, inbox: Inbox, replies: BinaryIO) -> tuple[Worker, int]:
    import torch

    from areal_agents.engines.cpu.decoder import CPUDecoder, Weights
    from areal_agents.engines.cpu.scheduler import Scheduler
    from areal_agents.utils.precision import resolve_precision

    torch.set_num_threads(settings.threads)
    shape = settings.shape
    max_context = min(settings.max_context, shape.positions, settings.kv_tokens)
    dtype = resolve_precision(settings.precision)
    weights = Weights.build(shape, _parameters(settings, dtype), dtype)
    trim()
    decoder = CPUDecoder(
        shape, weights, dtype, max_batch=settings.max_batch, max_context=max_context,
        deterministic=settings.deterministic,
    )  # fmt: skip
    if settings.deterministic:
        decoder.prove_deterministic()
    scheduler = Scheduler(decoder, max_batch=settings.max_batch, kv_tokens=settings.kv_tokens, max_context=max_context)
    updater = Updater(shape, decoder, inbox)
    updater.start()
    return Worker(decoder, scheduler, settings.seed, inbox, replies, updater), max_context


def _parameters(settings: p.Settings, dtype: dtype) -> Mapping[str, Tensor]:
    from areal_agents.engines.cpu.read_parameters import read_parameters

    tensors = read_parameters(settings.model, settings.shape)
    if tensors is None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        tensors = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype).state_dict()
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def main() -> int:
    commands, replies = take_pipes()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    settings = p.read_frame(commands)
    if not isinstance(settings, p.Settings):
        return 1
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(commands, inbox), name="reader", daemon=True).start()
    try:
        worker, max_context = _build(settings, inbox, replies)
    except (ArealError, OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        traceback.print_exc()
        replies.write(
            p.encode(p.Fatal(f"{type(error).__name__}: {error}" if not isinstance(error, ArealError) else str(error)))
        )
        return 1
    worker.send(p.Ready(max_context))
    worker.run()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # daemon threads hold the pipe; interpreter shutdown would race with them
