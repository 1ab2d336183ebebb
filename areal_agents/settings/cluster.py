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
