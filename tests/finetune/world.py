"""Saved runs with episodes of known rewards, and configurations of fine-tunings on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from areal_agents.chat.format import ChatFormat
from areal_agents.finetune.config import DpoConfig, SftConfig
from areal_agents.finetune.examples import Sequences
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.trajectories import Record
from areal_agents.types import Completion, StopReason, Task, Trajectory, Turn, user
from tests.saved_runs import save
from tests.tiny_tokenizer import CHATML, tiny

SMALL = {"max_context": 256, "precision": "fp32", "tensorboard": False}


@cache
def fmt() -> ChatFormat:
    return ChatFormat(tiny(CHATML))


def turn(text: str, reward: float = 0.0, *, asked: str = "go", parent: int | None = None) -> Turn:
    ids = fmt().encode_said(text)
    prompt = fmt().first_prompt([user(asked)]) if parent is None else fmt().encode_said(asked)
    completion = Completion(ids, (-1.0,) * len(ids), (0,) * len(ids), "stop")
    return Turn(prompt, completion, fmt().parse(ids, "stop"), reward, parent=parent, observation=(user(asked),))


def record(
    id: str, *turns: Turn, task: str = "t", kind: str = "train", step: int = 1, stop: StopReason = "answer"
) -> Record:
    made = Task.make(task, split="train", seed=0, payload={})
    group = id.rpartition("/")[0]
    return Record(kind, step, Trajectory(id, made, group, turns, True, False, stop))


def run_folder(out: Path, records: Sequence[Record], *, env: str = "x:Y") -> Path:
    config = TrainConfig.model_validate({"out": out, "env": {"id": env}})
    save(out, config, records)
    return out


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def sft(data: Path, model: Path, out: Path, **changes: Any) -> SftConfig:
    return SftConfig.model_validate(SMALL | {"data": (str(data),), "model": str(model), "out": out} | changes)


def dpo(data: Path, model: Path, out: Path, **changes: Any) -> DpoConfig:
    return DpoConfig.model_validate(SMALL | {"data": (str(data),), "model": str(model), "out": out} | changes)


def targets(said: Sequences) -> list[str]:
    """The text of each row's targets."""
    return [fmt().tokenizer.decode(row.ids[np.flatnonzero(row.mask)]) for row in said.rows]
