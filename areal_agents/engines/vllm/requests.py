"""The requests of the vLLM worker: from our queue to AsyncLLM, and back as replies."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any

from areal_agents.engine import Sampling
from areal_agents.engines import protocol as p
from areal_agents.engines.vllm.queue import Queue, QueuedRequest
from areal_agents.errors import EngineError
from areal_agents.types import Completion, Finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    AsyncLLM = Any
    RequestOutput = Any
    LoRARequest = Any


class Requests(ABC):
    """The requests of one worker, each from the queue to its reply.

    ``worker.VLLMWorker`` sends the replies, and decides on death.
    """

    def __init__(self, llm: AsyncLLM, queue: Queue, adapter: LoRARequest | None = None) -> None:
        self.llm, self.queue = llm, queue
        self.options: dict[str, Any] = {} if adapter is None else {"lora_request": adapter}
        """Further arguments of ``llm.generate``."""
        self.version = 0
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self._requests: dict[int, QueuedRequest] = {}
        self._held: list[p.Reply] | None = None
        self._finished_tokens = 0
        self._attempts = 0

    @abstractmethod
    def send(self, reply: p.Reply) -> None:
        """Write ``reply`` to the client, at once."""

    @abstractmethod
    async def _or_die(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do ``work``, and end the process where it raises what nobody expected."""

    def pump(self) -> None:
        """Hand vLLM the requests that fit."""
        for request in self.queue.admit():
            task = asyncio.create_task(self._or_die(partial(self._run, request)), name=f"request-{request.id}")
            self.tasks[request.id] = task
            task.add_done_callback(partial(self._never_began, request))

    def _never_began(self, request: QueuedRequest, task: asyncio.Task[None]) -> None:
        """Clean up after a task that was cancelled before its first step.

        No ``finally`` of such a task runs.
        """
        if self.tasks.get(request.id) is task:
            del self.tasks[request.id], self._requests[request.id]
            self.queue.finish(request)
            self.pump()

    async def _run(self, request: QueuedRequest) -> None:
        """Take one request to its end.

        A restart ends the task too, and the next ``pump`` begins another one.
        """
        output: RequestOutput | None = None
        try:
            output = await self._sample(request)
        except EngineError as error:
            self._reply(p.Failed(request.id, str(error)))
            return
        finally:
            del self.tasks[request.id]
            if output is not None and output.outputs[0].finish_reason == "abort":  # by ``give_back``
                self.queue.restart(request)
            else:
                tokens = len(output.outputs[0].token_ids) if output is not None else 0
                self._finished_tokens += tokens
                del self._requests[request.id]
                # The last token's KV was not computed: no token came after it.
                self.queue.finish(request, len(request.ids) + tokens - 1 if tokens else 0)
            self.pump()
        if output.outputs[0].finish_reason != "abort":
            self._reply(self._outcome(request, output.outputs[0]))

    async def _sample(self, request: QueuedRequest) -> RequestOutput:
        """Sample one request.

        Raises EngineError where vLLM refuses the request or fails on it alone.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineGenerateError

        self._attempts += 1
        name = f"{request.id}-{self._attempts}"
        prompt = tokens_input(list(request.ids), cache_salt=request.salt)
        try:
            params = sampling_params(request.sampling, request.max_tokens)
            async for output in self.llm.generate(prompt, params, name, **self.options):
                last = output
        except (ValueError, VLLMClientError) as error:
            raise EngineError(f"vLLM refused the request: {error}") from error
        except EngineGenerateError as error:
            if self.llm.errored:  # EngineCore is dead, and not this request's fault: `_or_die` ends the process
                raise
            cause = error.__cause__ or error
            raise EngineError(f"vLLM failed on the request: {type(cause).__name__}: {cause}") from error
        return last

    def _outcome(self, request: QueuedRequest, output: Any) -> p.Reply:
        if output.finish_reason not in ("stop", "length"):
            return p.Failed(request.id, f"vLLM ended the request with {output.finish_reason!r}")
        logprobs = tuple(output.logprobs.logprobs)
        if not all(map(math.isfinite, logprobs)):
            return p.Failed(request.id, f"the model's logits are not finite at version {self.version}")
        versions: list[int] = []
        for span in output.weight_versions:
            versions += [int(span.version)] * (span.end - span.start)
        finish: Finish = "stop" if output.finish_reason == "stop" else "length"
        return p.Done(request.id, Completion(tuple(output.token_ids), logprobs, tuple(versions), finish))

    def _reply(self, reply: p.Reply) -> None:
        if self._held is None:
            self.send(reply)
        else:
            self._held.append(reply)

    def hold(self) -> None:
        """Keep completions back until ``let_go``."""
        self._held = []

    def let_go(self) -> None:
        held, self._held = self._held, None
        for reply in held or ():
            self.send(reply)

    def sampled(self) -> Mapping[int, int]:
        """Return the number of tokens that running requests have so far, by request id.

        A step's tokens may still be on their way.
        """
        states = self.llm.output_processor.request_states.values()
        return {
            int(state.external_req_id.partition("-")[0]): state.detokenizer.num_output_tokens()
            for state in states
            if state.external_req_id[0].isdigit()
        }

    async def give_back(self, requests: list[QueuedRequest]) -> None:
        """Take requests out of vLLM, to be admitted again.

        What they have sampled is lost.
        """
        tasks = [self.tasks[request.id] for request in requests]
        names = [
            state.external_req_id
            for state in self.llm.output_processor.request_states.values()
            if any(state.external_req_id.startswith(f"{request.id}-") for request in requests)
        ]
        await self.llm.abort(names)
        await asyncio.gather(*tasks, return_exceptions=True)


def sampling_params(sampling: Sampling, max_tokens: int) -> Any:
    """Return ``sampling`` in vLLM's form.

    It stops at ``stop_ids`` alone, and asks for one log-probability a token and no text.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        max_tokens=max_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
