"""Whole runs in every update mode: each recorded token against the weights and the KV that its label stands for."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.trainer.run import Run
from areal_agents.types import Trajectory
from tests.tiny_models import segmented_logits, tiny_chat_model

STEPS = 4
PUBLISH = Run.publish


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model") / "m")


def config(tmp_path: Path, model: Path, mode: str, kv: str) -> TrainConfig:
    """Two groups of long turns at once, so that updates meet running requests; every version's weights are kept."""
    return TrainConfig.model_validate(
        {
            "steps": STEPS,
            "out": tmp_path / "run",
            "model": {"path": str(model), "max_context": 512},
            "env": {"id": "tests.letters_env:Letters"},
            "engine": {"precision": "fp32", "max_batch": 8, "kv_tokens": 8192, "update_mode": mode, "kv": kv},
            "rollout": {
                "groups": 1, "group_size": 2, "concurrency": 4, "max_turn_tokens": 240, "max_staleness": 3,
            },
            "learner": {"precision": "fp32", "lr": 3e-3},
            "eval": {"n": 1},
            "checkpoint": {"every": 1, "keep_every": 1},
            "track": {"tensorboard": False},
        }
    )  # fmt: skip


async def publish_while_sampling(run: Run) -> float:
    """``Run.publish``, the first one not before requests are in the middle of their turns."""
    start = (await run.engine.health()).sampled_tokens
    while run.learner.version == 1:
        health = await run.engine.health()
        if health.running and health.sampled_tokens >= start + 20:
            break
    return await PUBLISH(run)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["recompute", "keep"])
@pytest.mark.parametrize("mode", ["inflight", "interrupt", "drain"])
def test_a_run_in_every_mode(tmp_path: Path, model: Path, mode: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "publish", publish_while_sampling)
    c = config(tmp_path, model, mode, kv)
    asyncio.run(asyncio.wait_for(train(c, console=False), 200))
    assert [row["step"] for row in read_metrics(c.out, kind="train")] == list(range(1, STEPS + 1))
    folders = [model] + [c.out / "checkpoints" / f"step-{v:06d}" / "learner" for v in range(1, STEPS)]
    models = [transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in folders]
    episodes = [record.trajectory for record in read_records(c.out, kind="train")]
    assert len(episodes) == STEPS * 2
    told_apart, mixed = 0.0, 0
    for episode in episodes:
        for turn in episode.turns:
            labels = list(turn.completion.versions)
            assert labels == sorted(labels)
            mixed += len(set(labels)) > 1
        recorded = torch.tensor([x for turn in episode.turns for x in turn.completion.logprobs])
        want = expected(models, episode, mode=mode, kv=kv)
        torch.testing.assert_close(recorded, want, atol=3e-4, rtol=0)
        others = expected([*models[1:], models[0]], episode, mode=mode, kv=kv)
        told_apart = max(told_apart, float((recorded - others).abs().max()))
    assert (mixed > 0) == (mode != "drain")
    assert told_apart > 0.01  # the next version's weights give other numbers: labels could not be off by one


def expected(models: list[Any], episode: Trajectory, *, mode: str, kv: str) -> torch.Tensor:
    """Log-probabilities of all sampled tokens, from their labels alone.

    ``written[i]`` is the version whose weights computed the keys and values of position i. Before the token at
    position p is sampled, position p - 1 is computed by the token's version. ``recompute`` begins every turn anew,
    ``keep`` goes on with what is there; ``interrupt`` begins anew at every change of the label too.
    """
    ids: list[int] = []
    written: list[int] = []
    out: list[torch.Tensor] = []
    for turn in episode.turns:
        ids += turn.prompt_suffix
        start, labels = len(ids), turn.completion.versions
        ids += turn.completion.ids
        if kv == "recompute":
            written = []
        for version, run in itertools.groupby(enumerate(labels), lambda pair: pair[1]):
            tokens = [i for i, _ in run]
            if mode == "interrupt" and tokens[0] > 0:
                written = []
            end = start + tokens[-1]  # the last position that had to be computed, exclusive
            written += [version] * (end - len(written))
            logits = cached_logits(models, ids[:end], written)[start + tokens[0] - 1 :]
            chosen = torch.tensor(ids[start + tokens[0] : end + 1])[:, None]
            out.append(torch.log_softmax(logits, -1).gather(-1, chosen)[:, 0])
    return torch.cat(out)


def cached_logits(models: list[Any], ids: list[int], written: list[int]) -> torch.Tensor:
    """[len(ids), vocabulary]: position i computed by ``models[written[i]]`` on the cache of those before it."""
    runs = itertools.groupby(range(len(ids)), lambda i: written[i])
    return segmented_logits((models[version], [ids[i] for i in positions]) for version, positions in runs)
