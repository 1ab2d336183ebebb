"""The settings of a fine-tuning, as frozen pydantic models: what both kinds have, then imitation, then preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from areal_agents.chat.options import ChatOptions, ToolFormatName
from areal_agents.learner.optim import Schedule
from areal_agents.settings.config import LearnerConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.settings.section import Count, Positive, Section

Turns = Literal["all", "last"]


class FinetuneConfig(Section):
    data: tuple[str, ...] = Field(min_length=1)
    """Run folders and JSONL files."""
    model: str
    """The model to start from: ``smollm2``, a local folder, or a hub id."""
    out: Path
    """The folder of all that is left behind."""
    kind: str = ""
    """Of runs: which episodes, such as ``train`` or ``demonstration``."""
    first_step: int = Field(default=0, ge=0)
    last_step: int | None = Field(default=None, ge=0)
    """Of runs: only the steps from ``first_step`` to this, both included. None is the last one."""
    history: Literal["auto", "append", "template"] = "auto"
    template_variables: dict[str, Any] = Field(default_factory=dict)
    merge_system: bool = False
    tool_format: ToolFormatName = "auto"
    max_context: Count = 2048
    """Longest row in tokens; examples with a longer one are left out."""
    epochs: Count = 1
    batch: Count = 8
    """Examples an optimizer step: episodes, or pairs."""
    lr: Positive = 2e-5
    schedule: Schedule = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    grad_clip: Positive = 1.0
    seed: int = Field(default=0, ge=0)
    holdout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the tasks (of the lines of a file) that is not trained on, and whose loss is measured."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between two measurements of it; 0: at each epoch's end."""
    save_every: int = Field(default=100, ge=0)
    """Steps between checkpoints; 0: only when interrupted and at the end."""
    lora_rank: int = Field(default=0, ge=0)
    """Rank of the adapters that train in the place of the weights; 0: every weight trains."""
    lora_alpha: Positive = 32.0
    lora_targets: tuple[str, ...] = ()
    token_budget: Count = 1024
    logprob_chunk: Count = 512
    gradient_checkpointing: bool = False
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    threads: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = True
    wandb: str = ""

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        if not self.lora_rank and (self.lora_targets or self.lora_alpha != LoraConfig().alpha):
            raise ValueError("--lora-alpha and --lora-targets are of adapters: set --lora-rank, or leave them out")
        if not all(self.lora_targets):
            raise ValueError("--lora-targets has an empty name: name linear layers, such as q_proj")
        return self

    @property
    def chat(self) -> ChatOptions:
        """What of this shapes prompts."""
        return ChatOptions(self.history, self.template_variables, self.merge_system, self.tool_format)

    @property
    def learner(self) -> LearnerConfig:
        """The settings of the learner."""
        names = LearnerConfig.model_fields.keys() & type(self).model_fields.keys()
        lora = LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha, targets=self.lora_targets)
        return LearnerConfig(**{name: getattr(self, name) for name in names}, lora=lora)


class SftConfig(FinetuneConfig):
    method: Literal["sft"] = "sft"
    min_reward: float | None = None
    """Of runs: only episodes whose reward reaches this."""
    per_task: int | None = Field(default=None, ge=1)
    """Of runs: at most so many episodes of each task, those with the highest rewards."""
    turns: Turns = "all"
    """Which of the assistant's turns train: all of an episode, or its last."""


class DpoConfig(FinetuneConfig):
    method: Literal["dpo"] = "dpo"
    lr: Positive = 1e-6
    beta: Positive = 0.1
    """How strongly the policy is held to the starting model."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The assumed share of pairs whose order is wrong."""
    min_gap: Positive = 0.1
    """Of runs: the least difference between the rewards of a pair."""
    pairs: Count = 1
    """Of runs: at most so many pairs a group: best and worst, second best and second worst, …"""


Finetune = Annotated[SftConfig | DpoConfig, Field(discriminator="method")]
MAY_CHANGE = frozenset(
    {"out", "save_every", "threads", "device", "token_budget", "logprob_chunk", "gradient_checkpointing"}
    | {"tensorboard", "wandb"}
)
"""Settings that a training which goes on may have otherwise than before."""
