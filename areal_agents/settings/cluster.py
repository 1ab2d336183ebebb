"""The settings of where the parts of a run live."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from areal_agents.settings.section import Count, Positive, Section


class ClusterConfig(Section):
    backend: Literal["local", "ray"] = "local"
    """``local``: processes of this machine. ``ray``: engines, learner and environments are actors on a Ray cluster."""
    address: str = ""
    """Ray: empty starts a private one here, ``auto`` joins the running one, or its address."""
    rollout_workers: Count = 1
    """Ray actors that environments and sandboxes run in."""
    worker_cpus: float = Field(default=1.0, ge=0.0)
    """Cores reserved for one of them."""
    worker_resources: dict[str, float] = Field(default_factory=dict)
    """What else a node must have for one of them, ``{ docker = 1 }`` for example."""
    engine_cpus: float = Field(default=1.0, ge=0.0)
    """Cores reserved for one engine."""
    engine_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of one engine; with vLLM, ``engine.tensor_parallel`` of them."""
    engine_resources: dict[str, float] = Field(default_factory=dict)
    """What else a node must have for one engine, by the names that nodes declare (``ray start --resources``)."""
    learner_cpus: float = Field(default=1.0, ge=0.0)
    """Cores reserved for the learner."""
    learner_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of the learner."""
    object_store_gib: Positive = 1.0
    """Most memory that the object store of a Ray started here takes."""
    learner_restarts: int = Field(default=2, ge=0)
    """How often a lost learner is replaced; the run then goes on from its last checkpoint."""


def require_placement(
    cluster: ClusterConfig, *, transport: str, tensor_parallel: int, on_gpus: bool, device: str
) -> None:
    """Raise ValueError where engines or learner ask for GPUs, or a transport between them, that the run has not.

    Args:
        cluster: where the parts of the run live.
        transport: ``engine.transport``.
        tensor_parallel: GPUs one engine is split over.
        on_gpus: whether the engine's kind computes on GPUs.
        device: ``learner.device``.
    """
    on_ray, c = cluster.backend == "ray", cluster
    if transport == "nccl" and not (on_ray and on_gpus and c.engine_gpus and c.learner_gpus and device != "cpu"):
        raise ValueError(
            "engine.transport = 'nccl' is a broadcast between GPUs of their own: it needs cluster.backend = 'ray', "
            "engine.kind = 'vllm', cluster.engine_gpus and cluster.learner_gpus; use 'shm', 'disk' or 'gloo'"
        )
    if on_ray and 0 < c.engine_gpus < tensor_parallel:
        raise ValueError(
            f"engine.tensor_parallel = {tensor_parallel} needs as many GPUs, but cluster.engine_gpus = "
            f"{c.engine_gpus:g}: raise it"
        )
    if on_ray and device == "cuda" and not c.learner_gpus:
        raise ValueError("learner.device = 'cuda' on Ray needs cluster.learner_gpus, which is 0: set it to 1")
