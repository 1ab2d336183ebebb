"""The benchmark of credit: its choice, its ratio, and the two worlds' rewards."""

from __future__ import annotations

import torch

from tests.simulated import benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]


def test_the_rate_is_chosen_by_the_mean_of_the_tuning_seeds() -> None:
    credit = module("credit")
    runs = [
        {"method": "grpo", "dense": True, "lr": lr, "episodes": n}
        for lr, n in ((1e-3, 900), (1e-3, 100), (3e-3, 400), (3e-3, 500), (1e-2, 500), (1e-2, 500))
    ]
    assert credit.best_rate(runs, "grpo", True) == 3e-3  # means 500, 450, 500
    assert credit.mean_episodes(runs, lr=1e-3) == 500.0


def test_a_ratio_has_the_means_and_an_interval_around_it() -> None:
    credit = module("credit")
    found = credit.ratio([100, 200, 300], [400, 400, 400])
    assert found["ratio"] == 0.5
    # the smallest and largest mean of three draws out of 100, 200, 300: 100/400 and 300/400
    assert 0.25 <= found["low"] < 0.5 < found["high"] <= 0.75
    row = {"world": "a reward a turn", "method": "gigpo", "ratio": 0.68, "low": 0.5, "high": 0.9}
    assert [c.holds for c in credit.checks([row], "gigpo")] == [False]


def test_both_worlds_pay_the_same_and_at_their_own_time() -> None:
    world = module("credit_world")

    class Opener(torch.nn.Module):
        """Opens every door but the third: it says what opens the symbol that is shown before ASK."""

        config = None

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            logits = torch.full((*input_ids.shape, world.VOCABULARY), -50.0)
            for i, symbol in enumerate(input_ids[:, -2].tolist()):
                logits[i, -1, 0 if symbol == 5 else world.opens(symbol)] = 50.0
            return type("Out", (), {"logits": logits})

    doors = [[1, 2, 5, *[0] * 9]]
    world.DynamicCache = lambda config: None
    rewards = {}
    for dense in (True, False):
        (episode,) = world.play(Opener(), doors, torch.Generator().manual_seed(0), dense=dense)
        assert len(episode.turns) == world.TURNS
        rewards[dense] = [round(t.reward * world.TURNS, 6) for t in episode.turns]
        keys = [t.state_key for t in episode.turns]
    assert rewards[True] == [1, 1, *[0] * 10]  # the third stays shut: the agent stands before it to the end
    assert rewards[False] == [*[0] * 11, 2]
    assert keys == ["0:1", "1:2", *["2:5"] * 10]
