"""Training on episodes whose histories are rewritten: what the learner computes for them, and a run that goes on."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.algorithms.batch import Batch, Row, rows_of
from areal_agents.algorithms.objective import Tokens
from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.env import AgentEnv
from areal_agents.evaluation.replay import replay
from areal_agents.evaluation.rescore import rescore
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.learner.passes import Objective, Passes, Scored
from areal_agents.reward import Episode
from areal_agents.rollout.limits import Limits
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.token_policy import EnginePolicy
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.types import Trajectory
from tests.learner.test_learner import learner, one_thread, run
from tests.learner_data import row_logprobs
from tests.pages_env import Talk, TalkFold, TalkSummary
from tests.tiny_models import tiny_chat_model
from tests.trainer.test_resume import config

__all__ = ["one_thread"]  # a fixture
CONTEXT, TURN, TEMPERATURE = 490, 12, 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("rewritten") / "model")


@pytest.fixture(scope="module")
def episodes(folder: Path) -> Sequence[Trajectory]:
    """Two episodes of each kind, sampled by the real engine."""
    fmt = ChatFormat.load(folder)
    limits = Limits(CONTEXT, TURN, 1000, 30, 60.0, 60.0)

    async def main() -> list[Trajectory]:
        engine = await TransformersEngine.start(folder, precision="fp32", max_batch=2, max_context=CONTEXT)
        sampling = Sampling(TURN, temperature=TEMPERATURE, stop_ids=fmt.stop_ids)
        found = []
        try:
            for cls in (TalkFold, TalkSummary):
                makes: type[AgentEnv] = cls
                player = LocalPlayer(makes, lambda task: EnginePolicy(engine, sampling, fmt, limits), limits)
                try:
                    for i, task in enumerate(Talk.tasks("train")[:2]):
                        found.append(await player.play(task, id=f"{cls.__name__}/{i}", group="g", seed=i))
                finally:
                    await player.close()
        finally:
            await engine.close()
        return found

    return asyncio.run(main())


@pytest.fixture(scope="module")
def rows(episodes: Sequence[Trajectory]) -> tuple[Row, ...]:
    rng = np.random.default_rng(0)
    return tuple(
        r for i, t in enumerate(episodes) for r in rows_of(t, rng.normal(size=len(t.turns)).tolist(), episode=i)
    )


def test_they_are_what_this_is_about(episodes: Sequence[Trajectory]) -> None:
    assert {t.stop_reason for t in episodes} <= {"answer", "length"}, "none ended by its context"
    for t in episodes:
        assert sum(turn.rewritten is not None for turn in t.turns) >= 1
        assert max(len(r) for r in rows_of(t, [0.0] * len(t.turns), episode=0)) <= CONTEXT
    assert {turn.kind for t in episodes for turn in t.turns} == {"step", "summary"}


def test_the_learner_computes_the_engines_log_probabilities(
    tmp_path: Path, folder: Path, rows: tuple[Row, ...], episodes: Sequence[Trajectory]
) -> None:
    made = learner(_model(folder), tmp_path / "m")
    found = run(made, lambda it: it.logprobs(Batch(rows, len(episodes), 0, TEMPERATURE)))
    for row, logprobs in zip(rows, found, strict=True):
        np.testing.assert_allclose(logprobs[row.mask], row.logprobs[row.mask], atol=2e-4)
    assert sum(int(r.mask.sum()) for r in rows) == sum(t.sampled_tokens for t in episodes)


@pytest.mark.parametrize("shared", [True, False])
def test_the_gradient_is_that_of_its_rows_one_by_one(
    tmp_path: Path, folder: Path, rows: tuple[Row, ...], shared: bool
) -> None:
    model = _model(folder)
    made = learner(model, tmp_path / "m")
    if not shared:
        made._decoder.shared = False
        made._model.set_attn_implementation("sdpa")

    def value(scored: Scored, tokens: Tokens) -> torch.Tensor:
        return (scored.logprobs_T * tokens.advantages).sum()

    passes = Passes(made._decoder, token_budget=300, chunk=7)
    passes.backward(rows, None, TEMPERATURE, Objective(value, "token"))
    plain = copy.deepcopy(model)
    for row in rows:  # each by itself, without a tree
        torch.autograd.backward(
            (row_logprobs(plain, row, TEMPERATURE) * torch.from_numpy(row.advantages[row.mask])).sum()
        )
    expected = dict(plain.named_parameters())
    for name, p in made._model.named_parameters():
        assert p.grad is not None
        right = expected[name].grad
        assert right is not None
        assert float((p.grad - right).abs().max()) < 1e-4 * max(1.0, float(right.abs().max())), name


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def turns_of(episode: Episode) -> float:
    return float(episode.turns)


@pytest.mark.slow
def test_a_run_that_is_resumed_keeps_them(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "env": {"id": "tests.pages_env:TalkSummary", "difficulty": None},
        "model": {"max_context": CONTEXT},
        "rollout": {"max_turn_tokens": TURN, "max_staleness": 0},
        "eval": {"n": 2},
    }
    asyncio.run(train(config(tmp_path, 1, **changes), console=False))
    c = config(tmp_path, 2, **changes)
    asyncio.run(train(c, resume=True, console=False))
    rows = read_metrics(c.out, kind="train")
    assert [row["step"] for row in rows] == [1, 2]
    records = list(read_records(c.out, kind="train"))
    assert len(records) == 2 * 4
    for row in rows:
        batch = [r.trajectory for r in records if r.step == row["step"]]
        n = sum(turn.kind == "summary" for t in batch for turn in t.turns)
        assert row["context_summaries"] == pytest.approx(n / len(batch))
        assert row["rewritten"] == len(batch)
        assert row["rows"] > len(batch)
        assert row["off_policy/abs_dlogp"] < 1e-3, "what the engine said of its tokens"
    saved = SavedRun.open(c.out)
    fmt = ChatFormat.load(tmp_path / "model")

    async def again() -> None:
        for record in records[:2]:
            report = await replay(record, saved.make_env, seed=saved.env_seed(record), fmt=fmt)
            assert report.identical, report.text()
        outcome = await rescore(saved.shards("train"), turns_of)
        assert {e.new for e in outcome.episodes} == {float(Talk.turns)}, "steps alone, no summaries"

    asyncio.run(again())
