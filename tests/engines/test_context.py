"""The engine's limits are the runner's: positions and keys and values, before the start and while episodes play."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from areal_agents.engine import Sampling
from areal_agents.engines.context import fit_context
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.engines.positions import positions_of, read_positions
from areal_agents.errors import ConfigError
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.report import EvalReport
from areal_agents.settings.config import EngineConfig, ModelConfig, RolloutConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Prompt
from tests.tiny_models import tiny_chat_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({}, None),
        ({"max_position_embeddings": 40_960, "rope_scaling": YARN}, 131_072),  # as Qwen3's page tells to set it
        ({"max_position_embeddings": 131_072, "rope_parameters": YARN}, 131_072),  # stretched already
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 2}}, 200),
        ({"max_position_embeddings": 131_072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131_072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": YARN}}, 4096),
        ({"max_position_embeddings": 9, "text_config": {"max_position_embeddings": 77}}, 77),
    ],
)
def test_positions(config: dict[str, Any], positions: int | None, tmp_path: Path) -> None:
    assert positions_of(config) == positions
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_positions(tmp_path) == positions


def test_what_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    assert read_positions(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert read_positions(tmp_path) is None


def test_what_was_set_is_refused_and_the_default_is_lowered_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    with caplog.at_level(logging.WARNING):
        assert fit_context(tmp_path, 512) == 512
        assert fit_context(tmp_path, 300, kv_tokens=300) == 300
        assert caplog.text == ""
        assert fit_context(tmp_path, 2048, kv_tokens=65_536) == 512
    assert "model.max_context = 2048 is the default, but this model has 512 positions: conversations end at 512" in (
        caplog.text
    )
    with pytest.raises(ConfigError, match=r"model\.max_context = 513, but this model has 512 positions: set it to 512"):
        fit_context(tmp_path, 513)
    with pytest.raises(ConfigError, match=r"but engine\.kv_tokens = 256: set it to 256 or less, or raise engine"):
        fit_context(tmp_path, 400, kv_tokens=256)
    assert fit_context(tmp_path, 2048, kv_tokens=256) == 256
    with pytest.raises(ConfigError, match="--max-context = 600, but this model has 512 positions"):
        fit_context(tmp_path, 600, name="--max-context", default=2048)


def test_an_engine_says_what_it_takes_and_takes_it(tmp_path: Path) -> None:
    """A conversation that its keys and values cannot hold would never be admitted, and fail."""

    async def main() -> None:
        folder = tiny_chat_model(tmp_path / "m")
        for asked, kv_tokens, longest in ((2048, 4096, 512), (2048, 96, 96), (64, 4096, 64)):
            async with await TransformersEngine.start(
                folder, precision="fp32", max_batch=2, max_context=asked, kv_tokens=kv_tokens
            ) as engine:
                assert engine.max_context == longest
                prompt = Prompt((3,) * (longest - 2))
                done = await engine.generate(prompt, Sampling(50, seed=1), session="s", deadline=60)
                assert (len(done.ids), done.finish) == (2, "length")

    asyncio.run(main())


def play(out: Path, model: ModelConfig, engine: dict[str, Any]) -> EvalReport:
    return asyncio.run(
        evaluate(
            "tests.letters_env:Letters", model=model, n=2, out=out, temperature=1.0,
            engine=EngineConfig.model_validate({"precision": "fp32", "max_batch": 4, **engine}),
            rollout=RolloutConfig(max_turn_tokens=60, max_turns=8),
        )
    )  # fmt: skip


@pytest.mark.slow
def test_episodes_end_as_context_at_the_engines_limit_and_none_is_dropped(tmp_path: Path) -> None:
    folder = tiny_chat_model(tmp_path / "m")
    report = play(tmp_path / "out", ModelConfig(path=str(folder)), {"kv_tokens": 80})
    assert (report.attempts, report.infra_rate) == (2, 0.0)
    assert report.endings == {"context": 2}
    for record in read_records(tmp_path / "out"):
        turns = record.trajectory.turns
        assert sum(len(t.prompt_suffix) + len(t.completion.ids) for t in turns) <= 80
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [(e["asked"], e["limit"]) for e in events if e["kind"] == "context_limited"] == [(2048, 80)]
    with pytest.raises(ConfigError, match=r"model\.max_context = 1000, but this model has 512 positions"):
        play(tmp_path / "no", ModelConfig(path=str(folder), max_context=1000), {})
