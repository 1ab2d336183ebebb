"""Reinforcement learning on a language model in one file, the one to read first.

    sample ─▶ rewards ─▶ advantages ─▶ loss ─▶ optimizer step ─▶ publish the weights ─▶ sample again

``python examples/rl_loop.py`` trains a tiny random model in less than a minute on two cores, ``--model smollm2`` a real
one, for longer. Names end in their shape: B tasks a step, G episodes a task, K turns an episode, T tokens, V words of
the vocabulary. In ``areal_agents.train`` alone: rollouts while it learns, limits, retries, packing, checkpoints.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from areal_agents import AgentEnv, AssistantMessage, Task
from areal_agents.algorithms.batch import Row, rows_of
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.losses import ppo, token_mean
from areal_agents.algorithms.turn_credit import turn_return
from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Engine, Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.learner.forward import load_model
from areal_agents.models import resolve
from areal_agents.types import Info, Observation, Trajectory, Turn, user
from areal_agents.utils.tiny_model import tiny_model
from areal_agents.weights.publisher import master_weights
from areal_agents.weights.shared_memory import SharedWeights

STEPS, B, G, MAX_TOKENS, TEMPERATURE = 25, 4, 8, 8, 1.0


class Letters(AgentEnv):
    """Two turns, each of which pays the share of lower-case letters in what the model said."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"word {i}"}) for i in range(8)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.turn = 0
        return (user(str(self.task.payload["word"])),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self.turn += 1
        reward = sum("a" <= c <= "z" for c in action.text) / max(len(action.text), 1)
        return (user("again"),) if self.turn == 1 else (), reward, self.turn == 2, False, {}


async def play(env: AgentEnv, task: Task, number: int, engine: Engine, fmt: ChatFormat) -> Trajectory:
    """Play one episode, in which model and environment take turns and sampled tokens are kept as ids, not as text."""
    observation, _ = await env.areset(seed=task.seed, options={"task": task})
    chat, turns = Conversation(fmt, observation, env.tools), list[Turn]()
    terminated = truncated = False
    while not (terminated or truncated):
        if turns:
            chat.add_observation(observation)
        suffix, parent = chat.suffix, chat.parent
        sampling = Sampling(MAX_TOKENS, TEMPERATURE, stop_ids=fmt.stop_ids, seed=1000 * number + len(turns))
        completion = await engine.generate(chat.prompt, sampling, session=str(number), deadline=60.0)
        message = chat.add_completion(completion)
        observation, reward, terminated, truncated, _ = await env.astep(message)
        turns.append(Turn(suffix, completion, message, reward, parent=parent))
    await engine.release(str(number))
    await env.aclose()
    return Trajectory(str(number), task, task.id, tuple(turns), terminated, truncated, "answer")


def loss_of(model: Any, row: Row, tokens: int) -> torch.Tensor:
    """Return PPO's clipped loss of one conversation, its part of the mean over all sampled tokens of the step."""
    ids_T, sampled_T = torch.from_numpy(row.ids), torch.from_numpy(row.mask)[1:]
    behaviour_T, advantages_T = torch.from_numpy(row.logprobs)[1:], torch.from_numpy(row.advantages)[1:]
    logits_TV = model(ids_T[None]).logits[0, :-1] / TEMPERATURE
    logprobs_T = torch.log_softmax(logits_TV, -1).gather(-1, ids_T[1:, None])[:, 0]
    terms = ppo(logprobs_T, behaviour_T, advantages_T, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    return token_mean(terms.loss_T, sampled_T, tokens=tokens)


async def train(folder: Path, lr: float) -> None:
    fmt, model, tasks = ChatFormat.load(folder), load_model(folder), Letters.tasks("train")
    optimizer, numbers = torch.optim.AdamW(model.parameters(), lr=lr), itertools.count()
    published = SharedWeights(master_weights(model), torch.float32)
    async with await TransformersEngine.start(folder, precision="fp32") as engine:
        for step in range(1, STEPS + 1):
            rows, rewards = list[Row](), list[float]()
            for task in random.Random(step).sample(tasks, B):
                group_G = await asyncio.gather(*(play(Letters(), task, next(numbers), engine, fmt) for _ in range(G)))
                rewards_G = [EpisodeView(tuple(turn.reward for turn in episode.turns)) for episode in group_G]
                for episode, advantages_K in zip(group_G, turn_return(rewards_G), strict=True):
                    rows += rows_of(episode, advantages_K.tolist(), episode=len(rewards))
                    rewards.append(episode.reward)
            tokens = sum(int(row.mask.sum()) for row in rows)
            for row in rows:
                loss_of(model, row, tokens).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            await engine.update_weights(published.fill(master_weights(model), step), mode="drain", kv="recompute")
            print(f"step {step:2}  reward {sum(rewards) / len(rewards):.3f}  sampled tokens {tokens}", flush=True)
    published.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a model to say letters.")
    parser.add_argument("--model", help="smollm2, a folder or a hub id; without it a tiny random model")
    name = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(train(resolve(name), lr=1e-5) if name else train(tiny_model(Path(scratch)), lr=5e-3))
