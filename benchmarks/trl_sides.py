"""The two sides of ``benchmarks/trl_step.py``: ``python trl_sides.py ours|trl``, one request a process.

Both answer with the wall clock at the end of each step, the tokens each step sampled, and what they trained with.
``trl`` runs in TRL's own virtual environment: nothing of this package is imported there.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from measured_process import serve
from text_envs import share_of


def ours(asked: dict[str, Any]) -> dict[str, Any]:
    """A whole synchronous run of ``areal_agents.trainer.loop``."""
    from areal_agents.settings.config import TrainConfig
    from areal_agents.tracking.tracker import read_metrics
    from areal_agents.trainer.loop import train

    prompts, group = asked["prompts"], asked["group"]
    config = TrainConfig.model_validate({
        "steps": asked["steps"], "seed": asked["seed"], "out": asked["out"],
        "model": {"path": asked["model"], "max_context": 512},
        "env": {"id": asked["env"]},
        "engine": {"precision": "bf16", "max_batch": prompts * group},
        "rollout": {
            "mode": "sync", "groups": prompts, "group_size": group, "concurrency": prompts * group, "max_turns": 1,
            "max_turn_tokens": asked["tokens"], "temperature": 1.0,
        },
        "algorithm": {"advantage": {"kind": "grpo", "normalize": True}, "aggregation": "token"},
        "learner": {"lr": asked["lr"], "precision": "bf16"} | asked.get("learner", {}),
        "eval": {"n": 1},
    })  # fmt: skip
    asyncio.run(train(config, console=False))
    rows = read_metrics(Path(asked["out"]), kind="train")
    return {
        "step_ends": [row["time"] for row in rows],
        "tokens": [row["sampled_tokens"] for row in rows],
        "episodes": [row["episodes"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "reward": [row["reward"] for row in rows],
        "wait_seconds": [row["wait_seconds"] for row in rows],
        "learner_seconds": [row["seconds"] for row in rows],
        "settings": {"master_weights": "float32", "products": "bfloat16", "engine_weights": "bfloat16"},
    }


def trl(asked: dict[str, Any]) -> dict[str, Any]:
    """``GRPOTrainer.train`` on the same prompts; generation by transformers' ``generate``, no vLLM."""
    import torch
    import transformers
    import trl as library
    from datasets import Dataset
    from transformers import TrainerCallback

    transformers.utils.logging.disable_progress_bar()
    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            ends.append(time.time())

    def reward(completions: list[Any], **more: Any) -> list[float]:
        return [share_of(completion[0]["content"]) for completion in completions]

    chosen, prompts, group = asked["settings"], asked["prompts"], asked["group"]
    total = prompts * group
    config = library.GRPOConfig(
        output_dir=asked["out"], max_steps=asked["steps"], seed=asked["seed"], learning_rate=asked["lr"],
        per_device_train_batch_size=chosen["micro_batch"], gradient_accumulation_steps=total // chosen["micro_batch"],
        num_generations=group, max_completion_length=asked["tokens"], temperature=1.0, beta=0.0, use_cpu=True,
        bf16=True, gradient_checkpointing=chosen["gradient_checkpointing"], lr_scheduler_type="constant",
        model_init_kwargs={"dtype": chosen["dtype"]}, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, adam_beta2=0.95,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": messages} for messages in asked["messages"]])
    trainer = library.GRPOTrainer(
        model=asked["model"], reward_funcs=reward, args=config, train_dataset=data, callbacks=[Ends()]
    )
    weight = trainer.model.get_input_embeddings().weight
    before = weight.detach().clone()
    trainer.train()
    logs = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return {
        "step_ends": ends,
        "tokens": [row["completions/mean_length"] * total for row in logs],
        "episodes": [total] * len(logs),
        "grad_norm": [row["grad_norm"] for row in logs],
        "reward": [row["reward"] for row in logs],
        "settings": chosen | {
            "bf16": config.bf16, "weights": str(weight.dtype), "weights_changed": bool((weight != before).any()),
            "steps_per_generation": config.steps_per_generation, "threads": torch.get_num_threads(),
            "optimizer": str(config.optim), "trl": library.__version__, "transformers": transformers.__version__,
            "torch": torch.__version__, "log": logs[-1],
        },
    }  # fmt: skip


def on_cores(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the side on the same number of cores, whatever it counts its threads by."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked["threads"]])
    return {"ours": ours, "trl": trl}[sys.argv[1]](asked)


if __name__ == "__main__":
    serve(on_cores)
