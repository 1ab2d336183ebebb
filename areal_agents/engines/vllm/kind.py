"""The facts of the ``vllm`` engine.

Importing them imports no vLLM.
"""

from __future__ import annotations

from areal_agents.engine_kind import EngineKind

KIND = EngineKind(
    engine="areal_agents.engines.vllm.engine:VLLMEngine",
    start_seconds=900.0,  # it loads, and on GPUs compiles, for minutes
    takes_gpus=True,
    own={"gpu_memory": "gpu_memory_utilization", "tensor_parallel": "tensor_parallel_size"},
)
