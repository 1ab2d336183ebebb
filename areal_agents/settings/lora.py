"""The settings of adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from areal_agents.settings.section import Positive, Section

MAX_SERVED_RANK = 512
"""The largest rank of adapters that vLLM serves."""


class LoraConfig(Section):
    rank: int = Field(default=0, ge=0)
    """Rank of the adapters that train in the place of the weights (docs/lora.md); 0: every weight trains."""
    alpha: Positive = 32.0
    """What adapters add counts alpha/rank times, so that a learning rate fits every rank."""
    targets: tuple[str, ...] = ()
    """Linear layers with an adapter, by the end of their names (``["q_proj", "v_proj"]``); none: all but the head."""
    publish: Literal["auto", "merged", "adapter"] = "auto"
    """What engines get: whole weights with the adapters merged into them, or the adapters alone (vLLM). ``auto``: the
    adapters where vLLM computes on GPUs, up to rank 512."""

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        given = [name for name in ("alpha", "targets", "publish") if name in self.model_fields_set]
        changed = [n for n in given if getattr(self, n) != type(self).model_fields[n].default]
        if not self.rank and changed:
            raise ValueError(
                f"learner.lora.{changed[0]} = {getattr(self, changed[0])!r} is of adapters, and learner.lora.rank = 0 "
                "trains every weight: set a rank, or leave it out"
            )
        if not all(self.targets):
            raise ValueError("learner.lora.targets has an empty name: name linear layers, such as 'q_proj'")
        if self.publish == "adapter" and self.rank > MAX_SERVED_RANK:
            raise ValueError(
                f"learner.lora.rank = {self.rank} is more than the {MAX_SERVED_RANK} that vLLM serves adapters of: "
                "lower it, or set learner.lora.publish = 'merged'"
            )
        return self
