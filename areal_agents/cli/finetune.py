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

Schedule = Literal["constant", "linear", "cosine"]  # as learner/optim.py's, which imports torch
_OTHERS = ("data", "resume", "steps", "template_variables", "no_tensorboard")
"""Fields that are no settings of their name."""


def _arg(metavar: str, default: str) -> Any:
    """Return how the help shows a setting: its value's form, and what it is where none is given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass
class _Finetune:
    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE.jsonl")] = ()
    """Folders of runs, whose saved episodes are taken, and JSONL files in the usual chat format."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(required)")] = None
    """The model to start from: ``smollm2``, a local folder, or a hub id."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="OUT", help_behavior_hint="(required)")] = None
    """The folder of all that is left behind; the trained model is in OUT/model."""
    resume: bool = False
    """Go on with the training in --out, from its last checkpoint; its settings need not be given again."""
    kind: Annotated[str | None, _arg("STR", "the first of train, eval, …")] = None
    """Of runs: which episodes, ``train``, ``demonstration``, …; ``eval`` in an evaluation's folder."""
    steps: Annotated[str | None, _arg("A:B", "all")] = None
    """Of runs: only the steps A to B, both included; either may be left out."""
    epochs: Annotated[int | None, _arg("INT", "1")] = None
    """Passes over the data."""
    batch: Annotated[int | None, _arg("INT", "8")] = None
    """Episodes, conversations or pairs an optimizer step."""
    lr: Annotated[float | None, _arg("FLOAT", "2e-5; of dpo 1e-6")] = None
    """Peak learning rate of AdamW."""
    schedule: Annotated[
        Literal["constant", "linear", "cosine"] | None, _arg("{constant,linear,cosine}", "constant")
    ] = None
    """Course of the learning rate after the warm-up; where it falls, to 0 after the last step."""
    warmup_steps: Annotated[int | None, _arg("INT", "0")] = None
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float | None, _arg("FLOAT", "0")] = None
    """Decoupled weight decay."""
    grad_clip: Annotated[float | None, _arg("FLOAT", "1")] = None
    """Largest gradient norm."""
    seed: Annotated[int | None, _arg("INT", "0")] = None
    """Seeds the order of the data, what is held out, and the choice between equals."""
    holdout: Annotated[float | None, _arg("FLOAT", "0")] = None
    """Share of the tasks (of the questions of files) that is not trained on, and measured."""
    eval_every: Annotated[int | None, _arg("INT", "0")] = None
    """Steps between two measurements of it; 0: at the end of each epoch."""
    save_every: Annotated[int | None, _arg("INT", "100")] = None
    """Steps between checkpoints; 0: only when interrupted and at the end."""
    max_context: Annotated[int | None, _arg("INT", "2048")] = None
    """Longest row in tokens; what is longer is left out, and counted."""
    history: Annotated[Literal["auto", "append", "template"] | None, _arg("{auto,append,template}", "auto")] = None
    """Of files: as the setting model.history."""
    template_variables: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Of files: as the setting model.template_variables, such as ``enable_thinking=false``."""
    merge_system: bool = False
    """Of files: as the setting model.merge_system."""
    tool_format: Annotated[ToolFormatName | None, _arg("NAME", "auto")] = None
    """Of files: as the setting model.tool_format."""
    lora_rank: Annotated[int | None, _arg("INT", "0")] = None
    """Rank of adapters that train in the place of the weights; 0: every weight trains."""
    lora_alpha: Annotated[float | None, _arg("FLOAT", "32")] = None
    """What adapters add counts alpha/rank times."""
    lora_targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LAYER")] = ()
    """Linear layers with an adapter, by the end of their names; none: all but the head."""
    token_budget: Annotated[int | None, _arg("INT", "1024")] = None
    """Most tokens in one micro-batch."""
    logprob_chunk: Annotated[int | None, _arg("INT", "512")] = None
    """Targets whose logits exist at once."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory, a quarter slower."""
    precision: Annotated[Literal["auto", "bf16", "fp32"] | None, _arg("{auto,bf16,fp32}", "auto")] = None
    """Autocast precision; master weights and the optimizer are fp32 always."""
    threads: Annotated[int | None, _arg("INT", "0")] = None
    """Cores; 0: all of them."""
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, _arg("{auto,cpu,cuda}", "auto")] = None
    """Where to compute; ``auto``: on the first GPU, else on the processor."""
    no_tensorboard: bool = False
    """Do not write the metrics for TensorBoard."""
    wandb: Annotated[str | None, _arg("PROJECT", "none")] = None
    """Weights & Biases project to log to as well."""

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
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        if not self.lora_targets:
            del given["lora_targets"]
        if self.steps is not None:
            given["first_step"], given["last_step"] = step_range(self.steps)
        if self.template_variables:
            given["template_variables"] = template_variables(self.template_variables)
        return given | ({"tensorboard": False} if self.no_tensorboard else {})

    def _validated(self, given: dict[str, Any]) -> SftConfig | DpoConfig:
        from pydantic import ValidationError

        from areal_agents.finetune.config import DpoConfig, SftConfig

        try:
            return (SftConfig if self._method == "sft" else DpoConfig).model_validate(given)
        except ValidationError as error:
            said = [
                str(e["ctx"]["error"])
                if not e["loc"]
                else f"--{str(e['loc'][0]).replace('_', '-')} is {e['input']!r}: it must be "
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

    min_reward: Annotated[float | None, _arg("FLOAT", "none")] = None
    """Of runs: only episodes whose reward reaches this."""
    per_task: Annotated[int | None, _arg("INT", "none")] = None
    """Of runs: at most so many episodes of each task, those with the highest rewards."""
    turns: Annotated[Literal["all", "last"] | None, _arg("{all,last}", "all")] = None
    """Which of the assistant's turns train: all of an episode, or its last."""


@dataclass
class Dpo(_Finetune):
    """Learn preferences (DPO): ``areal-agents dpo runs/demo --model smollm2 --out runs/dpo``.

    Of a run it pairs the best episode of each group with the worst. A line of a JSONL file has ``chosen`` and
    ``rejected``, and their ``prompt`` or one beginning. The reference is the starting model.
    """

    beta: Annotated[float | None, _arg("FLOAT", "0.1")] = None
    """How strongly the policy is held to the starting model."""
    label_smoothing: Annotated[float | None, _arg("FLOAT", "0")] = None
    """The assumed share of pairs whose order is wrong."""
    min_gap: Annotated[float | None, _arg("FLOAT", "0.1")] = None
    """Of runs: the least difference between the rewards of a pair."""
    pairs: Annotated[int | None, _arg("INT", "1")] = None
    """Of runs: at most so many pairs a group: best and worst, second best and second worst, …"""
