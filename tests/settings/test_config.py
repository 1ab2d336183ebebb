from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from areal_agents.algorithms.registry import Choice
from areal_agents.settings.config import AlgorithmConfig, EngineConfig, LearnerConfig, RolloutConfig, TrainConfig
from areal_agents.settings.describe import settings


def test_is_frozen_and_refuses_unknown_fields() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        TrainConfig.model_validate({"stepz": 3})


def test_sync_mode_is_a_staleness_bound_of_zero() -> None:
    assert RolloutConfig(mode="sync", max_staleness=3).staleness == 0
    assert RolloutConfig(mode="async", max_staleness=3).staleness == 3


def test_concurrency_must_hold_a_group() -> None:
    with pytest.raises(
        ValidationError, match=r"rollout.concurrency = 4 cannot hold one group of rollout.group_size = 8"
    ):
        RolloutConfig(concurrency=4, group_size=8)
    assert RolloutConfig(concurrency=8, group_size=8).concurrency == 8


def test_turn_must_be_shorter_than_the_context() -> None:
    with pytest.raises(ValidationError, match=r"rollout.max_turn_tokens = 160 must be under model.max_context = 160"):
        TrainConfig.model_validate({"model": {"max_context": 160}})


def test_bypass_has_no_truncation() -> None:
    message = (
        r"algorithm.correction.truncate is no parameter of algorithm.correction.kind = 'bypass', which has token_mask; "
        r"truncate belongs to kind = 'decoupled'"
    )
    with pytest.raises(ValidationError, match=message):
        AlgorithmConfig(correction=Choice("bypass", {"truncate": 2.0}))
    assert AlgorithmConfig(correction=Choice("decoupled", {"truncate": 2})).correction.options == {"truncate": 2.0}


@pytest.mark.parametrize("mask", [(0.5, 0.9), (1.0, 2.0), (-0.1, 2.0), (2.0, 0.5)])
def test_token_mask_must_enclose_one(mask: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="must enclose 1"):
        AlgorithmConfig(correction=Choice("bypass", {"token_mask": mask}))


@pytest.mark.parametrize("lr", [0.0, -1e-6, math.inf, math.nan])
def test_learning_rate_is_positive_and_finite(lr: float) -> None:
    with pytest.raises(ValidationError):
        LearnerConfig(lr=lr)


def test_every_setting_is_documented() -> None:
    assert [s.key for s in settings().values() if not s.info.description] == []


@pytest.mark.parametrize(("name", "value"), [("gpu_memory", 0.5), ("tensor_parallel", 2)])
def test_a_setting_of_another_engine_is_refused(name: str, value: float) -> None:
    message = rf"engine.{name} = {value} is a setting of engine.kind = 'vllm', and kind is 'transformers'"
    with pytest.raises(ValidationError, match=message):
        EngineConfig.model_validate({name: value})
    assert getattr(EngineConfig.model_validate({name: value, "kind": "vllm"}), name) == value


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lora": {"alpha": 8.0}}, r"learner.lora.alpha = 8.0 is of adapters, and learner.lora.rank = 0"),
        ({"lora": {"targets": ["q_proj"]}}, r"learner.lora.targets = .* is of adapters"),
        ({"lora": {"publish": "merged"}}, r"learner.lora.publish = 'merged' is of adapters"),
        ({"lora": {"rank": 4, "targets": ["q_proj", ""]}}, "has an empty name"),
        ({"lora": {"rank": -1}}, "greater than or equal to 0"),
        ({"lora": {"rank": 4, "alpha": 0.0}}, "greater than 0"),
        (
            {"lora": {"rank": 4, "publish": "adapter"}},
            r"'adapter' needs engine.kind = 'vllm', and it is 'transformers'",
        ),
        ({"lora": {"rank": 513, "publish": "adapter"}}, "more than the 512 that vLLM serves"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"learner": tree})
