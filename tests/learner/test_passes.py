"""Objectives that see a token, an episode or a minibatch at once give the gradient of the undivided sum."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_agents.algorithms.batch import Row
from areal_agents.algorithms.objective import Tokens, live_rows
from areal_agents.algorithms.scope import Scope
from areal_agents.learner.passes import Objective, Passes, Scored, _whole_episodes
from tests.learner.test_learner import learner
from tests.learner_data import make_batch, row_logprobs
from tests.tiny_models import tiny_model

TEMPERATURE = 0.7


def sequence_value(logprobs_T: Tensor, tokens: Tokens) -> Tensor:
    """A square of each episode's mean log ratio: every token's gradient depends on all tokens of its episode."""
    episodes_N, index_T = torch.unique(tokens.episodes, return_inverse=True)
    sums_N = torch.zeros(len(episodes_N)).index_add_(0, index_T, logprobs_T - tokens.behaviour)
    counts_N = torch.zeros(len(episodes_N)).index_add_(0, index_T, torch.ones(len(index_T)))
    advantages_N = torch.zeros(len(episodes_N)).index_add_(0, index_T, tokens.advantages)
    return (advantages_N * (sums_N / counts_N).square()).sum()


def entropy_of(model: Any, row: Row) -> Tensor:
    logits = model(torch.from_numpy(row.ids)[None], use_cache=False).logits[0, :-1].float() / TEMPERATURE
    logs = torch.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1)[torch.from_numpy(row.mask[1:])]


def gradient(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(value)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("budget", [40, 300])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scope", ["episode", "minibatch"])
@pytest.mark.parametrize("entropy", [True, False])
def test_a_coupled_objective_has_the_undivided_gradient(
    tmp_path: Path, scope: Scope, shared: bool, budget: int, entropy: bool
) -> None:
    model = tiny_model()
    rows = make_batch(model).rows
    made = learner(model, tmp_path / "m")
    if not shared:
        made._decoder.shared = False
        made._model.set_attn_implementation("sdpa")

    def value(scored: Scored, tokens: Tokens) -> Tensor:
        whole = sequence_value(scored.logprobs_T, tokens)
        return whole if scored.entropy_T is None else whole - 0.1 * (scored.entropy_T * tokens.advantages).sum()

    plain = copy.deepcopy(model)
    tokens = Tokens.of(rows, None)
    expected = sequence_value(torch.cat([row_logprobs(plain, r, TEMPERATURE) for r in rows]), tokens)
    if entropy:
        expected = expected - 0.1 * (torch.cat([entropy_of(plain, r) for r in rows]) * tokens.advantages).sum()
    passes = Passes(made._decoder, token_budget=budget, chunk=7)
    found, _ = passes.backward(rows, None, TEMPERATURE, Objective(value, scope, entropy))
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    right = gradient(plain, expected)
    for name, p in made._model.named_parameters():
        assert p.grad is not None
        assert float((p.grad - right[name]).abs().max()) < 1e-5 * max(1.0, float(right[name].abs().max())), name


def test_both_ways_of_an_episode_objective_are_taken(tmp_path: Path) -> None:
    model = tiny_model()
    rows = make_batch(model).rows
    made = learner(model, tmp_path / "m")
    small, large = (Passes(made._decoder, token_budget=n, chunk=7)._packs(rows) for n in (40, 1000))
    assert not _whole_episodes(rows, small), "episode 2 has two rows, in two packs"
    assert _whole_episodes(rows, large)


def test_an_objective_of_episodes_is_given_whole_packs_and_counts_its_extra_pass(tmp_path: Path) -> None:
    model = tiny_model()
    rows = make_batch(model).rows
    made = learner(model, tmp_path / "m")
    seen: list[int] = []

    def value(scored: Scored, tokens: Tokens) -> Tensor:
        seen.append(len(tokens))
        return scored.logprobs_T.sum()

    passes = Passes(made._decoder, token_budget=1000, chunk=7)
    total = sum(int(r.mask.sum()) for r in rows)
    _, once = passes.backward(rows, None, TEMPERATURE, Objective(value, "episode"))
    assert seen == [total]
    _, twice = passes.backward(rows, None, TEMPERATURE, Objective(value, "minibatch"))
    assert (seen, twice) == ([total, total], 2 * once)


def test_rows_without_a_gradient_of_their_own_are_live_where_they_may_weigh_others() -> None:
    batch = make_batch(tiny_model())
    dead = next(i for i, r in enumerate(batch.rows) if r.episode == 1)
    fork = max(i for i, r in enumerate(batch.rows) if r.episode == 2)
    batch.rows[fork].advantages[:] = 0
    every = set(range(len(batch.rows)))
    for scope, left_out in (("token", {dead, fork}), ("episode", {dead}), ("minibatch", set())):
        assert set(live_rows(batch, max_staleness=None, scope=scope)) == every - left_out  # type: ignore[arg-type]
    for row in batch.rows:
        row.advantages[:] = 0
    assert live_rows(batch, max_staleness=None, scope="minibatch") == []
