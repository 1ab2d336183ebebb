"""Weight updates of the vLLM worker: the order of steps, their deadlines, and what a failure means.

    read and verify ▶ drain? ▶ pause ▶ load ▶ label, salt ▶ resume ▶ prove ▶ completions go out, waiting requests in
    └── refused: the old weights stay ──┘└── anything that fails from here on: the engine is lost

Nothing is admitted between the pause and the proof, so the probe queues behind running requests alone.

Tokens are labelled exactly. vLLM attaches the label to a step's outputs in the process that runs the steps. A pause
completes between two steps, when all outputs of the one before have been labelled and sent. The label changes there.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from typing import TYPE_CHECKING, Any

from areal_agents.engine import UpdateReport, WeightsRef
from areal_agents.engines import protocol as p
from areal_agents.engines.weights_proof import PROBE_TOKENS, Prover
from areal_agents.errors import EngineError

if TYPE_CHECKING:
    from areal_agents.engines.vllm.queue import QueuedRequest
    from areal_agents.engines.vllm.requests import Requests

_OPEN_SECONDS = 240.0
_DRAIN_SECONDS = 600.0
_LOAD_SECONDS = 240.0
_PAUSE_SECONDS = 120.0
"""A pause waits for the step in progress, which on a CPU may be a long prefill."""
_CALL_SECONDS = 30.0
_PROBE_SECONDS = 120.0
_PREFILL_RATE = 50.0
"""Tokens a second, at least. The probe waits for prompts that are computed before it."""
_POLL_SECONDS = 0.02, 0.2
"""Between two looks at the reading, in its first second and later. With tensor parallelism each waits for a step."""


class Updates:
    """The weight updates of one worker, done one after the other.

    ``doing`` says what EngineCore is busy with. It is empty where EngineCore answers between steps.
    """

    def __init__(self, server: Requests, precision: str) -> None:
        self.doing = ""
        self._server = server
        self._prover = Prover(precision)
        self._lock = asyncio.Lock()

    async def run(self, command: p.Update) -> None:
        """Apply ``command`` and answer it.

        It raises where the engine is lost.
        """
        server, queue = self._server, self._server.queue
        async with self._lock:
            try:
                refused = await self._open(command.ref)
                if not refused and command.mode == "drain":
                    refused = await self._drain()
                if refused:
                    text = f"weights v{command.ref.version} were not loaded: {refused}"
                    server.send(p.Failed(command.id, text))
                    return
                report = await self._apply(command)
            finally:  # after a failure this process ends before anything that is admitted here begins
                queue.admitting = True
                server.pump()
            server.send(p.Updated(command.id, report))

    async def _open(self, ref: WeightsRef) -> str:
        """Read and verify the weights beside the steps.

        Returns why they are refused, or nothing.
        """
        await self._each("areal_open", _PAUSE_SECONDS, pickle.dumps(ref))
        start = time.monotonic()
        while None in (answers := await self._each("areal_opened", _PAUSE_SECONDS)):
            elapsed = time.monotonic() - start
            if elapsed > _OPEN_SECONDS:
                answers = [f"they were not read within {_OPEN_SECONDS:g} s"]
                break
            await asyncio.sleep(_POLL_SECONDS[elapsed > 1.0])
        refused: str = next(filter(None, answers), "")
        if refused:
            await self._each("areal_forget", _PAUSE_SECONDS)
        return refused

    async def _drain(self) -> str:
        """Finish what runs, and admit nothing.

        Returns why the weights, which are read already, are given up, or nothing.
        """
        server = self._server
        server.queue.admitting = False
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while server.tasks:
                    await asyncio.wait(list(server.tasks.values()))
        except TimeoutError:
            await self._each("areal_forget", _PAUSE_SECONDS)
            return f"{len(server.tasks)} requests did not finish within {_DRAIN_SECONDS:g} s: use another update mode"
        return ""

    async def _apply(self, command: p.Update) -> UpdateReport:
        server, queue, ref = self._server, self._server.queue, command.ref
        self.doing = f"loading weights v{ref.version}"
        try:
            queue.admitting = False
            start = time.perf_counter()
            clear = command.mode == "interrupt" or (command.kv == "recompute" and not queue.running)
            async with asyncio.timeout(_PAUSE_SECONDS):
                await server.llm.pause_generation(mode="keep", clear_cache=clear)
            running = len(queue.running)
            dropped = await self._retire(command, cleared=clear)
            await self._each("areal_load", _LOAD_SECONDS)
            ahead = self._ahead(cleared=clear)
            server.hold()  # before the resume: no completion of weights that are not proved goes out
            async with asyncio.timeout(_CALL_SECONDS):
                await server.llm.update_weight_version(str(ref.version))
                await server.llm.resume_generation()
            resumed = time.perf_counter() if queue.running else None
        except TimeoutError as error:
            raise EngineError(f"vLLM did not answer while {self.doing}") from error
        finally:
            self.doing = ""
        server.version = ref.version
        await self._prove(ref, _PROBE_SECONDS + ahead / _PREFILL_RATE)
        server.let_go()
        # Where nothing runs, nothing is sampled before the next request is admitted: after the proof.
        seconds = (resumed or time.perf_counter()) - start
        return UpdateReport(ref.version, seconds, running, dropped)

    def _ahead(self, *, cleared: bool) -> int:
        """Return the number of running requests' tokens that are computed before the probe's.

        Where the cache is empty, these are all that the requests have.
        """
        sampled = self._server.sampled()
        return sum(
            len(request.ids) + sampled.get(request.id, 0)
            for request in self._server.queue.running.values()
            if cleared or not sampled.get(request.id, 0)
        )

    async def _retire(self, command: p.Update, *, cleared: bool) -> int:
        """Take old KV out of use, and return how many tokens of it.

        A prompt in the middle of its prefill counts as none. Under ``recompute`` a request that sampled nothing yet is
        given back, because it would go on with old KV, or find some.
        """
        server, queue = self._server, self._server.queue
        sampled = server.sampled()

        def computed(request: QueuedRequest) -> int:
            count = sampled.get(request.id, 0)
            return len(request.ids) + count - 1 if count else 0

        unbegun = [request for request in queue.running.values() if not sampled.get(request.id, 0)]
        dropped = queue.update(kv=command.kv, cleared=cleared, computed=computed)
        if unbegun and command.kv == "recompute" and not cleared:
            async with asyncio.timeout(_CALL_SECONDS):
                await server.give_back(unbegun)
        return dropped

    async def _prove(self, ref: WeightsRef, seconds: float) -> None:
        """Score the probe prompt, never from the cache.

        Raises EngineError where it proves the wrong weights, or has no answer within ``seconds``.
        """
        if ref.probe is None:
            return
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        asked = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True, flat_logprobs=True,
            skip_reading_prefix_cache=True,
        )  # fmt: skip
        name = f"probe-{ref.version}"
        ids = ref.probe.ids[: min(PROBE_TOKENS, self._server.queue.max_context - 1)]
        prompt = tokens_input(list(ids), cache_salt=name)
        try:
            async with asyncio.timeout(seconds):
                async for output in self._server.llm.generate(prompt, asked, name, **self._server.options):
                    last = output
        except TimeoutError as error:
            raise EngineError(f"weights v{ref.version}: no answer to the probe in {seconds:.0f} s") from error
        self._prover.check(ref, last.prompt_logprobs.logprobs)

    async def _each(self, method: str, seconds: float, *args: Any) -> list[Any]:
        """Call ``method`` of every vLLM worker, and return their answers.

        Raises EngineError past ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                answers: list[Any] = await self._server.llm.collective_rpc(method, seconds, args)
        except TimeoutError as error:
            raise EngineError(f"vLLM's workers did not answer {method} within {seconds:g} s") from error
        return answers
