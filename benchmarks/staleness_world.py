"""The world of ``staleness.py``: a row of symbols, a tiny model that answers them, and one training run in one process.

An episode has ``turns`` turns. Each turn shows a symbol, and the agent says one token. Which token answers a symbol is
the same everywhere, and has to be learned; which symbols are shown is the task. The reward comes at the end.

Staleness is exact: the batch of step t is sampled by the policy of min(t, η) steps ago, of which a copy was kept, and
its tokens carry that version. An asynchronous run is bounded by η, and its data is at about that age once it is under
way; here all of it is, so a run is as stale as its bound lets it be.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from credit_world import next_logits
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.trainer.batches import batch_for
from areal_agents.types import AssistantMessage, Completion, Group, Task, Trajectory, Turn


@dataclass(frozen=True)
class Setting:
    """One training run. All methods and all η have the same sizes and the same learning rate."""

    method: str
    staleness: int
    seed: int
    lr: float = 5e-3
    steps: int = 50
    minibatches: int = 2
    groups: int = 8
    group_size: int = 8
    turns: int = 2
    symbols: int = 4
    hidden: int = 32
    held_out: int = 1024


PLAIN = {"kind": "ppo", "dual_clip": None}
METHODS: dict[str, dict[str, Any]] = {
    "naive": {"loss": PLAIN, "correction": {"kind": "bypass", "token_mask": None}},
    "decoupled": {"loss": PLAIN, "correction": {"kind": "decoupled"}},
    "log_linear": {"loss": PLAIN, "correction": {"kind": "log_linear"}},
    "bypass + mask": {"loss": "ppo", "correction": "bypass"},
    "tis + mask": {"loss": "reinforce", "correction": "importance"},
    "m2po": {
        "loss": "reinforce",
        "correction": {"kind": "importance", "truncate": None, "token_mask": None},
        "mask": "m2po",
    },
}
"""Of ``AlgorithmConfig``, by the name in the record. All else is the default, and ``grpo``."""


def algorithm_of(method: str) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"advantage": "grpo", **METHODS[method]})


def write_model(folder: Path, s: Setting) -> None:
    torch.manual_seed(s.seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2 * s.symbols, hidden_size=s.hidden, intermediate_size=2 * s.hidden, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=2 * s.turns + 1, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip


@torch.no_grad()
def say(model: Any, tasks_NK: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the answers to N tasks of K symbols, all in step.

    Returns the tokens, int [N, K], and their log-probabilities, float [N, K].
    """
    cache, ids = DynamicCache(config=model.config), tasks_NK[:, :1]
    tokens, logprobs = [], []
    for k in range(tasks_NK.shape[1]):
        of_all = torch.log_softmax(next_logits(model, ids, cache), -1)
        said = torch.multinomial(of_all.exp(), 1, generator=generator)
        tokens.append(said)
        logprobs.append(of_all.gather(1, said))
        ids = torch.cat([said, tasks_NK[:, k + 1 : k + 2]], 1)
    return torch.cat(tokens, 1), torch.cat(logprobs, 1)


def rewards_of(tasks_NK: torch.Tensor, said_NK: torch.Tensor, s: Setting) -> torch.Tensor:
    """Score each episode by the share of its right answers, float [N].

    The answers lie after the symbols in the vocabulary: S + (3·s + 1) mod S is that of symbol s.
    """
    return (said_NK == s.symbols + (3 * tasks_NK + 1) % s.symbols).float().mean(1)


def groups_of(
    tasks_NK: torch.Tensor, said_NK: torch.Tensor, logprobs_NK: torch.Tensor, s: Setting, *, version: int
) -> list[Group]:
    """Make groups of what was said, every token labelled with the version that sampled it."""
    rewards = rewards_of(tasks_NK, said_NK, s).tolist()
    tasks, said, logprobs = tasks_NK.tolist(), said_NK.tolist(), logprobs_NK.tolist()
    task, last = Task.make("symbols", split="train", seed=0, payload={}), s.turns - 1
    episodes = []
    for i, reward in enumerate(rewards):
        turns = tuple(
            Turn(
                (tasks[i][k],), Completion((said[i][k],), (logprobs[i][k],), (version,), "stop"),
                AssistantMessage(()), reward if k == last else 0.0, parent=k - 1 if k else None,
            )
            for k in range(s.turns)
        )  # fmt: skip
        episodes.append(Trajectory(f"e{i}", task, f"g{i // s.group_size}", turns, True, False, "answer"))
    return [
        Group(f"g{g}", task, tuple(episodes[g * s.group_size : (g + 1) * s.group_size]), version, g)
        for g in range(s.groups)
    ]


def sampler_of(version: int, staleness: int) -> int:
    """Return the version that samples the batch which the learner steps on at ``version``."""
    return max(version - staleness, 0)


class Policies:
    """The weights of the versions that may still sample, and one model that has any of them."""

    def __init__(self, folder: Path, staleness: int) -> None:
        self._actor = LlamaForCausalLM.from_pretrained(folder).eval()
        self._staleness = staleness
        self.kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights of a new version, and forget those that nobody will sample with again."""
        self.kept[version] = {name: value.detach().clone() for name, value in weights.items()}
        for old in [v for v in self.kept if v < sampler_of(version, self._staleness)]:
            del self.kept[old]

    def model(self, version: int) -> LlamaForCausalLM:
        """Return the model with the weights of a kept version."""
        for name, parameter in self._actor.named_parameters():
            parameter.data = self.kept[version][name]
        return self._actor


def drawn(tasks: np.random.Generator, n: int, s: Setting) -> torch.Tensor:
    """Draw n tasks, int [n, K]."""
    return torch.from_numpy(tasks.integers(0, s.symbols, (n, s.turns)))


def held_out_score(model: LlamaForCausalLM, s: Setting) -> float:
    """Return the mean reward of episodes of fresh tasks, which are the same for every method and η of a seed."""
    shown = drawn(np.random.default_rng([s.seed, 1]), s.held_out, s)
    said, _ = say(model, shown, torch.Generator().manual_seed(s.seed + 10**6))
    return float(rewards_of(shown, said, s).mean())


FIGURES = ("age_mean", "abs_dlogp", "clip_fraction", "masked_share")
"""Of ``off_policy/``; the record has their means over the run."""


async def _train(s: Setting, folder: Path) -> dict[str, Any]:
    algorithm = algorithm_of(s.method)
    config = LearnerConfig(
        lr=s.lr, schedule="linear", precision="fp32", token_budget=128, minibatches=s.minibatches, device="cpu"
    )
    learner = TorchLearner(
        folder, learner=config,
        algorithm=algorithm, total_steps=s.steps, seed=s.seed, publish_dtype=torch.float32, threads=1,
    )  # fmt: skip
    tasks, generator = np.random.default_rng([s.seed, 0]), torch.Generator().manual_seed(s.seed)
    policies = Policies(folder, s.staleness)
    scores: list[float] = []
    figures: list[Mapping[str, float]] = []
    start = time.process_time()
    try:
        for version in range(s.steps):
            policies.keep(version, learner.tensors())
            old = sampler_of(version, s.staleness)
            shown = drawn(tasks, s.groups, s).repeat_interleave(s.group_size, 0)
            said, logprobs = say(policies.model(old), shown, generator)
            groups = groups_of(shown, said, logprobs, s, version=old)
            scores.append(float(rewards_of(shown, said, s).mean()))
            figures.append(await learner.step(await batch_for(learner, groups, algorithm, temperature=1.0)))
        policies.keep(s.steps, learner.tensors())
    finally:
        await learner.close()
    seen = [f for f in figures if "off_policy/abs_dlogp" in f]  # not where no group had a signal
    return {
        "method": s.method, "staleness": s.staleness, "seed": s.seed, "lr": s.lr,
        "score": round(100 * held_out_score(policies.model(s.steps), s), 2),
        **{name: round(float(np.mean([f[f"off_policy/{name}"] for f in seen])), 4) for name in FIGURES if seen},
        "seconds": round(time.process_time() - start, 2), "batches": [round(x, 3) for x in scores],
    }  # fmt: skip


def train(s: Setting) -> dict[str, Any]:
    """Train from scratch for ``steps`` batches, and score the last policy."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), s)
        return asyncio.run(_train(s, Path(name)))
