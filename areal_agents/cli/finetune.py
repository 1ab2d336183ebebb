"""The commands ``sft`` and ``dpo``, dataclasses as in ``cli/commands.py``.

Their settings are those of ``finetune/config.py``. One that is not given is None here, so that a training which goes on
takes its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from areal_agents.chat.options import ToolFormatName
from areal_agents.cli.common import UsageError, template_variables
from areal_agents.cli.saved_runs import step_range
from areal_agents.errors import ArealError, CheckpointError, ConfigError, Interrupted
from areal_agents.utils.system import require_linux

if TYPE_CHECKING:
    from areal_agents.finetune.config import DpoConfig, SftConfig

_OTHERS = ("data", "resume", "steps", "template_variables")
"""Fields that are no settings of their name."""


@dataclass
class _Finetune:
    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE.jsonl")] = ()
    """Folders of runs, whose saved episodes are taken, and JSONL files in the usual chat format."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The model to start from: ``smollm2``, a local folder, or a hub id."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """The folder of all that is left behind; the trained model is in OUT/model."""
    resume: bool = False
    """Go on with the training in --out, from its last checkpoint; its settings need not be given again."""
    kind: str | None = None
    """Of runs: which episodes, ``train``, ``demonstration``, …; ``eval`` in an evaluation's folder."""
    steps: Annotated[str | None, tyro.conf.arg(metavar="A:B")] = None
    """Of runs: only the steps A to B, both included; either may be left out."""
    epochs: int | None = None
    """Passes over the data; 1."""
    batch: int | None = None
    """Episodes, conversations or pairs an optimizer step; 8."""
    lr: float | None = None
    """Peak learning rate of AdamW; 2e-5, of dpo 1e-6."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """Course of the learning rate after the warm-up, down to 0 where it falls; constant."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises from 0; 0."""
    weight_decay: float | None = None
    """Decoupled weight decay; 0."""
    grad_clip: float | None = None
    """Largest gradient norm; 1."""
    seed: int | None = None
    """Seeds the order of the data, what is held out, and the choice between equals; 0."""
    holdout: float | None = None
    """Share of the tasks (of the questions of a file) that is not trained on, and measured; 0."""
    eval_every: int | None = None
    """Steps between two measurements of it; 0, at the end of each epoch."""
    save_every: int | None = None
    """Steps between checkpoints; 100. 0: only when interrupted and at the end."""
    max_context: int | None = None
    """Longest row in tokens; what is longer is left out, and counted; 2048."""
    history: Literal["auto", "append", "template"] | None = None
    """Of files: as the setting model.history."""
    template_variables: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Of files: as the setting model.template_variables, such as ``enable_thinking=false``."""
    merge_system: bool | None = None
    """Of files: as the setting model.merge_system."""
    tool_format: ToolFormatName | None = None
    """Of files: as the setting model.tool_format."""
    token_budget: int | None = None
    """Most tokens in one micro-batch; 1024."""
    logprob_chunk: int | None = None
    """Targets whose logits exist at once; 512."""
    gradient_checkpointing: bool | None = None
    """Compute each layer again in the backward pass: less memory, a quarter slower."""
    precision: Literal["auto", "bf16", "fp32"] | None = None
    """Autocast precision; master weights and the optimizer are fp32 always."""
    threads: int | None = None
    """Cores; 0, all of them."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute; ``auto``: on the first GPU, else on the processor."""
    tensorboard: bool | None = None
    """Write the metrics for TensorBoard; True."""
    wandb: str | None = None
    """Weights & Biases project to log to as well; none."""

    def run(self, overrides: Sequence[str]) -> int:
        config = self.settings()
        require_linux("training")
        from areal_agents.finetune.folder import how_to_go_on
        from areal_agents.finetune.run import finetune

        try:
            result = asyncio.run(finetune(config, resume=self.resume))
        except ArealError as error:
            told = isinstance(error, Interrupted | ConfigError | CheckpointError)
            if not told and (config.out / "commit.json").exists():
                print(f"once its cause is mended, go on with: {how_to_go_on(config)}", file=sys.stderr)
            raise
        print(result.table())
        print(f"files: {result.out}    trained model: {result.model}")
        return 0

    def settings(self) -> SftConfig | DpoConfig:
        """Read the settings.

        Raises UsageError for those that are missing or out of range, and ConfigError where there is nothing to resume.
        """
        given = self._given()
        if self.out is None:
            raise UsageError("--out is missing: name the folder for the trained model and all else that is left behind")
        if self.resume and not self.data:
            from areal_agents.finetune.folder import read_settings

            old = read_settings(self.out)
            if old.method != self._method:
                raise UsageError(
                    f"{self.out} holds a {old.method} training: go on with it by `areal-agents {old.method}`"
                )
            given = old.model_dump(exclude={"out"}) | given
        else:
            if not self.data:
                raise UsageError("name the data: folders of runs, or JSONL files")
            if self.model is None:
                raise UsageError("--model is missing: name the model to start from, for example smollm2")
            given["data"] = self.data
        return self._validated(given)

    @property
    def _method(self) -> str:
        return type(self).__name__.lower()

    def _given(self) -> dict[str, Any]:
        """Return the settings that were given."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in _OTHERS]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.steps is not None:
            given["first_step"], given["last_step"] = step_range(self.steps)
        if self.template_variables:
            given["template_variables"] = template_variables(self.template_variables)
        return given

    def _validated(self, given: dict[str, Any]) -> SftConfig | DpoConfig:
        from pydantic import ValidationError

        from areal_agents.finetune.config import DpoConfig, SftConfig

        try:
            return (SftConfig if self._method == "sft" else DpoConfig).model_validate(given)
        except ValidationError as error:
            said = [
                f"--{str(e['loc'][0]).replace('_', '-')} is {e['input']!r}: it must be "
                f"{e['msg'].removeprefix('Input should be ')}"
                for e in error.errors()
            ]
            raise UsageError("\n".join(said)) from None


@dataclass
class Sft(_Finetune):
    """Imitate saved episodes or conversations: ``areal-agents sft runs/demo --model smollm2 --out runs/sft``.

    Of a run it takes the sampled tokens themselves. ``--min-reward`` and ``--per-task`` choose the best of them
    (rejection fine-tuning). Of a JSONL file it renders each conversation by the model's chat template; the assistant's
    tokens alone are learned.
    """

    min_reward: float | None = None
    """Of runs: only episodes whose reward reaches this."""
    per_task: int | None = None
    """Of runs: at most so many episodes of each task, those with the highest rewards."""
    turns: Literal["all", "last"] | None = None
    """Which of the assistant's turns train: all of an episode, or its last; all."""


@dataclass
class Dpo(_Finetune):
    """Learn preferences (DPO): ``areal-agents dpo runs/demo --model smollm2 --out runs/dpo``.

    Of a run it pairs the best episode of each group with the worst. A line of a JSONL file has ``chosen`` and
    ``rejected``, and their ``prompt`` or one beginning. The reference is the starting model.
    """

    beta: float | None = None
    """How strongly the policy is held to the starting model; 0.1."""
    label_smoothing: float | None = None
    """The assumed share of pairs whose order is wrong; 0."""
    min_gap: float | None = None
    """Of runs: the least difference between the rewards of a pair; 0.1."""
    pairs: int | None = None
    """Of runs: at most so many pairs a group: best and worst, second best and second worst, …; 1."""
