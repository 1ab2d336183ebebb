"""The world of ``credit.py``: a chain of doors, a tiny model that opens them, and one training run in one process.

An episode has TURNS turns. Each turn shows the symbol on the door that the agent stands before, and the agent says one
token. The door's own token opens it, and the next door is shown; any other token leaves the agent where it is. Which
symbols stand on the doors is the task; which token opens which symbol is the same everywhere, and has to be learned.

    dense    1/TURNS at each turn that opened a door
    sparse   the same sum at the last turn alone

Both twins have the same returns, so an estimator of one number an episode cannot tell them apart.
"""

from __future__ import annotations

import asyncio
import inspect
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.trainer.batches import batch_for
from areal_agents.types import AssistantMessage, Completion, Group, Task, Trajectory, Turn

TURNS, SYMBOLS, VOCABULARY = 12, 8, 24
ASK = VOCABULARY - 1
"""Follows the symbol; the answer comes next."""
FIRST_ANSWER = SYMBOLS
"""The token that opens symbol s is FIRST_ANSWER + (3·s + 1) mod SYMBOLS."""
WINDOW = 5
"""Batches that the score is averaged over."""


@dataclass(frozen=True)
class Setting:
    """One training run."""

    method: str
    dense: bool
    lr: float
    seed: int
    groups: int = 4
    group_size: int = 8
    most_steps: int = 300
    threshold: float = 0.8


METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo"},
    "turn_return": {"advantage": "turn_return"},
    "turn_return 0.5": {"advantage": {"kind": "turn_return", "gamma": 0.5}},
    "gigpo": {"advantage": "gigpo"},
    "mt_grpo": {"advantage": "mt_grpo"},
    "turn_gae": {"advantage": "turn_gae", "critic": {"kind": "own"}, "normalize": "batch"},
    "gae": {"advantage": {"kind": "gae", "lam": 0.95}, "critic": {"kind": "own"}, "normalize": "batch"},
}
"""Of ``AlgorithmConfig``, by the name in the record. All else is the default; a critic has the policy's rate."""
TURN_LEVEL = tuple(m for m in METHODS if m not in ("grpo", "gae"))


def opens(symbol: int) -> int:
    return FIRST_ANSWER + (3 * symbol + 1) % SYMBOLS


def write_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=4 * TURNS, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip


def next_logits(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Run the model on ids that follow what the cache has; return the last logits, float [N, vocabulary]."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # it was renamed
    return model(input_ids=ids, use_cache=True, **{name: cache}).logits[:, -1]


def play(model: Any, doors: Sequence[Sequence[int]], generator: torch.Generator, *, dense: bool) -> list[Trajectory]:
    """Play one episode for each entry of ``doors``, all in step."""
    n = len(doors)
    place, cache = [0] * n, DynamicCache(config=model.config)
    said: list[list[Turn]] = [[] for _ in range(n)]
    answers: torch.Tensor | None = None
    for k in range(TURNS):
        shown = torch.tensor([[doors[i][place[i]], ASK] for i in range(n)])
        ids = shown if answers is None else torch.cat([answers[:, None], shown], 1)
        with torch.no_grad():
            logprobs = torch.log_softmax(next_logits(model, ids, cache), -1)
        answers = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
        for i in range(n):
            token, symbol = int(answers[i]), doors[i][place[i]]
            opened = token == opens(symbol)
            done = Completion((token,), (float(logprobs[i, token]),), (0,), "stop")
            key = f"{place[i]}:{symbol}"
            place[i] += opened
            reward = opened / TURNS if dense else (place[i] / TURNS if k == TURNS - 1 else 0.0)
            said[i].append(
                Turn((symbol, ASK), done, AssistantMessage(()), reward, parent=k - 1 if k else None, state_key=key)
            )
    task = Task.make("doors", split="train", seed=0, payload={})
    return [Trajectory(f"e{i}", task, "g", tuple(turns), True, False, "answer") for i, turns in enumerate(said)]


def groups_of(played: Sequence[Trajectory], size: int, version: int) -> list[Group]:
    """Cut episodes into groups, their tokens labelled with the version that sampled them."""
    groups = []
    for g in range(0, len(played), size):
        episodes = tuple(
            Trajectory(
                t.id, t.task, f"g{g}",
                tuple(
                    Turn(
                        k.prompt_suffix, Completion(k.completion.ids, k.completion.logprobs, (version,), "stop"),
                        k.message, k.reward, parent=k.parent, state_key=k.state_key,
                    )
                    for k in t.turns
                ),
                True, False, "answer",
            )
            for t in played[g : g + size]
        )  # fmt: skip
        groups.append(Group(f"g{g}", episodes[0].task, episodes, version, g))
    return groups


async def _train(s: Setting, folder: Path) -> dict[str, Any]:
    chosen = METHODS[s.method]
    critic = {"critic": {**chosen["critic"], "lr": s.lr}} if "critic" in chosen else {}
    algorithm = AlgorithmConfig.model_validate({**chosen, **critic})
    learner = TorchLearner(
        folder, learner=LearnerConfig(lr=s.lr, precision="fp32", token_budget=4096), algorithm=algorithm,
        total_steps=s.most_steps, seed=s.seed, publish_dtype=torch.float32, threads=1,
    )  # fmt: skip
    tasks, generator = np.random.default_rng(s.seed), torch.Generator().manual_seed(s.seed)
    actor, weights = LlamaForCausalLM.from_pretrained(folder).eval(), learner.tensors()
    for name, parameter in actor.named_parameters():  # the learner steps in place: the actor always has its weights
        parameter.data = weights[name]
    scores: list[float] = []
    start = time.perf_counter()
    try:
        while len(scores) < s.most_steps:
            doors = [tasks.integers(0, SYMBOLS, TURNS).tolist() for _ in range(s.groups)]
            played = play(actor, [d for d in doors for _ in range(s.group_size)], generator, dense=s.dense)
            scores.append(float(np.mean([t.reward for t in played])))
            if len(scores) >= WINDOW and np.mean(scores[-WINDOW:]) >= s.threshold:
                break
            version = learner.version
            groups = groups_of(played, s.group_size, version)
            await learner.step(await batch_for(learner, groups, algorithm, temperature=1.0))
    finally:
        await learner.close()
    reached = len(scores) >= WINDOW and float(np.mean(scores[-WINDOW:])) >= s.threshold
    return {
        "method": s.method, "dense": s.dense, "lr": s.lr, "seed": s.seed, "reached": bool(reached),
        "episodes": len(scores) * s.groups * s.group_size, "seconds": round(time.perf_counter() - start, 2),
        "scores": [round(x, 3) for x in scores],
    }  # fmt: skip


def train(s: Setting) -> dict[str, Any]:
    """Train from scratch until the mean score of WINDOW batches reaches the threshold, or for ``most_steps``."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), s.seed)
        return asyncio.run(_train(s, Path(name)))
