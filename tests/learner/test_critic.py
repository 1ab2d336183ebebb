"""The critic against the same training written naively: values and gradients."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.algorithms.objective import split_episodes
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError
from areal_agents.learner.critic import Critic
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.settings.critic import CriticConfig
from tests.learner.test_learner import SMOOTH, largest_difference, learner, one_thread, run, smooth_adamw
from tests.learner_data import make_batch, naive_loss
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture
UNMASKED = Choice("bypass", {"token_mask": None})


def algorithm(kind: Any = "trunk", **critic: Any) -> AlgorithmConfig:
    critic = {"lr": 0.5, "grad_clip": 1e6} | critic
    return AlgorithmConfig(
        advantage=Choice("gae"), correction=UNMASKED, critic=CriticConfig(kind=kind, **critic), aggregation="token"
    )


def with_targets(batch: Batch, *, seed: int = 0, by_turn: bool = False) -> Batch:
    """The batch with values, and returns that are fitted at every token or at each turn's first."""
    rng = np.random.default_rng(seed)

    def drawn(row: Row) -> Row:
        first = row.mask & (np.diff(row.turns, prepend=-1) != 0)
        columns = {name: np.where(row.mask, rng.normal(size=len(row)), 0) for name in ("values", "returns")}
        columns["fitted"] = first if by_turn else row.mask
        return replace(row, columns={name: c.astype(np.float32) for name, c in columns.items()})

    return replace(batch, rows=tuple(drawn(r) for r in batch.rows))


def critic_of(made: TorchLearner) -> Critic:
    assert made._critic is not None
    return made._critic


def randomise(made: TorchLearner, seed: int = 3) -> nn.Linear:
    """Move the critic's head away from 0, and return a copy of it."""
    torch.manual_seed(seed)
    head = critic_of(made).head
    with torch.no_grad():
        head.weight.normal_(0, 0.3)
        head.bias.normal_(0, 0.3)
    return copy.deepcopy(head)


def padded(made: TorchLearner) -> None:
    for decoder in {made._decoder, critic_of(made)._decoder}:
        decoder.shared = False
        decoder.model.set_attn_implementation("sdpa")


def row_values(model: Any, head: nn.Linear, row: Row) -> Tensor:
    """V before the row's sampled tokens: transformers' own forward over this row alone, hidden · w + b."""
    hidden = model.base_model(torch.from_numpy(row.ids)[None], use_cache=False).last_hidden_state[0, :-1]
    values: Tensor = (hidden @ head.weight[0] + head.bias)[torch.from_numpy(row.mask[1:])]
    return values


def naive_value_loss(model: Any, head: nn.Linear, rows: list[Row], clip: float | None = None) -> Tensor:
    total, count = torch.zeros(()), 0.0
    for row in rows:
        v = row_values(model, head, row)
        old, target, fitted = (torch.from_numpy(row.columns[n][row.mask]) for n in ("values", "returns", "fitted"))
        error = (v - target) ** 2
        if clip is not None:
            error = torch.maximum(error, (old + torch.clamp(v - old, -clip, clip) - target) ** 2)
        total, count = total + (0.5 * error * fitted).sum(), count + float(fitted.sum())
    return total / count


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "own"])
@pytest.mark.parametrize("budget", [40, 1000])
@pytest.mark.parametrize("shared", [True, False])
def test_values_are_a_plain_forwards_hidden_states_by_the_head(
    tmp_path: Path, kind: str, budget: int, shared: bool
) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", SMOOTH.model_copy(update={"token_budget": budget}), algorithm(kind))
    if not shared:
        padded(made)

    async def job(it: TorchLearner) -> None:
        assert all(not v.any() for v in await it.values(batch)), "V = 0 at first"
        head = randomise(it)
        for row, found in zip(batch.rows, await it.values(batch), strict=True):
            assert found.dtype == np.float32
            assert not found[~row.mask].any()
            expected = row_values(model, head, row).detach().numpy()
            assert np.abs(found[row.mask] - expected).max() < 1e-5

    run(made, job)


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_values_need_no_logits(tmp_path: Path, kind: str) -> None:
    vocabulary = 1117  # no other dimension is as large
    model = tiny_model(vocab_size=vocabulary, tie_word_embeddings=True)
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", algorithm=algorithm(kind))
    seen: list[int] = []

    class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.extend(
                t.shape[-1] for t in (out if isinstance(out, tuple) else [out]) if isinstance(t, Tensor) and t.ndim
            )
            return out

    with Sizes():  # type: ignore[no-untyped-call]
        critic_of(made).values(batch.rows)
        assert seen
        assert max(seen) < vocabulary
        made._passes.logprobs(batch.rows, 1.0)
    assert max(seen) >= vocabulary, "the case can fail"
    run(made, lambda it: it.values(batch))


def test_values_are_fp32_beside_a_bf16_trunk(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", SMOOTH.model_copy(update={"precision": "bf16"}), algorithm())

    async def job(it: TorchLearner) -> None:
        head = randomise(it)
        with torch.no_grad():
            head.bias.add_(1000.0)  # in bf16 the differences of V would be lost
            critic_of(it).head.bias.add_(1000.0)
        for row, found in zip(batch.rows, await it.values(batch), strict=True):
            expected = row_values(model, head, row).detach().numpy()
            assert np.abs(found[row.mask] - expected).max() < 0.2
            assert np.std(found[row.mask]) == pytest.approx(np.std(expected), rel=0.1)

    run(made, job)


def test_without_a_critic_there_are_no_values(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m")

    async def job(it: TorchLearner) -> None:
        with pytest.raises(ConfigError, match="no critic to ask"):
            await it.values(batch)

    run(made, job)


# --- one step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [0.0, 0.7])
@pytest.mark.parametrize(("budget", "shared", "by_turn"), [(40, True, False), (1000, False, True)])
def test_a_head_on_the_trunk_learns_as_a_naive_loop(
    tmp_path: Path, coefficient: float, budget: int, shared: bool, by_turn: bool
) -> None:
    model, a = tiny_model(), algorithm(coefficient=coefficient)
    batch = with_targets(make_batch(model), by_turn=by_turn)
    made = learner(model, tmp_path / "m", SMOOTH.model_copy(update={"token_budget": budget}), a)
    if not shared:
        padded(made)
    head, before = randomise(made), copy.deepcopy(model)
    value = naive_value_loss(model, head, list(batch.rows))
    torch.autograd.backward(value, inputs=list(head.parameters()), retain_graph=True)
    loss = naive_loss(model, batch, range(len(batch.rows)), batch.episodes, a) + coefficient * value
    torch.autograd.backward(loss, inputs=list(model.base_model.parameters()) + list(model.lm_head.parameters()))
    norm = sum(float(p.grad.square().sum()) for p in head.parameters() if p.grad is not None) ** 0.5
    smooth_adamw(model).step()
    smooth_adamw(head).step()
    metrics = run(made, lambda it: it.step(batch))
    assert metrics["critic/loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["critic/lr"] == 0.5
    assert largest_difference(made.tensors(), model) < 1e-5
    assert largest_difference(made.tensors(), before) > 1e-3
    assert largest_difference(critic_of(made).head.state_dict(), head) < 1e-5
    assert metrics["critic/fitted"] == sum(r.columns["fitted"].sum() for r in batch.rows)


@pytest.mark.parametrize(("budget", "shared", "by_turn"), [(40, True, False), (1000, False, True)])
def test_a_critic_of_its_own_learns_as_a_naive_loop_and_leaves_the_policy_alone(
    tmp_path: Path, budget: int, shared: bool, by_turn: bool
) -> None:
    model, a = tiny_model(), algorithm("own", value_clip=0.5)
    batch = with_targets(make_batch(model), by_turn=by_turn)
    made = learner(model, tmp_path / "m", SMOOTH.model_copy(update={"token_budget": budget}), a)
    if not shared:
        padded(made)
    head, own = randomise(made), copy.deepcopy(model)
    value = naive_value_loss(own, head, list(batch.rows), clip=0.5)
    torch.autograd.backward(value)
    smooth_adamw(own.base_model).step()
    smooth_adamw(head).step()
    torch.autograd.backward(naive_loss(model, batch, range(len(batch.rows)), batch.episodes, a))
    smooth_adamw(model).step()
    metrics = run(made, lambda it: it.step(batch))
    assert metrics["critic/loss"] == pytest.approx(float(value.detach()), rel=1e-5)
    assert 0 < metrics["critic/clip_fraction"] < 1
    assert metrics["rows_skipped"] == 1, "the policy's pass has nothing of the critic"
    assert largest_difference(made.tensors(), model) < 1e-5
    critic = critic_of(made)
    assert largest_difference(critic._decoder.base.state_dict(), own.base_model) < 1e-5
    assert largest_difference(critic.head.state_dict(), head) < 1e-5
    assert not any("lm_head" in n and t.shape[0] > 1 for n, t in critic.module.state_dict().items()), "no logits kept"


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_minibatches_are_the_policys(tmp_path: Path, kind: str) -> None:
    model = tiny_model()
    c = SMOOTH.model_copy(update={"minibatches": 2, "lr": 1e-9})
    batch = with_targets(make_batch(model))
    made = learner(model, tmp_path / "m", c, algorithm(kind, lr=0.05), seed=5)
    head = randomise(made)
    model.requires_grad_(kind == "own")
    own = copy.deepcopy(model)
    optimizers = [smooth_adamw(m, c.model_copy(update={"lr": 0.05})) for m in (own.base_model, head)]
    for part in split_episodes(batch.episodes, 2, seed=5, version=0):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(naive_value_loss(own, head, [r for r in batch.rows if r.episode in part]))
        for optimizer in optimizers:
            optimizer.step()
    metrics = run(made, lambda it: it.step(batch))
    assert largest_difference(critic_of(made).head.state_dict(), head) < 1e-5
    assert metrics["critic/loss"] > 0


def test_rows_without_an_advantage_teach_the_critic_too(tmp_path: Path) -> None:
    model = tiny_model()
    batch = with_targets(make_batch(model))
    batch = replace(batch, rows=tuple(replace(r, advantages=0 * r.advantages) for r in batch.rows))
    for kind in ("trunk", "own"):
        made = learner(model, tmp_path / kind, algorithm=algorithm(kind))
        metrics = run(made, lambda it: it.step(batch))
        assert largest_difference(made.tensors(), model) == 0.0
        assert float(critic_of(made).head.weight.detach().abs().max()) > 0
        assert metrics["minibatches_empty"] == 1


def test_the_critics_gradient_is_clipped_by_itself(tmp_path: Path) -> None:
    model = tiny_model()
    batch = with_targets(make_batch(model))
    made = learner(model, tmp_path / "m", algorithm=algorithm(grad_clip=1e-3))
    head = nn.Linear(48, 1)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    torch.autograd.backward(naive_value_loss(model, head, list(batch.rows)), inputs=list(head.parameters()))
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1e-3)
    smooth_adamw(head).step()
    metrics = run(made, lambda it: it.step(batch))
    assert largest_difference(critic_of(made).head.state_dict(), head) < 1e-6
    assert metrics["critic/grad_norm"] > 1e-2, "before clipping"


def test_targets_that_are_not_finite_are_skipped_and_said(tmp_path: Path) -> None:
    model = tiny_model()
    batch = with_targets(make_batch(model))
    batch.rows[0].columns["returns"][batch.rows[0].mask] = np.inf
    made = learner(model, tmp_path / "m", algorithm=algorithm())
    metrics = run(made, lambda it: it.step(batch))
    assert (metrics["critic/skipped"], metrics["skipped"]) == (1, 0)
    assert not critic_of(made).head.weight.any()
    assert largest_difference(made.tensors(), model) > 0, "the policy went on"


def test_a_batch_without_targets_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", algorithm=algorithm())

    async def job(it: TorchLearner) -> None:
        with pytest.raises(ValueError, match="rows lack fitted, returns, values"):
            await it.step(batch)
        assert it.version == 0

    run(made, job)


def test_explained_variance_is_of_the_values_before_the_step(tmp_path: Path) -> None:
    model = tiny_model()
    batch = with_targets(make_batch(model), by_turn=True)
    made = learner(model, tmp_path / "m", algorithm=algorithm())
    metrics = run(made, lambda it: it.step(batch))
    fitted = [r.mask & (r.columns["fitted"] > 0) for r in batch.rows]
    v, r = (
        np.concatenate([row.columns[name][at] for row, at in zip(batch.rows, fitted, strict=True)])
        for name in ("values", "returns")
    )
    assert metrics["critic/explained_variance"] == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-5)
    assert metrics["critic/value"] == pytest.approx(float(v.mean()), abs=1e-6)
    assert metrics["critic/return"] == pytest.approx(float(r.mean()), abs=1e-6)
