"""The learning rate's course, and which parameters decay."""

from __future__ import annotations

import pytest
from torch import nn

from areal_agents.learner.optim import Schedule, adamw, learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_two_steps_of_warm_up_and_four_of_the_schedule(schedule: Schedule, expected: list[float]) -> None:
    found = [learning_rate(t, peak=1.0, total=6, warmup=2, schedule=schedule) for t in range(6)]
    assert found == pytest.approx(expected)


def test_past_the_end_and_before_the_start() -> None:
    assert learning_rate(9, peak=2.0, total=4, warmup=0, schedule="linear") == pytest.approx(0.5)
    assert learning_rate(0, peak=2.0, total=4, warmup=8, schedule="linear") == pytest.approx(0.25)
    assert learning_rate(7, peak=2.0, total=4, warmup=8, schedule="cosine") == pytest.approx(2.0)
    with pytest.raises(ValueError, match="must not be negative"):
        learning_rate(-1, peak=1.0, total=4, warmup=0, schedule="constant")


def test_biases_and_norms_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = adamw(model, lr=0.1, weight_decay=0.3, betas=(0.9, 0.95), eps=1e-8)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert found == {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
