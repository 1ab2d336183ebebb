"""``VLLMEngine``: vLLM's ``AsyncLLM`` behind the engine contract, in a process of its own.

    VLLMEngine (this process, without vLLM) ──frames──▶ worker: own queue, AsyncLLM ──ZMQ──▶ EngineCore ──▶ Worker(s)

It samples what the transformers engine samples:

* Token ids go in and come out.
* The log-probability is that of the distribution that was sampled, with temperature, top_k, top_p and min_p applied.
  A greedy token has that of temperature 1.
* The model's generation config gives no defaults.
* A turn stops at ``stop_ids`` (part of the completion), ``max_tokens`` and ``max_context`` alone.

**Weights** are read (``open_weights``) and loaded inside vLLM's own worker process. One update is

    read, verify ▶ pause between two steps ▶ load ▶ repack the tied head ▶ new label, new cache salt ▶ resume ▶ prove ▶
    admit waiting requests again

* ``inflight`` pauses with the KV kept.
* ``interrupt`` drops all KV, so that running requests are computed again. The idle KV of both policies goes with it,
  because vLLM can only drop the whole cache while requests run.
* ``drain`` finishes what runs.
* With ``kv = "recompute"`` later turns cannot hit older KV, because prompts are hashed with a salt that changes with
  the update. Requests that had sampled nothing yet start again under the new salt.
* ``kv = "keep"`` keeps salt and cache.

**Adapters.** With ``lora_rank`` an update brings LoRA adapters and not whole weights. Then the model's own weights
never change, and all requests use one vLLM adapter, which an update replaces in its place between two steps. It is zero
at first. So requests that run through an update go on with the new adapters, exactly as with whole weights, and all
that is said here of pauses, KV, labels and proofs holds.

**Proof of version.** Before the load, vLLM's worker computes the checksum of what was read. After it, where
``ref.probe`` is set, the probe prompt's log-probabilities are computed anew and compared with the learner's (bounds in
``engines.weights_proof``). Completions that end between the resume and the proof are held back until it holds.

What is refused before anything was touched (gone, damaged, another model's shapes) is an EngineError, and the old
weights stay in use. A load that breaks, or a proof that fails, makes the engine *lost*. ``failure`` is set and all its
processes end, so that ``SupervisedEngine`` starts another one with the weights. Half-loaded weights are never served.

Its processes end together: with ``close`` and ``kill``, when the worker dies, and when this process dies.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from areal_agents.engines import protocol as p
from areal_agents.engines.process import EngineProcess, environment, require_positive
from areal_agents.engines.vllm.cpu_build import is_cpu_build, require_deterministic
from areal_agents.errors import ConfigError
from areal_agents.settings.lora import MAX_SERVED_RANK
from areal_agents.utils.packages import require_package
from areal_agents.utils.precision import Precision, number_format


class VLLMEngine(EngineProcess):
    """An ``Engine`` and ``Restartable`` that samples with vLLM.

    Start it with ``start``. It is an async context manager that closes itself.
    """

    name = "the vLLM engine"
    module = "areal_agents.engines.vllm.worker"
    start_seconds = 900.0
    update_seconds = 900.0

    _sockets: Path | None = None

    @classmethod
    async def start(
        cls,
        model: str | Path,
        *,
        precision: Precision = "auto",
        max_batch: int = 48,
        kv_tokens: int = 65_536,
        max_context: int = 2048,
        threads: int = 1,
        seed: int = 0,
        deterministic: bool = False,
        bind: str = "nobind",
        block_size: int | None = None,
        enforce_eager: bool | None = None,
        gpu_memory_utilization: float = 0.85,
        tensor_parallel_size: int = 1,
        lora_rank: int = 0,
        lora_targets: tuple[str, ...] = (),
    ) -> VLLMEngine:
        """Start a worker that serves ``model`` (a local folder or a hub id) as version 0.

        Args:
            model: a local folder or a hub id.
            precision: number format that the model computes in.
            max_batch: sequences decoded at once.
            kv_tokens: on a CPU, the tokens whose KV fits. On a GPU ``gpu_memory_utilization`` decides. A request takes
                its prompt and max_tokens from it while it runs, so none is ever preempted.
            max_context: longest prompt plus completion in tokens, cut to what the model's positions and the KV allow.
            threads: of all ranks together, on a CPU.
            seed: of the sampler, for requests without their own. Engines with one seed sample the same tokens.
            deterministic: on a GPU, vLLM's own batch-invariant mode (``VLLM_BATCH_INVARIANT``).
            bind: where the threads run: ``nobind`` (as the system likes), ``auto`` (vLLM's own number and cores: one a
                physical core, one left free), or a list such as ``0-3``.
            block_size: tokens a KV block, the unit of reuse between turns. None is 32 on a CPU and vLLM's own choice on
                a GPU.
            enforce_eager: no compilation. None is True on a CPU.
            gpu_memory_utilization: share of each GPU's memory for weights, work and KV, in (0, 1].
            tensor_parallel_size: ranks that share each layer.
            lora_rank: updates bring LoRA adapters of this rank, and the model's own weights stay. 0: they bring whole
                weights.
            lora_targets: with ``lora_rank``, the ends of the names of adapted layers. None: every linear layer of the
                decoder.

        Raises:
            ConfigError: a setting is out of range, vLLM is not installed, or it has no deterministic mode here.
            ModelError: the model cannot be loaded.
            EngineError: the worker does not start.
        """
        settings = p.VLLMSettings(
            str(model), number_format(precision), max_batch, kv_tokens, max_context, seed,
            block_size, enforce_eager, gpu_memory_utilization, tensor_parallel_size, lora_rank,
            lora_targets,
        )  # fmt: skip
        _require_sound(settings, threads, deterministic=deterministic)
        sockets = Path(tempfile.mkdtemp(prefix="areal-vllm-"))
        try:
            engine = await cls.launch(
                settings, _environment(
                    model, sockets, bind=bind, threads=max(1, threads // tensor_parallel_size),
                    deterministic=deterministic,
                ),
            )  # fmt: skip
        except BaseException:
            shutil.rmtree(sockets, ignore_errors=True)
            raise
        engine._sockets = sockets
        return engine

    async def _end(self) -> None:
        try:
            await super()._end()
        finally:
            if self._sockets is not None:
                shutil.rmtree(self._sockets, ignore_errors=True)


def _require_sound(settings: p.VLLMSettings, threads: int, *, deterministic: bool) -> None:
    """Raise ConfigError for a setting that is out of range, or that the vLLM installed here, if any, does not have."""
    require_positive(
        max_batch=settings.max_batch, kv_tokens=settings.kv_tokens, max_context=settings.max_context, threads=threads,
        tensor_parallel_size=settings.tensor_parallel_size,
    )  # fmt: skip
    if not 0 <= settings.lora_rank <= MAX_SERVED_RANK:
        raise ConfigError(f"engine lora_rank must be in 0..{MAX_SERVED_RANK}, got {settings.lora_rank}")
    if settings.block_size is not None:
        require_positive(block_size=settings.block_size)
    share = settings.gpu_memory_utilization
    if not 0 < share <= 1:
        raise ConfigError(f"engine gpu_memory_utilization must be in (0, 1], got {share:g}")
    require_package("vllm", "the vllm engine")
    if deterministic:
        require_deterministic()


def _environment(
    model: str | Path, sockets: Path, *, bind: str, threads: int, deterministic: bool = False
) -> dict[str, str]:
    """Return the worker's environment, which holds vLLM's own settings.

    All processes of vLLM inherit it.
    """
    env = environment(
        VLLM_RPC_BASE_PATH=str(sockets),
        VLLM_WORKER_MULTIPROC_METHOD="spawn",  # a fork would inherit the pipes, and keep them open
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND=bind,
        OMP_NUM_THREADS=str(threads),
        **({"VLLM_BATCH_INVARIANT": "1"} if deterministic else {}),
        **({"TMPDIR": str(sockets)} if is_cpu_build() else {}),  # torch's rendezvous; on a GPU compilers cache there
    )
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_tokens
    with contextlib.suppress(OSError):
        if Path(model).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
    return env
