"""What follows an estimator: episodes that a limit cut, the batch's normalisation, signal, and metrics of credit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.algorithms.batch import LEFT_OUT
from areal_agents.algorithms.refinement import batch_normalized
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError, RewardError
from areal_agents.settings.config import AlgorithmConfig, TrainConfig
from areal_agents.trainer.batches import batch_of
from areal_agents.trainer.credit import credit_metrics, signal_of
from areal_agents.trainer.preflight import require_runnable
from areal_agents.types import Group, Trajectory
from tests.trainer.test_loop import episode, group


def cut(t: Trajectory) -> Trajectory:
    return replace(t, terminated=False, truncated=True, stop_reason="max_turns")


def algorithm(kind: str = "dr_grpo", *, options: dict[str, object] | None = None, **more: object) -> AlgorithmConfig:
    return AlgorithmConfig(advantage=Choice(kind, options or {}), **more)  # type: ignore[arg-type]


def trained(groups: Sequence[Group], config: AlgorithmConfig) -> list[list[float]]:
    """The advantage of each sampled token, row by row."""
    return [row.advantages[row.mask].tolist() for row in batch_of(groups, config, 0, 1.0).rows]


# --- overlong -------------------------------------------------------------------------------------------------------


def test_masking_takes_the_gradient_of_a_cut_episode_and_leaves_its_place_in_the_baseline() -> None:
    groups = [group(episode(1.0), cut(episode(0.0)), episode(0.5))]
    assert trained(groups, algorithm(overlong="keep")) == [[0.5] * 3, [-0.5] * 3, [0.0] * 3]
    assert trained(groups, algorithm(overlong="mask")) == [[0.5] * 3, [0.0] * 3, [0.0] * 3]
    batch = batch_of(groups, algorithm(overlong="mask"), 0, 1.0)
    assert batch.episodes == 3
    assert [int(row.mask.sum()) for row in batch.rows] == [3, 3, 3]  # its tokens still count in the mean
    assert credit_metrics(groups, algorithm(overlong="mask"))["overlong_masked"] == pytest.approx(1 / 3)
    assert "overlong_masked" not in credit_metrics(groups, algorithm())


def test_masking_says_so_of_every_token_and_keeping_says_nothing() -> None:
    groups = [group(episode(1.0), cut(episode(0.0)))]
    rows = batch_of(groups, algorithm(overlong="mask"), 0, 1.0).rows
    assert [row.columns[LEFT_OUT][row.mask].tolist() for row in rows] == [[0.0] * 3, [1.0] * 3]
    assert all(LEFT_OUT not in row.columns for row in batch_of(groups, algorithm(), 0, 1.0).rows)


def test_a_group_whose_signal_is_all_in_cut_episodes_has_none() -> None:
    both = group(cut(episode(1.0)), cut(episode(0.0)))
    assert signal_of(algorithm())(both)
    assert not signal_of(algorithm(overlong="mask"))(both)


# --- normalisation --------------------------------------------------------------------------------------------------


def test_a_batch_is_normalised_by_tokens_by_hand() -> None:
    # Advantages 1 on 3 tokens, −1 on 1 token: mean 1/2, variance (3·1/4 + 9/4)/4 = 3/4.
    groups = [group(episode(2.0), episode(0.0, tokens=1))]
    root = math.sqrt(0.75)
    expected = [pytest.approx([0.5 / root] * 3), pytest.approx([-1.5 / root])]
    assert trained(groups, algorithm(normalize="batch")) == expected


def test_a_group_without_signal_shares_the_mean_of_its_batch() -> None:
    # 1, −1, 0, 0 of one turn each: mean 0, std √(1/2).
    groups = [group(episode(2.0), episode(0.0)), group(episode(3.0), episode(3.0))]
    assert trained(groups, algorithm(normalize="batch")) == [
        pytest.approx([math.sqrt(2)] * 3), pytest.approx([-math.sqrt(2)] * 3), [0.0] * 3, [0.0] * 3
    ]  # fmt: skip


def test_equal_rewards_still_train_nothing() -> None:
    groups = [group(episode(0.7), episode(0.7), episode(0.1, 0.2, 0.4))]
    assert not any(x for row in trained(groups, algorithm(normalize="batch")) for x in row)


def test_masked_episodes_are_no_part_of_the_normalisation() -> None:
    groups = [group(episode(4.0), cut(episode(0.0, tokens=50)), episode(2.0))]
    # 2 and 0 are left, 3 tokens each: mean 1, std 1.
    found = trained(groups, algorithm(normalize="batch", overlong="mask"))
    assert found == [pytest.approx([1.0] * 3), [0.0] * 50, pytest.approx([-1.0] * 3)]
    every = [group(cut(episode(4.0)), cut(episode(0.0)))]
    assert trained(every, algorithm(normalize="batch", overlong="mask")) == [[0.0] * 3, [0.0] * 3]


tokens_of = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), shapes=st.lists(tokens_of, min_size=2, max_size=5))
def test_each_sampled_token_counts_once(data: st.DataObject, shapes: list[list[int]]) -> None:
    numbers = st.integers(-8, 8).map(lambda n: n / 4)
    advantages: list[torch.Tensor | tuple[torch.Tensor, ...]] = []
    for tokens_K in shapes:
        if data.draw(st.booleans()):
            advantages.append(torch.tensor([data.draw(numbers) for _ in tokens_K]))
        else:
            advantages.append(tuple(torch.tensor([data.draw(numbers) for _ in range(n)]) for n in tokens_K))

    def flat(found: Sequence[torch.Tensor | tuple[torch.Tensor, ...]]) -> list[float]:
        return [
            float(x)
            for a, tokens_K in zip(found, shapes, strict=True)
            for k, n in enumerate(tokens_K)
            for x in (a[k].expand(n) if isinstance(a, torch.Tensor) else a[k])
        ]

    rows = flat(advantages)
    mean = sum(rows) / len(rows)
    std = math.sqrt(sum((x - mean) ** 2 for x in rows) / len(rows))
    expected = [(x - mean) / (std + 1e-8) if std > 1e-8 else 0.0 for x in rows]
    found = batch_normalized(advantages, shapes, [True] * len(shapes))
    assert flat(found) == pytest.approx(expected, abs=1e-4)


# --- signal ---------------------------------------------------------------------------------------------------------


def test_signal_is_what_the_estimator_makes_of_a_group() -> None:
    same, other = group(episode(1.0, 0.0), episode(0.0, 1.0)), group(episode(1.0), episode(0.0))
    assert not signal_of(algorithm("grpo"))(same)  # equal returns
    assert signal_of(algorithm("turn_return"))(same)  # at turn 1 they differ
    for kind in ("grpo", "turn_return", "reinforce_pp", "pass_at_k"):
        assert signal_of(algorithm(kind))(other)
        assert not signal_of(algorithm(kind))(group(episode(1.0), episode(1.0)))
        assert not signal_of(algorithm(kind, normalize="batch"))(group(episode(1.0), episode(1.0)))
    greedy = replace(group(episode(1.0), episode(1.0)), greedy=episode(0.0))
    assert signal_of(algorithm("remax"))(greedy)
    assert not signal_of(algorithm("remax"))(replace(greedy, greedy=episode(1.0)))
    with pytest.raises(RewardError, match="returns must be ≥ 0"):
        signal_of(algorithm("maxrl"))(group(episode(-1.0), episode(0.0)))


def test_the_share_of_groups_without_signal() -> None:
    groups = [group(episode(1.0), episode(0.0)), *[group(episode(1.0), episode(1.0))] * 3]
    assert credit_metrics(groups, algorithm())["groups_without_signal"] == 0.75


# --- greedy, states -------------------------------------------------------------------------------------------------


def test_the_greedy_episode_is_a_baseline_and_trains_nothing() -> None:
    groups = [replace(group(episode(1.0), episode(0.0, 0.0)), greedy=episode(0.25, tokens=40))]
    batch = batch_of(groups, algorithm("remax"), 0, 1.0)
    assert (batch.episodes, len(batch.rows)) == (2, 2)
    assert [row.advantages[row.mask].tolist() for row in batch.rows] == [[0.75] * 3, [-0.25] * 6]
    metrics = credit_metrics(groups, algorithm("remax"))
    assert (metrics["greedy_reward"], metrics["greedy_tokens"]) == (0.25, 40.0)
    with pytest.raises(ValueError, match="this group has none"):
        batch_of([group(episode(1.0), episode(0.0))], algorithm("remax"), 0, 1.0)


def keyed(t: Trajectory, *keys: str | None) -> Trajectory:
    return replace(t, turns=tuple(replace(turn, state_key=key) for turn, key in zip(t.turns, keys, strict=True)))


def test_gigpo_gets_the_states_and_tells_the_size_of_anchors() -> None:
    groups = [
        group(keyed(episode(0.0, 1.0), "a", "b"), keyed(episode(0.0), "a")),
        group(keyed(episode(0.0, 1.0), "a", "c"), keyed(episode(0.0, 0.0), "a", "c")),
    ]
    config = algorithm("gigpo", options={"gamma": 1.0, "normalize": False})
    assert trained(groups, config) == [
        [1.0] * 3 + [0.5] * 3, [-1.0] * 3, [1.0] * 6, [-1.0] * 6
    ]  # fmt: skip
    metrics = credit_metrics(groups, config)
    assert metrics["anchor_size"] == pytest.approx((2 + 2 + 1 + 4 * 2) / 7)
    assert metrics["anchors_shared"] == pytest.approx(6 / 7)
    assert metrics["anchor_size/turn_0"] == 2.0
    assert metrics["anchor_size/turn_1"] == pytest.approx(5 / 3)


def test_gigpo_without_any_state_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'gigpo' compares turns in equal states, and .* info\['state_key'\]"):
        batch_of([group(episode(1.0), episode(0.0))], algorithm("gigpo"), 0, 1.0)
    batch_of([group(episode(1.0), keyed(episode(0.0), "a"))], algorithm("gigpo"), 0, 1.0)


# --- settings that do not fit each other ----------------------------------------------------------------------------


def of(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"env": {"id": "tests.letters_env:Letters"}, "eval": {"n": 8}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"advantage": {"kind": "pass_at_k", "k": 8}}}, r"advantage\.k = 8 .* rollout\.group_size = 8"),
        ({"algorithm": {"advantage": "remax"}, "rollout": {"concurrency": 8}}, "'remax' plays one greedy"),
        (
            {"algorithm": {"advantage": "remax"},
             "rollout": {"group_reward": "tests.trainer.test_group_reward:bonus"}},
            r"'remax' compares with a greedy episode, which the group reward 'bonus' does not judge",
        ),
        (
            {"algorithm": {"advantage": "gae", "critic": {"kind": "trunk"}}, "rollout": {"dynamic_sampling": True}},
            r"rollout\.dynamic_sampling = true replaces groups .* 'gae' reads a critic's values",
        ),
        (
            {"algorithm": {"advantage": "reinforce_pp"}, "rollout": {"dynamic_sampling": True}},
            "'reinforce_pp' compares episodes with their whole batch, in which a group of equal rewards trains too",
        ),
        (
            {"algorithm": {"advantage": {"kind": "reinforce_pp", "baseline": "group", "weight": "token"}},
             "rollout": {"dynamic_sampling": True}},
            "'reinforce_pp' compares episodes with their whole batch",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_anything_starts(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_runnable(of(**changes))


def test_batches_that_cannot_be_trained_on_as_said_are_refused_when_they_are_read() -> None:
    with pytest.raises(ValueError, match=r"dynamic_sampling = true .*normalize = 'batch' such a group trains too"):
        of(algorithm={"normalize": "batch"}, rollout={"dynamic_sampling": True})
    of(algorithm={"normalize": "batch"})
    few = {"groups": 2, "group_size": 3}
    with pytest.raises(ValueError, match=r"minibatches = 7, but a batch has .* = 6 episodes.*: lower"):
        of(rollout=few, learner={"minibatches": 7})
    assert of(rollout=few, learner={"minibatches": 6}).learner.minibatches == 6


def test_a_group_is_judged_alone_where_that_says_what_it_does_in_its_batch() -> None:
    # Rewards 1, 1 beside 1, 0: the batch's mean is 3/4, so equal rewards have an advantage of 1/4 over the deviation.
    same, other = group(episode(1.0), episode(1.0)), group(episode(1.0), episode(0.0))
    batch = algorithm("reinforce_pp")
    assert not signal_of(batch)(same)
    assert trained([same, other], batch)[0] == pytest.approx([0.25 / math.sqrt(3 / 16)] * 3, rel=1e-4)
    assert "groups_without_signal" not in credit_metrics([same, other], batch)
    within = algorithm("reinforce_pp", options={"baseline": "group"})
    assert trained([same, other], within)[0] == [0.0] * 3
    assert credit_metrics([same, other], within)["groups_without_signal"] == 0.5


def test_settings_that_fit_are_taken() -> None:
    within = {"kind": "reinforce_pp", "baseline": "group"}
    require_runnable(of(algorithm={"advantage": within}, rollout={"dynamic_sampling": True}))
    require_runnable(of(algorithm={"advantage": {"kind": "pass_at_k", "k": 7}}))
    require_runnable(of(algorithm={"advantage": "remax"}, rollout={"concurrency": 9, "dynamic_sampling": True}))
