"""The benchmark of staleness: whose tokens a step trains on, the paired deficits, and the verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.batches import batch_of
from areal_agents.types import Group
from tests.simulated import benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]


def test_a_batch_is_sampled_by_the_policy_of_eta_steps_ago_and_its_tokens_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = module("staleness_world")
    s = world.Setting("decoupled", staleness=2, seed=3, steps=5, groups=2, group_size=4, held_out=8)
    seen: list[tuple[int, list[int], float]] = []
    weights: dict[int, torch.Tensor] = {}
    kept, given = world.Policies.keep, world.batch_for

    def keep(self: Any, version: int, tensors: Any) -> None:
        kept(self, version, tensors)
        weights[version] = next(iter(self.kept[version].values())).clone()
        assert sorted(self.kept) == list(range(max(version - 2, 0), version + 1))  # no more than are needed

    async def batch_for(learner: Any, groups: list[Group], algorithm: Any, *, temperature: float) -> Any:
        batch = await given(learner, groups, algorithm, temperature=temperature)
        found = await learner.logprobs(batch)
        gap = max(float(abs(r.logprobs[r.mask] - f[r.mask]).max()) for r, f in zip(batch.rows, found, strict=True))
        ages = sorted({int(batch.version - v) for r in batch.rows for v in r.versions[r.mask]})
        seen.append((batch.version, ages, gap))
        return batch

    monkeypatch.setattr(world.Policies, "keep", keep)
    monkeypatch.setattr(world, "batch_for", batch_for)
    run = world.train(s)
    assert [(version, ages) for version, ages, _ in seen] == [(0, [0]), (1, [1]), (2, [2]), (3, [2]), (4, [2])]
    # μ is the learner's own policy where nothing lies between, and another one where something does
    assert seen[0][2] < 1e-5
    assert all(gap > 1e-4 for _, _, gap in seen[1:])
    assert all(not torch.equal(weights[v], weights[v + 1]) for v in range(5))
    assert run["age_mean"] == pytest.approx((0 + 1 + 2 + 2 + 2) / 5, abs=1e-4)


def test_the_same_seed_has_the_same_model_and_tasks_whatever_the_method_and_eta(tmp_path: Path) -> None:
    world = module("staleness_world")
    small = world.Setting("naive", staleness=0, seed=1, steps=2, groups=2, group_size=4, held_out=32)
    first, again, other = (
        world.train(s) for s in (small, replace(small, method="decoupled", staleness=4), replace(small, seed=2))
    )
    assert first["batches"][0] == again["batches"][0]  # of the same first policy, by the same draws
    assert first["batches"] != other["batches"]
    assert world.train(small)["score"] == first["score"]


def test_rewards_and_versions_of_an_episode_by_hand() -> None:
    world = module("staleness_world")
    s = world.Setting("naive", 0, 0, turns=2, symbols=4, groups=1, group_size=2)
    # symbol 0 is answered by 4 + 1, symbol 3 by 4 + (10 mod 4) = 6
    shown, said = torch.tensor([[0, 3], [0, 3]]), torch.tensor([[5, 6], [5, 5]])
    assert world.rewards_of(shown, said, s).tolist() == [1.0, 0.5]
    (group,) = world.groups_of(shown, said, torch.full((2, 2), -1.5), s, version=7)
    assert [t.reward for t in group.trajectories] == [1.0, 0.5]
    assert [k.reward for k in group.trajectories[1].turns] == [0.0, 0.5]
    batch = batch_of([group], world.algorithm_of("naive"), version=10, temperature=1.0)
    assert [(batch.version - r.versions[r.mask]).tolist() for r in batch.rows] == [[3, 3], [3, 3]]
    assert [r.ids.tolist() for r in batch.rows] == [[0, 5, 3, 6], [0, 5, 3, 5]]


def test_every_method_is_one_that_the_settings_take() -> None:
    world = module("staleness_world")
    for chosen in world.METHODS.values():
        TrainConfig.model_validate(
            {
                "algorithm": {"advantage": "grpo", **chosen},
                "rollout": {"mode": "async", "max_staleness": 8},
                "learner": {"minibatches": world.Setting("naive", 8, 0).minibatches},
            }
        )


def test_a_deficit_is_paired_by_seed() -> None:
    deficit = module("staleness").deficit
    # 90 − 88, 50 − 48, 10 − 8: the spread between seeds is no part of it
    assert deficit({0: 90.0, 1: 50.0, 2: 10.0}, {2: 8.0, 0: 88.0, 1: 48.0}) == {"mean": 2.0, "low": 2.0, "high": 2.0}
    # of two differences 0 and 4 a resample has the mean 0, 2 or 4 (a quarter, a half, a quarter)
    assert deficit({0: 5.0, 1: 9.0}, {0: 5.0, 1: 5.0}) == {"mean": 2.0, "low": 0.0, "high": 4.0}
    # 39 seeds without a difference, one of 80: mean 2, and P(drawn 5 times or more) = 0.4 %, P(4 or more) = 1.7 %,
    # P(3 or more) = 7.5 %: the 97.5 % quantile is 3 times 2
    many = dict.fromkeys(range(40), 50.0)
    assert deficit(many | {39: 90.0}, many | {39: 10.0}) == {"mean": 2.0, "low": 0.0, "high": 6.0}
    with pytest.raises(ValueError, match=r"not the same: \[2\]"):
        deficit({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})


def run(method: str, staleness: int, *scores: float, lr: float = 0.01) -> list[dict[str, Any]]:
    more = {"lr": lr, "clip_fraction": 0.4, "masked_share": 0.1}
    return [{"method": method, "staleness": staleness, "seed": i, "score": x, **more} for i, x in enumerate(scores)]


def verdicts(*runs: list[dict[str, Any]]) -> list[tuple[Any, bool, str]]:
    script = module("staleness")
    rows = script.summarize([r for part in runs for r in part], ("naive", "decoupled"), (0, 8, 16))
    return [(c.value, c.holds, c.reason) for c in script.checks(rows)]


def test_the_verdicts_hold_fail_and_are_void() -> None:
    why = "{} points at η = 8; 40% of the tokens clipped, 10% masked"
    fell = [run("naive", 0, 98, 96), run("naive", 8, 80, 70), run("naive", 16, 0, 0)]
    good = [run("decoupled", 0, 97, 95), run("decoupled", 8, 95, 95), run("decoupled", 16, 20, 10)]  # 16 is no goal's
    assert verdicts(*fell, *good) == [(22.0, True, ""), (2.0, True, ""), (3.0, False, why.format(95.0))]
    bad = [run("decoupled", 0, 97, 95), run("decoupled", 8, 97, 92), run("decoupled", 16, 20, 10)]
    # its differences are 0 and 3: the mean 1.5 is inside the goal, the bound is not
    assert verdicts(*fell, *bad)[1] == (3.0, False, why.format(94.5))
    steady = [run("naive", 0, 98, 96), run("naive", 8, 89, 87), run("naive", 16, 0, 0)]
    void = "void: plain PPO falls by 9.0 points alone, so there is nothing to correct"
    assert verdicts(*steady, *good) == [(9.0, False, void), (2.0, False, void), (3.0, False, void)]


def test_the_rate_is_where_plain_ppo_learns_and_falls_most() -> None:
    chosen = module("staleness").chosen_rate
    runs = [
        *run("naive", 0, 99, 97, lr=0.001), *run("naive", 8, 95, 95, lr=0.001),  # falls by 3
        *run("naive", 0, 99, 95, lr=0.003), *run("naive", 8, 70, 80, lr=0.003),  # by 22
        *run("naive", 0, 94, 92, lr=0.01), *run("naive", 8, 10, 10, lr=0.01),  # does not learn
    ]  # fmt: skip
    assert chosen(runs) == 0.003
    with pytest.raises(ValueError, match="too hard"):
        chosen(runs[-4:])


def test_scores_stand_beside_areals_as_shares_of_fresh_datas() -> None:
    script = module("staleness")
    rows = script.summarize(
        [*run("naive", 0, 80, 80), *run("naive", 4, 40, 40), *run("m2po", 0, 90, 90), *run("m2po", 4, 90, 90)],
        ("naive", "m2po"), (0, 4),
    )  # fmt: skip
    shape = {(r["method"], r["eta"]): r for r in script.in_shape(rows)}
    assert (shape["naive", 4]["of fresh"], shape["naive", 4]["AReaL of fresh"]) == (0.5, 0.555)  # 23.3 / 42.0
    assert (shape["m2po", 4]["of fresh"], shape["m2po", 4]["AReaL"]) == (1.0, None)
