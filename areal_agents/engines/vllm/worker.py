"""The vLLM engine's own process: ``python -m areal_agents.engines.vllm.worker``, started by ``VLLMEngine``.

    reader thread ──commands──▶ loop: own queue ──▶ one task a request ──▶ AsyncLLM ──ZMQ──▶ EngineCore ──▶ Worker(s)
         │  end of pipe: exit at once    └─ one update after the other (updates.py)

Waits for: commands, unblocked by the client or the end of the pipe. AsyncLLM's answers, each with a deadline or until
the request ends. EngineCore's death is seen within a quarter of a second and ends this process, so no call outlives it.

All of the process group ends with this process, see ``process_group_reaper``. Stray prints, EngineCore's included, go
to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

from areal_agents.engine import Health
from areal_agents.engines import protocol as p
from areal_agents.engines.cpu.worker import take_pipes
from areal_agents.engines.positions import positions_of
from areal_agents.engines.process_group_reaper import start_guard
from areal_agents.engines.vllm.adapters import lora_arguments, policy_adapter
from areal_agents.engines.vllm.cpu_build import CPU_WORKER, IN_CORE
from areal_agents.engines.vllm.queue import Queue
from areal_agents.engines.vllm.requests import Requests
from areal_agents.engines.vllm.updates import Updates
from areal_agents.engines.weights_proof import PROBE_TOKENS
from areal_agents.errors import ArealError, EngineError
from areal_agents.utils.parent import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    AsyncLLM = Any
    RequestOutput = Any
    LoRARequest = Any

_CPU_BLOCK = 32
_HEALTH_SECONDS = 5.0
_CALL_SECONDS = 60.0
_WATCH_SECONDS = 0.25


class VLLMWorker(Requests):
    """The worker's commands, updates and health around the requests.

    Everything runs on one event loop.
    """

    def __init__(
        self, llm: AsyncLLM, queue: Queue, precision: str, out: BinaryIO, adapter: LoRARequest | None = None
    ) -> None:
        super().__init__(llm, queue, adapter)
        self.out = out
        self.updates = Updates(self, precision)
        self._pulse: asyncio.Future[bool] | None = None

    def send(self, reply: p.Reply) -> None:
        self.out.write(p.encode(reply))

    async def serve(self, inbox: asyncio.Queue[object]) -> None:
        """Serve until ``Close``."""
        watcher = asyncio.create_task(self._watch(), name="watcher")
        background: set[asyncio.Task[None]] = {watcher}
        while not isinstance(command := await inbox.get(), p.Close):
            if isinstance(command, p.Update | p.AskHealth):
                work = (
                    partial(self.updates.run, command)
                    if isinstance(command, p.Update)
                    else partial(self._health, command)
                )
                task = asyncio.create_task(self._or_die(work), name=type(command).__name__)
                background.add(task)
                task.add_done_callback(background.discard)
            else:
                self._handle(command)
            await asyncio.sleep(0)  # requests have their turn between two commands

    def _handle(self, command: object) -> None:
        match command:
            case p.Generate(id=id, session=session, ids=ids, sampling=sampling):
                try:
                    self._requests[id] = self.queue.submit(id, session, ids, sampling)
                except EngineError as error:
                    self.send(p.Failed(id, str(error)))
                    return
                self.pump()
            case p.Cancel(id=id) if id in self.tasks:
                self.tasks[id].cancel()
            case p.Cancel(id=id) if id in self._requests:
                self.queue.finish(self._requests.pop(id))
                self.pump()
            case p.Cancel():
                pass  # it had finished
            case p.Release(session=session):
                self.queue.release(session)
            case _:
                raise AssertionError(f"unknown command {command!r}")

    # --- health and death ------------------------------------------------------------------------------------------

    async def _health(self, command: p.AskHealth) -> None:
        """Answer a question about health.

        EngineCore answers between two steps. It does not while it loads weights, which has deadlines of its own.

        A question that is still open is waited for, not repeated: a step longer than the wait is no hang, and its end
        answers.
        """
        detail, ok = self.updates.doing, True
        if not detail:
            pulse = self._pulse = self._pulse or asyncio.ensure_future(self.llm.is_paused())
            await asyncio.wait({pulse}, timeout=_HEALTH_SECONDS)
            if pulse.done():
                self._pulse = None
                pulse.result()
            else:
                ok, detail = False, f"vLLM's EngineCore did not answer within {_HEALTH_SECONDS:g} s"
        sampled = self.sampled()
        kv = self.queue.idle_tokens + sum(len(r.ids) + sampled.get(r.id, 0) for r in self.queue.running.values())
        total = self._finished_tokens + sum(sampled.values())
        running, waiting = len(self.queue.running), len(self.queue.waiting)
        self.send(p.HealthReport(command.id, Health(ok, self.version, running, waiting, kv, total, detail)))

    async def _watch(self) -> None:
        while not self.llm.errored:  # noqa: ASYNC110  vLLM sets a flag from a thread of its own
            await asyncio.sleep(_WATCH_SECONDS)
        self.die("vLLM's EngineCore or a worker of its died")

    async def _or_die(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do ``work``, and end the process where it raises what nobody expected.

        The client's calls fail then, instead of waiting.
        """
        try:
            await work()
        except Exception as error:  # noqa: BLE001  boundary: recorded in the message that ends the engine
            if self.llm.errored:
                self.die("vLLM's EngineCore or a worker of its died")
            traceback.print_exc()
            self.die(str(error) if isinstance(error, ArealError) else f"{type(error).__name__}: {error}")

    def die(self, reason: str) -> None:
        """Say why, and end with all children.

        Nothing that this engine computes may be used any more.
        """
        with contextlib.suppress(OSError):
            self.send(p.Lost(reason))
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)  # the guard ends the rest


def engine_args(settings: p.VLLMSettings, *, cpu: bool) -> tuple[dict[str, Any], Any]:
    """Return the arguments of ``AsyncEngineArgs``, and the model's configuration.

    Raises OSError or ValueError where the model cannot be read.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(settings.model)
    max_context = min(settings.max_context, positions_of(config.to_dict()) or config.max_position_embeddings)
    arguments: dict[str, Any] = {
        "model": settings.model,
        "skip_tokenizer_init": True,
        "dtype": "bfloat16" if settings.precision == "bf16" else "float32",
        "max_model_len": max_context,
        "max_num_seqs": settings.max_batch + 1,  # the probe runs beside a full batch
        "seed": settings.seed,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "block_size": settings.block_size,
        "enforce_eager": cpu if settings.enforce_eager is None else settings.enforce_eager,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "worker_extension_cls": "areal_agents.engines.vllm.worker_extension.WorkerExtension",
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if settings.lora_rank:
        arguments |= lora_arguments(settings.lora_rank, settings.lora_targets, config)
    if cpu:
        block = arguments["block_size"] = settings.block_size or _CPU_BLOCK
        blocks = kv_blocks(settings.kv_tokens, max_context, block)
        arguments["kv_cache_memory_bytes"] = blocks * block * kv_bytes(config, 4 if settings.precision == "fp32" else 2)
        arguments["worker_cls"] = CPU_WORKER
        if settings.tensor_parallel_size == 1 and os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind":
            arguments["distributed_executor_backend"] = IN_CORE
    return arguments, config


def kv_blocks(kv_tokens: int, max_context: int, block: int) -> int:
    """Return the number of blocks for ``kv_tokens``, the probe and vLLM's null block.

    They hold at least one whole context, which vLLM asks for.
    """
    probe = -(-min(PROBE_TOKENS, max_context) // block)
    return max(-(-kv_tokens // block) + probe, -(-max_context // block)) + 1


def kv_bytes(config: Any, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * itemsize)


async def build(settings: p.VLLMSettings, out: BinaryIO) -> VLLMWorker:
    """Start vLLM.

    It blocks the loop for as long as that takes.
    """
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM as LLM

    cpu = current_platform.is_cpu()
    arguments, config = engine_args(settings, cpu=cpu)
    if arguments["enforce_eager"]:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # the sampler's small functions would be compiled all the same
    # It decides how many tokens a step prefills: on a GPU this one's default is 8192 or more, AsyncLLM's own is 2048.
    usage = UsageContext.ENGINE_CONTEXT if cpu else UsageContext.LLM_CLASS
    llm = LLM.from_engine_args(AsyncEngineArgs(**arguments), usage_context=usage)
    cache = llm.vllm_config.cache_config
    max_context, block = arguments["max_model_len"], cache.block_size
    blocks = cache.num_gpu_blocks - 1 - -(-min(PROBE_TOKENS, max_context) // block)
    if cpu:
        blocks = min(blocks, -(-settings.kv_tokens // block))
    longest = min(max_context, blocks * block)  # a longer conversation would never be admitted
    queue = Queue(settings.max_batch, blocks, block, longest, config.vocab_size)
    async with asyncio.timeout(_CALL_SECONDS):
        await llm.collective_rpc("areal_prepare", args=(settings.lora_rank,))
        await llm.update_weight_version("0")
        await llm.get_supported_tasks()
    return VLLMWorker(llm, queue, settings.precision, out, policy_adapter() if settings.lora_rank else None)


async def run(settings: p.VLLMSettings, commands: BinaryIO, replies: BinaryIO) -> None:
    inbox: asyncio.Queue[object] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_read, args=(commands, loop, inbox), name="reader", daemon=True).start()
    try:
        server = await build(settings, replies)
    except TimeoutError as error:  # an OSError, but it says nothing about the model
        traceback.print_exc()
        replies.write(p.encode(p.Lost(f"vLLM did not start in time: {error or 'a worker of its did not answer'}")))
        return
    except (ArealError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        traceback.print_exc()
        text = str(error) if isinstance(error, ArealError) else f"{type(error).__name__}: {error}"
        replies.write(p.encode(p.Fatal(text)))
        return
    except Exception as error:  # noqa: BLE001  boundary: EngineCore's failures reach us as RuntimeErrors of many kinds
        traceback.print_exc()
        replies.write(p.encode(p.Lost(f"vLLM did not start: {type(error).__name__}: {error}")))
        return
    server.send(p.Ready(server.queue.max_context))
    await server.serve(inbox)
    await asyncio.to_thread(server.llm.shutdown, 2.0)
    sys.stderr.flush()
    os._exit(0)  # running requests need no end of their own


def _read(commands: BinaryIO, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[object]) -> None:
    while (message := p.read_frame(commands)) is not None:
        loop.call_soon_threadsafe(inbox.put_nowait, message)
        if isinstance(message, p.Close):
            return
    os._exit(0)  # the parent is gone; the guard ends the children


def main() -> int:
    commands, replies = take_pipes()
    guard = start_guard(os.environ["VLLM_RPC_BASE_PATH"])
    end_with_parent()
    settings = p.read_frame(commands)
    if not isinstance(settings, p.VLLMSettings):
        return 1
    asyncio.run(run(settings, commands, replies))
    assert guard.stdin is not None  # held open to here
    return 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # daemon threads hold the pipe; interpreter shutdown would race with them
