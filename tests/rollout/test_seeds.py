"""The seed of a request: what it depends on, and what it does not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

from areal_agents import registry
from areal_agents.engine import Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.evaluation.attempts import run_attempts
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.player import PlayerSpec
from areal_agents.rollout.producer import group_seed
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.seeds import request_seed
from areal_agents.types import Completion, Prompt, Task, Turn
from tests.tiny_models import tiny_chat_model

LIMITS = Limits(
    max_context=200, max_turn_tokens=12, max_episode_tokens=40, max_turns=4, step_timeout=60.0, request_timeout=600.0
)


def seed_of(id: str = "g7/2", *, seed: int = 5, task: str = "t", split: str = "train", turn: int = 0) -> int:
    made = Task.make(task, split=split, seed=0, payload={})
    nothing = cast(Any, None)
    episode = EpisodeDriver(nothing, made, nothing, nothing, id, seed, 1.0)
    episode.turns = [cast(Turn, None)] * turn
    return request_seed(episode)


def test_whatever_is_another_draw_has_another_seed() -> None:
    """Turns, episodes of a group, retries, tasks, splits and runs; all fit into 31 bits."""
    seeds = [seed_of(turn=turn) for turn in range(50)]
    seeds += [seed_of(f"g7/{i}") for i in range(50) if i != 2]
    seeds += [seed_of(f"g7/2~{i}") for i in range(1, 4)]
    seeds += [seed_of(task="u"), seed_of(split="test"), seed_of(seed=6)]
    assert len(set(seeds)) == len(seeds) == 50 + 49 + 3 + 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_neighbouring_runs_share_no_seed() -> None:
    """Attempt 1 of an evaluation with seed 3 and attempt 0 of one with seed 4 reset their environments alike."""
    assert seed_of("test/0/1", seed=3 + 1) != seed_of("test/0/0", seed=4 + 0)
    assert seed_of("g0/0", seed=group_seed(3, 0)) != seed_of("g1/0", seed=group_seed(3, 1))


def test_a_label_and_a_tasks_place_in_the_list_change_nothing() -> None:
    """So the evaluations of two models, or before and after training, and of more tasks, draw alike."""
    assert seed_of("test/0/3") == seed_of("eval-before/17/3") == seed_of("eval-after_rl/0/3")


class Noted(TransformersEngine):
    """The engine, with what it was asked and in which order."""

    asked: list[tuple[str, int | None]]

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        self.asked.append((session, sampling.seed))
        return await super().generate(prompt, sampling, session=session, deadline=deadline)


Played = dict[tuple[str, int], list[tuple[tuple[int, ...], tuple[float, ...]]]]


def test_episodes_are_the_same_in_any_order_and_company(tmp_path: Path) -> None:
    """Six tasks twice: eight at once, then two at once in the other order under another label.

    ``deterministic``, so that rounding does not depend on the company either: ids and log-probabilities are equal.
    """
    spec = registry.spec("tests.letters_env:Letters")
    tasks = list(spec.tasks("test"))[:6]

    async def play(engine: Noted, order: list[Task], concurrency: int, label: str) -> Played:
        engine.asked = []
        recipe = PlayerSpec(env=spec, model=model, limits=LIMITS, sampling=Sampling(12))
        runner = EpisodeRunner(recipe.build(engine), FailureBudget(window=8, share=0.0), max_retries=0)
        try:
            rows = await run_attempts(runner, order, k=2, concurrency=concurrency, seed=3, label=label)
        finally:
            await runner.close()
        return {
            (task.id, i): [(t.completion.ids, t.completion.logprobs) for t in trajectory.turns]
            for task, tries in rows
            for i, trajectory in enumerate(tries)
            if trajectory is not None
        }

    async def work() -> None:
        async with await Noted.start(model, precision="fp32", max_batch=4, deterministic=True) as engine:
            assert isinstance(engine, Noted)
            one = await play(engine, tasks, 8, "test")
            first = engine.asked
            two = await play(engine, tasks[::-1], 2, "eval-before")
            assert sorted(seed or 0 for _, seed in first) == sorted(seed or 0 for _, seed in engine.asked)
            assert [seed for _, seed in first] != [seed for _, seed in engine.asked]  # they did arrive in another order
        assert len(one) == 12
        assert one == two
        assert len({str(turns) for turns in one.values()}) == 12  # no two attempts at anything are alike

    model = tiny_chat_model(tmp_path / "m")
    asyncio.run(work())
