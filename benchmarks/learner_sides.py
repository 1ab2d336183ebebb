"""The sides of ``benchmarks/learner.py``: ``python learner_sides.py ours|trl|plain``, one request a process.

A request holds the episodes as token ids with an advantage each. Each side takes a warm-up step on the same rows cut
short, then the measured ones, and answers with the seconds of each, its peak memory and the norms of its gradients.
``trl`` runs in TRL's own virtual environment: nothing of this package is imported there.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measured_process import pss_mib, serve, tree

KINDS = {"aten::mm": "products", "aten::addmm": "products", "scaled_dot_product": "attention", "adamw": "AdamW"}
"""What a kind of operation is called, by a part of PyTorch's name for it. The rest is mostly one number at a time."""
CUT = 16
"""Tokens of a prompt and of a completion in the warm-up step."""


def figure(text: str, name: str) -> float:
    """Return a number of KiB out of the text of a file in /proc, in MiB."""
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(f"{name}:"))


def peak_mib() -> tuple[float, float]:
    """Return the largest RSS since it was last reset, exact, and the PSS at that moment with that of all children.

    What a process shares with others, libraries, stays the same over a step: PSS is as much below RSS as it is now.
    """
    status, rollup = (Path(f"/proc/self/{name}").read_text() for name in ("status", "smaps_rollup"))
    most, own = figure(status, "VmHWM"), figure(rollup, "Pss")
    others = pss_mib(os.getpid()) - own if len(tree(os.getpid())) > 1 else 0.0
    return round(most, 1), round(most - (figure(rollup, "Rss") - own) + others, 1)


class Meter:
    """The seconds and the peak memory of each measured step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._start = self._cpu = 0.0

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what there is now
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        rss, pss = peak_mib()
        self.steps.append(
            {"seconds": round(seconds, 4), "cpu_seconds": round(cpu, 4), "peak_rss_mib": rss, "peak_pss_mib": pss}
        )

    @contextmanager
    def step(self) -> Iterator[None]:
        self.begin()
        yield
        self.end()

    def answer(self, **more: Any) -> dict[str, Any]:
        """Return what was measured, the warm-up left out."""
        steps = self.steps[1:]
        return {
            "steps": steps,
            "seconds": statistics.median(s["seconds"] for s in steps),
            "cpu_seconds": statistics.median(s["cpu_seconds"] for s in steps),
            "peak_pss_mib": max(s["peak_pss_mib"] for s in steps),
            "peak_rss_mib": max(s["peak_rss_mib"] for s in steps),
            **more,
        }


def cut(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups with short prompts and completions."""
    return [
        group | {"prompt": group["prompt"][:CUT], "completions": [c[:CUT] for c in group["completions"]]}
        for group in groups
    ]  # fmt: skip


def padded(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return prompts padded on the left and completions padded on the right, a row each, as TRL's trainer makes them.

    prompt_ids and prompt_mask are int [B, P], completion_ids and completion_mask int [B, C], advantages float [B].
    """
    import torch

    rows = [(g["prompt"], c, a) for g in groups for c, a in zip(g["completions"], g["advantages"], strict=True)]
    width, length = max(len(p) for p, _, _ in rows), max(len(c) for _, c, _ in rows)
    left = [[0] * (width - len(p)) for p, _, _ in rows]
    right = [[0] * (length - len(c)) for _, c, _ in rows]
    return {
        "prompt_ids": torch.tensor([pad + p for pad, (p, _, _) in zip(left, rows, strict=True)]),
        "prompt_mask": torch.tensor([pad + [1] * len(p) for pad, (p, _, _) in zip(left, rows, strict=True)]),
        "completion_ids": torch.tensor([c + pad for pad, (_, c, _) in zip(right, rows, strict=True)]),
        "completion_mask": torch.tensor([[1] * len(c) + pad for pad, (_, c, _) in zip(right, rows, strict=True)]),
        "advantages": torch.tensor([float(a) for _, _, a in rows]),
    }


def keep_gradients(path: str, named: Any) -> None:
    """Write each parameter's gradient by its name, where a path is given."""
    if path:
        import torch

        torch.save({name: p.grad.detach().clone() for name, p in named if p.grad is not None}, path)


def ours(asked: dict[str, Any]) -> dict[str, Any]:
    """``TorchLearner.step`` on the episodes, whose log μ is what the learner itself says before the clock starts."""
    from areal_agents.learner.learner import TorchLearner
    from areal_agents.settings.config import AlgorithmConfig, LearnerConfig

    made = TorchLearner(
        asked["model"],
        algorithm=AlgorithmConfig.model_validate({"advantage": {"kind": "grpo"}, "aggregation": "token"}),
        learner=LearnerConfig.model_validate({
            "lr": asked["lr"], "precision": asked["precision"], "threads": asked["threads"],
            "gradient_checkpointing": asked["checkpointing"], "lora": {"rank": asked["lora"]},
        } | ({"grad_clip": 1e9} if asked["gradients"] else {}) | asked.get("learner", {})),
        total_steps=1000, threads=asked["threads"],
    )  # fmt: skip
    made._optimizer.register_step_pre_hook(
        lambda *_: keep_gradients(asked["gradients"], made._model.named_parameters())
    )
    meter, found, kinds = Meter(), [], dict[str, float]()

    async def run() -> None:
        for groups in [cut(asked["groups"]), *[asked["groups"]] * asked["steps"]]:
            batch = await with_logprobs(made, rows_of(groups, made.version))
            with meter.step():
                found.append(await made.step(batch))
        if asked.get("profile"):
            batch = await with_logprobs(made, rows_of(asked["groups"], made.version))
            kinds.update(await made._run(lambda: by_kind(lambda: made._step(batch))))
        await made.close()

    asyncio.run(run())
    if any(metrics["skipped"] or metrics["minibatches_empty"] or metrics["rows_skipped"] for metrics in found):
        raise RuntimeError(f"a step was left out: {found}")
    return meter.answer(
        tokens_forward=int(found[-1]["tokens_forward"]), trained=int(found[-1]["tokens"]),
        grad_norm=[metrics["grad_norm"] for metrics in found[1:]], settings=made.config.model_dump(mode="json"),
        **({"profile": kinds} if kinds else {}),
    )  # fmt: skip


def by_kind(work: Callable[[], object]) -> dict[str, float]:
    """Return the share of the seconds of ``work``, which runs in this thread, by the kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        work()
    seconds = dict.fromkeys(("products", "attention", "AdamW", "all else"), 0.0)
    for event in found.key_averages():
        kind = next((k for name, k in KINDS.items() if name in event.key), "all else")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return {kind: round(value / sum(seconds.values()), 3) for kind, value in seconds.items()}


def rows_of(groups: list[dict[str, Any]], version: int) -> Any:
    """Return the episodes as a batch for the learner, with log μ = 0."""
    import numpy as np

    from areal_agents.algorithms.batch import Batch, Row

    rows: list[Row] = []
    for group in groups:
        for completion, advantage in zip(group["completions"], group["advantages"], strict=True):
            mask = np.arange(len(group["prompt"]) + len(completion)) >= len(group["prompt"])
            rows.append(Row(
                ids=np.asarray([*group["prompt"], *completion], np.int64), mask=mask,
                logprobs=np.zeros(len(mask), np.float32), versions=np.where(mask, version, -1).astype(np.int64),
                turns=np.where(mask, 0, -1).astype(np.int64),
                advantages=np.where(mask, advantage, 0.0).astype(np.float32), episode=len(rows),
            ))  # fmt: skip
    return Batch(tuple(rows), len(rows), version, 1.0)


async def with_logprobs(made: Any, batch: Any) -> Any:
    """Return the batch as an engine with these very weights would have sampled it, as if nobody had asked for that."""
    from dataclasses import replace

    found = await made.logprobs(batch)
    made._asked = 0  # a step counts what was computed for its batch before it: here that was the sampler's work
    return replace(batch, rows=tuple(replace(r, logprobs=p) for r, p in zip(batch.rows, found, strict=True)))


def plain(asked: dict[str, Any]) -> dict[str, Any]:
    """A loop as one writes it: padded rows, bf16 autocast over fp32 weights, logits of completions alone, AdamW."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).train()
    if asked["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    meter, norms, loss = Meter(), [], torch.zeros(())
    for groups in [cut(asked["groups"]), *[asked["groups"]] * asked["steps"]]:
        data = padded(groups)
        with meter.step():
            for i in range(0, len(data["advantages"]), asked["micro_batch"]):
                part = {name: tensor[i : i + asked["micro_batch"]] for name, tensor in data.items()}
                loss = policy_loss(model, part, autocast=asked["precision"] == "bf16") / data["completion_mask"].sum()
                loss.backward()
            keep_gradients(asked["gradients"], model.named_parameters())
            limit = float("inf") if asked["gradients"] else 1.0
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter.answer(
        tokens_forward=data["prompt_ids"].numel() + data["completion_ids"].numel(),
        trained=int(data["completion_mask"].sum()), grad_norm=norms[1:],
        settings={"micro_batch": asked["micro_batch"], "checkpointing": asked["checkpointing"]},
    )  # fmt: skip


def policy_loss(model: Any, part: dict[str, Any], *, autocast: bool) -> Any:
    """Return the sum of GRPO's loss over the completions' tokens, where π is the policy that sampled."""
    import torch

    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
    mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = part["completion_ids"].shape[1] + 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    logps = torch.log_softmax(logits.float(), -1).gather(2, part["completion_ids"][..., None])[..., 0]
    ratio = torch.exp(logps - logps.detach())
    clipped = ratio.clamp(0.8, 1.2)
    advantages = part["advantages"][:, None]
    return -(torch.minimum(ratio * advantages, clipped * advantages) * part["completion_mask"]).sum()


def trl(asked: dict[str, Any]) -> dict[str, Any]:
    """``GRPOTrainer.train``, whose generation and scoring are replaced by the given episodes, and nothing else."""
    import torch
    import transformers
    import trl as library
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    transformers.utils.logging.disable_progress_bar()
    meter, rows = Meter(), sum(len(g["completions"]) for g in asked["groups"])
    todo = [padded(groups) for groups in [cut(asked["groups"]), *[asked["groups"]] * asked["steps"]]]

    class Given(library.GRPOTrainer):
        """A trainer that is given what its own generation and its reward functions would have returned."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            data = todo[len(meter.steps)]
            return data | {"num_items_in_batch": data["completion_mask"].sum()}

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            meter.begin()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            keep_gradients(asked["gradients"], more["model"].named_parameters())

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            meter.end()

    def reward(completions: list[Any], **more: Any) -> list[float]:
        raise RuntimeError("the episodes are given: nothing is scored here")

    micro = min(asked["micro_batch"], rows)
    config = library.GRPOConfig(
        output_dir=asked["out"], max_steps=asked["steps"] + 1, learning_rate=asked["lr"], beta=0.0, use_cpu=True,
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
        num_generations=len(asked["groups"][0]["completions"]), bf16=asked["precision"] == "bf16", adam_beta2=0.95,
        gradient_checkpointing=asked["checkpointing"], lr_scheduler_type="constant", report_to="none",
        model_init_kwargs={"dtype": asked["dtype"]}, save_strategy="no", logging_steps=1, disable_tqdm=True,
        max_completion_length=len(asked["groups"][0]["completions"][0]), temperature=1.0,
        **({"max_grad_norm": 0.0} if asked["gradients"] else {}),
    )  # fmt: skip
    trainer = Given(
        model=asked["model"], reward_funcs=reward, args=config, callbacks=[Steps()], **adapters(asked["lora"]),
        train_dataset=Dataset.from_list([{"prompt": f"{i}"} for i in range(len(asked["groups"]) * len(todo))]),
        processing_class=AutoTokenizer.from_pretrained(asked["tokenizer"]),
    )  # fmt: skip
    trainer.train()
    if len(meter.steps) != len(todo):
        raise RuntimeError(f"{len(meter.steps)} of {len(todo)} steps were taken")
    logs = [row for row in trainer.state.log_history if "grad_norm" in row]
    data = todo[-1]
    return meter.answer(
        tokens_forward=data["prompt_ids"].numel() + data["completion_ids"].numel(),
        trained=int(data["completion_mask"].sum()), grad_norm=[row["grad_norm"] for row in logs][1:],
        settings={
            "loss_type": config.loss_type, "optimizer": str(config.optim), "bf16": config.bf16,
            "checkpointing": config.gradient_checkpointing, "micro_batch": micro,
            "steps_per_generation": config.steps_per_generation, "num_iterations": config.num_iterations,
            "threads": torch.get_num_threads(), "trl": library.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )  # fmt: skip


def adapters(rank: int) -> dict[str, Any]:
    """Return what TRL's trainer needs for adapters on every linear layer but the head, as ours has them."""
    if not rank:
        return {}
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)}


SIDES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"ours": ours, "trl": trl, "plain": plain}


def on_cores(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the side on the same number of cores, whatever it counts its threads by."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked["threads"]])
    return SIDES[sys.argv[1]](asked)


if __name__ == "__main__":
    serve(on_cores)
