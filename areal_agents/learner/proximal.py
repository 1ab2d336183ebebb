"""The proximal policy p, whom the loss takes its ratio to where the correction asks for it (``takes proximal_T``).

    recomputed    p is the policy as it is when the batch's first step begins: nothing is kept
    kept          p is an average of the policies so far, by their weights: θ_p moves after every batch

Either costs a forward pass a batch. The kept one costs a copy of the weights that train besides, in fp32 (bf16 would
lose the small moves), and as much in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_agents.algorithms.batch import Row
from areal_agents.algorithms.objective import PolicyObjective
from areal_agents.errors import ModelError
from areal_agents.learner.forward import Decoder
from areal_agents.learner.passes import Logprobs, Passes
from areal_agents.learner.weight_copy import WeightCopy

PROXIMAL = "proximal.safetensors"


class Proximal:
    """The proximal policy of one learner."""

    def __init__(self, objective: PolicyObjective, policy: Decoder, passes: Passes) -> None:
        """Take what the objective needs. A kept policy begins as the policy of the first batch."""
        self.needed, self._decay = objective.needs_proximal, objective.proximal_decay
        self._policy, self._passes = policy, passes
        self._kept: WeightCopy | None = None
        self._total = 1.0
        """Weight of all policies in the average, where the newest one has 1."""

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Logprobs, int]:
        """Compute log p of the rows' sampled tokens, and count the tokens that went through the model."""
        if self._decay is None:
            return self._passes.logprobs(rows, temperature)
        with self._copy().in_place():
            return self._passes.logprobs(rows, temperature)

    def end_step(self) -> None:
        """Let the policy as it is now be a part of the average.

        θ_p ← (β·W·θ_p + θ) / (β·W + 1), W ← β·W + 1: all policies since the first weigh β^age, and no start is assumed.
        """
        if self._decay is not None:
            self._total = self._decay * self._total + 1.0
            self._copy().move(1.0 / self._total)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the weights."""
        return {} if self._decay is None else {"proximal": {"total": self._total, "kept": self._kept is not None}}

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint's folder, where there is one."""
        if self._kept is not None:
            self._kept.save(folder / PROXIMAL)

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises ModelError where it has steps behind it, and no average was kept."""
        if self._decay is None:
            return
        self._kept, self._total = None, 1.0
        said = state.get("proximal")
        if said is None and int(state["version"]):
            raise ModelError(
                f"{folder} has {int(state['version'])} steps behind it, in which no proximal policy was kept: go on "
                "with the correction that it was made with"
            )
        if said is not None and said["kept"]:
            self._copy().load(folder / PROXIMAL)
            self._total = float(said["total"])

    def _copy(self) -> WeightCopy:
        if self._kept is None:
            self._kept = WeightCopy(self._policy.model)
        return self._kept
