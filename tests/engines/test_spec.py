"""Seeds and numbers of engine processes."""

from __future__ import annotations

import torch

from areal_agents.engines.spec import process_seed
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.backend import engine_dtype
from areal_agents.utils.precision import resolve_precision


def test_no_two_processes_of_any_life_of_a_run_draw_the_same_numbers() -> None:
    lives = ("", "4", "12")  # a new run, and resumed at these steps
    seeds = {(s, i, n): process_seed(7, salt=s, index=i, nth=n) for s in lives for i in range(4) for n in range(20)}
    assert seeds["", 0, 0] == 7  # a run with one engine that never dies is seeded by the setting itself
    assert len(set(seeds.values())) == len(seeds) == 240
    assert seeds["4", 1, 2] == process_seed(7, salt="4", index=1, nth=2)
    assert seeds["4", 1, 2] != process_seed(8, salt="4", index=1, nth=2)


def test_what_ray_would_reserve_changes_no_number_elsewhere() -> None:
    """GPUs are Ray's to give, and the transformers engine uses none."""
    given = {"env": {"id": "areal/Arithmetic-v0"}, "cluster": {"backend": "local", "engine_gpus": 1.0}}
    assert engine_dtype(TrainConfig.model_validate(given)) == resolve_precision("auto")
    given["cluster"] = {"backend": "ray", "engine_gpus": 1.0}
    assert engine_dtype(TrainConfig.model_validate(given)) == resolve_precision("auto")
    vllm = given | {"engine": {"kind": "vllm"}}
    assert engine_dtype(TrainConfig.model_validate(vllm)) == torch.bfloat16
