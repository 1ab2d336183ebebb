"""vLLM's worker on CPUs, with one repair for seeded requests whose prompt is read in several steps.

vLLM 0.32 samples for such a row in every step and throws the token away. Then it sets the generator's offset back.
torch's CPU generator has no offset and raises, which ends EngineCore.

Here such a row has no generator of its own until its prompt is read. So its first real token takes the first of its
noise, however the prompt was split.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker


class CPUWorker(cpu_worker.CPUWorker):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The worker that ``vllm.worker`` and ``vllm.server`` name as ``worker_cls``."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.use_v2_model_runner:  # needs Triton; it draws noise by position, without generators
            return super().sample_tokens(grammar_output)
        batch = self.model_runner.input_batch
        partly = self.model_runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        held = {row: batch.generators.pop(row) for row in partly if row in batch.generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(held)
