"""Runs on disk for tests of what reads them: real episodes of real environments, said by a seeded talker."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from areal_agents import registry, settings
from areal_agents.chat.format import ChatFormat
from areal_agents.evaluation.attempts import run_attempts
from areal_agents.reward import Episode, Verdict
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.player import LocalPlayer, env_maker
from areal_agents.rollout.producer import Rollouts
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.tasks import TaskStream
from areal_agents.rollout.token_policy import TokenPolicy
from areal_agents.settings.config import TrainConfig
from areal_agents.tool import ToolError, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Info,
    Observation,
    Prompt,
    Task,
    Text,
    Trajectory,
    Turn,
)
from tests.tiny_tokenizer import CHATML, tiny

LIMITS = Limits(
    max_context=700, max_turn_tokens=90, max_episode_tokens=120, max_turns=8, step_timeout=60.0, request_timeout=60.0
)
"""The token budget is under what ``Mixed`` allows: the runner ends some of its episodes."""


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


SAID = (
    call("echo", text="a"),
    call("echo", text="b" * 20),
    call("echo", text="fail"),
    call("echo", wrong=1),
    call("nobody"),
    '<tool_call>{"name": "echo", "arguments": 3}</tool_call>',
    '<tool_call>{"name": "echo"',
    call("echo", text="c") + call("nobody") + call("echo", text="d"),
    "<think>hm</think> yes",
    "no",
    "the quick brown fox jumps over the lazy dog " * 9,
)


@tool(max_output_chars=64)
async def echo(text: str) -> str:
    """Say it four times."""
    if text == "fail":
        raise ToolError("it failed")
    return text * 4


class Fingerprint:
    """A reward that two episodes share only where they are equal in everything."""

    async def __call__(self, episode: Episode) -> Verdict:
        score = int(hashlib.sha256(repr(episode).encode()).hexdigest()[:6], 16) / 2**24
        turns = tuple(score / (k + 1) for k in range(episode.turns)) if score > 0.5 else None
        return Verdict(sum(turns) if turns else score, {"score": score, "turns": float(episode.turns)}, turns)


class Mixed(ToolEnv):
    """Every kind of call, answer and ending; the opening shows a number that depends on the seed."""

    system_prompt = "Play."
    tools = (echo,)
    rubric = Fingerprint()
    max_turns = 3
    drift: ClassVar[str] = ""
    """What a replay finds changed, from turn 1 on."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"n": i}) for i in range(6)]

    def prompt(self, task: Task) -> str:
        self.step_index = -1
        return f"task {task.payload['n']}, number {self.np_random.integers(1_000_000)}"

    def answer(self, action: AssistantMessage) -> str:
        return f"{self.task.id} {super().answer(action)}"

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = await super().astep(action)
        self.step_index += 1
        info["state_key"] = f"k{self.step_index}"
        return self.drifted(observation, reward, terminated, truncated, info) if self.step_index >= 1 else (
            observation, reward, terminated, truncated, info
        )  # fmt: skip

    def drifted(
        self, observation: Observation, reward: float, terminated: bool, truncated: bool, info: Info
    ) -> tuple[Observation, float, bool, bool, Info]:
        if self.drift == "raise":
            raise KeyError("gone \x1b[31m")
        if self.drift == "end":
            return (), reward, True, False, info | {"stop_reason": "answer"}
        if self.drift == "status" and info.get("tool_results"):
            info["tool_results"] = [r | {"status": "timeout"} for r in info["tool_results"]]
        if self.drift == "key":
            info["state_key"] = "elsewhere"
        if self.drift == "components" and "components" in info:
            info["components"] = info["components"] | {"score": -1.0}
        return observation, reward + (0.125 if self.drift == "reward" else 0.0), terminated, truncated, info


class Talker(TokenPolicy):
    """Says lines at random; ``rng`` is its own."""

    def __init__(self, rng: random.Random, fmt: ChatFormat, said: Sequence[str]) -> None:
        super().__init__(fmt, LIMITS)
        self.rng, self.said = rng, said

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        whole = self.fmt.encode_turn(self.rng.choice(self.said))
        ids = whole[:max_tokens]
        finish: Any = "stop" if len(ids) == len(whole) else "length"
        return Completion(ids, tuple(-self.rng.random() for _ in ids), (0,) * len(ids), finish)


def tokenizer_folder(folder: Path) -> Path:
    tiny(CHATML).save_pretrained(folder)
    return folder


def player(env_id: str, model: Path, said: Sequence[str], *, seed: int = 0, **kwargs: Any) -> LocalPlayer:
    fmt, rng = ChatFormat.load(model), random.Random(seed)
    make = env_maker(registry.spec(env_id), sandbox="bubblewrap", kwargs=kwargs)
    return LocalPlayer(make, lambda task: Talker(random.Random(rng.random()), fmt, said), LIMITS)


def training_run(
    out: Path,
    env_id: str = "tests.saved_runs:Mixed",
    *,
    said: Sequence[str] = SAID,
    steps: int = 2,
    groups: int = 2,
    group_size: int = 4,
) -> list[Record]:
    """Play ``steps`` batches as training does and leave the run's folder at ``out``; returns what it holds."""
    model = tokenizer_folder(out.parent / f"{out.name}-tokenizer")
    config = TrainConfig.model_validate({"out": out, "seed": 7, "env": {"id": env_id}, "model": {"path": str(model)}})

    async def play() -> list[Record]:
        runner = EpisodeRunner(player(env_id, model, said), FailureBudget(window=8, share=0.0), max_retries=0)
        buffer = Buffer(
            groups=groups, group_size=group_size, max_staleness=0, concurrency=group_size, total_batches=steps
        )
        tasks = TaskStream(registry.spec(env_id).tasks("train"), seed=config.seed)
        rollouts = Rollouts(buffer, tasks, runner, seed=config.seed)
        records = []
        try:
            rollouts.start()
            for step in range(1, steps + 1):
                batch = await rollouts.next_batch()
                records += [Record("train", step, t) for g in batch for t in g.trajectories]
                rollouts.acknowledge(step)
        finally:
            await rollouts.close()
        return records

    records = asyncio.run(play())
    save(out, config, records)
    return records


def evaluation_run(out: Path, env_id: str = "tests.saved_runs:Mixed", *, k: int = 2) -> list[Record]:
    """What ``areal-agents eval`` leaves: report.json and episodes of kind ``eval``."""
    model = tokenizer_folder(out.parent / f"{out.name}-tokenizer")

    async def play() -> list[Record]:
        runner = EpisodeRunner(player(env_id, model, SAID), FailureBudget(window=8, share=0.0), max_retries=0)
        try:
            tasks = registry.spec(env_id).tasks("test")[:3]
            results = await run_attempts(runner, tasks, k=k, concurrency=2, seed=11, label="test")
        finally:
            await runner.close()
        return [Record("eval", 0, t) for _, tries in results for t in tries if t is not None]

    records = asyncio.run(play())
    write_shard(shard_path(out, "eval", 0), records)
    (out / "report.json").write_text(json.dumps({"env": env_id, "seed": 11, "model": str(model)}))
    return records


def save(out: Path, config: TrainConfig, records: Sequence[Record]) -> None:
    """The folder of a run: settings and shards."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(settings.dump(config))
    for kind, step in sorted({(r.kind, r.step) for r in records}):
        write_shard(shard_path(out, kind, step), [r for r in records if (r.kind, r.step) == (kind, step)])


def content(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` and its hash."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- by hand ---------------------------------------------------------------------------------------------------------

TASKS = [Task.make(f"t{i}", split="train", seed=i, payload={"i": i}) for i in range(4)]


def record(group: int, i: int, *rewards: float, task: int = 0, step: int = 1, tokens: int = 3) -> Record:
    turns = tuple(
        Turn((9,), Completion((5,) * tokens, (-1.0,) * tokens, (0,) * tokens, "stop"), AssistantMessage((Text("x"),)),
             r, parent=None if k == 0 else k - 1)
        for k, r in enumerate(rewards)
    )  # fmt: skip
    return Record("train", step, Trajectory(f"g{group}/{i}", TASKS[task], f"g{group}", turns, True, False, "answer"))
