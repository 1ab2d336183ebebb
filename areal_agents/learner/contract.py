"""The contract between a learner and the trainer, which ``learner.py`` keeps in one process, ``cluster/`` on Ray."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from areal_agents.algorithms.batch import Batch
from areal_agents.engine import WeightsRef
from areal_agents.learner.critic import Values
from areal_agents.learner.passes import Logprobs

Metrics = dict[str, float]


class Learner(Protocol):
    """The part of a learner that the trainer needs."""

    @property
    def version(self) -> int:
        """Batches consumed, those included whose optimizer steps were skipped."""
        ...

    async def step(self, batch: Batch) -> Metrics: ...
    async def logprobs(self, batch: Batch) -> Logprobs:
        """Compute log π under the current weights. ``step`` needs no call of it."""
        ...

    async def values(self, batch: Batch) -> Values:
        """Compute the critic's V before each sampled token. Raises ConfigError where there is no critic."""
        ...

    async def reference(self, batch: Batch) -> tuple[Logprobs, float]:
        """Compute log π of the reference policy, and return it with the KL term's coefficient as it is now."""
        ...

    async def teacher(self, batch: Batch) -> Logprobs:
        """Compute the teacher's log π, NaN where it cannot. Raises ConfigError where it is not the learner's."""
        ...

    def publish(self) -> AbstractAsyncContextManager[WeightsRef]:
        """Hand out the current weights, by a reference that is valid until the context closes."""
        ...

    async def save(self, path: Path) -> None: ...
    async def load(self, path: Path) -> None: ...
