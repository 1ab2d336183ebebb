"""Each loss through the learner's passes has the gradient of the undivided sum, one row at a time and full logits.

Packs, chunks and shared prefixes change nothing. What each loss is worth is checked by hand in ``tests/algorithms``.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.objective import Aggregation, Denominators, PolicyObjective, Tokens
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.registry import LOSSES, MASKS, Choice
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.passes import Objective, Passes
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.settings.kl import KlConfig
from tests.learner.test_learner import SMOOTH, learner, run
from tests.learner.test_passes import gradient
from tests.learner_data import make_batch, row_logprobs
from tests.tiny_models import tiny_model

TEMPERATURE = 0.7


def require_same_gradient(
    tmp_path: Path, policy: PolicyObjective, *, shared: bool, budget: int, chunk: int = 7, seed: int = 0
) -> dict[str, float]:
    model = tiny_model()
    batch = make_batch(model, noise=0.4, version=3, versions=(0, 1, 2, 3), seed=seed)
    rows = batch.rows
    made = learner(model, tmp_path / "m")
    if not shared:
        made._decoder.shared = False
        made._model.set_attn_implementation("sdpa")
    counts = Denominators.of(rows, total_episodes=batch.episodes, episodes=batch.episodes)
    # p as after an optimizer step, so that π/p is not 1.
    proximal = None
    if policy.needs_proximal:
        rng = np.random.default_rng(1)
        proximal = [r.logprobs + 0.2 * rng.standard_normal(len(r), np.float32) for r in rows]

    def value(logprobs_T: torch.Tensor, tokens: Tokens, stats: OffPolicyStats) -> torch.Tensor:
        return policy(logprobs_T, tokens, counts, stats, version=batch.version)

    plain = copy.deepcopy(model)
    whole, split = OffPolicyStats(), OffPolicyStats()
    logprobs_T = torch.cat([row_logprobs(plain, r, TEMPERATURE) for r in rows])
    expected = value(logprobs_T, Tokens.of(rows, proximal), whole)
    passes = Passes(made._decoder, token_budget=budget, chunk=chunk)
    objective = Objective(lambda scored, tokens: value(scored.logprobs_T, tokens, split), policy.scope)
    found, _ = passes.backward(rows, proximal, TEMPERATURE, objective)
    assert found == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    right = gradient(plain, expected)
    for name, p in made._model.named_parameters():
        assert p.grad is not None
        assert float((p.grad - right[name]).abs().max()) < 1e-5 * max(1.0, float(right[name].abs().max())), name
    assert any(float(g.abs().max()) > 1e-4 for g in right.values()), "there is a gradient to compare"
    result = split.result()
    assert result == pytest.approx(whole.result(), rel=1e-3, abs=1e-5)
    return result


@pytest.mark.parametrize(("shared", "budget"), [(True, 40), (False, 300)])
@pytest.mark.parametrize("loss", LOSSES.builtin())
def test_each_loss_has_the_undivided_gradient(tmp_path: Path, loss: str, shared: bool, budget: int) -> None:
    wide = {"clip_low": 0.05, "clip_high": 0.1} if loss.startswith("gspo") else {}
    policy = PolicyObjective(loss=Choice(loss, wide), correction=Choice("bypass"), aggregation="episode")
    require_same_gradient(tmp_path, policy, shared=shared, budget=budget)


@pytest.mark.parametrize("loss", ["gspo", "gspo_token", "gmpo"])
def test_a_turns_ratio_too(tmp_path: Path, loss: str) -> None:
    policy = PolicyObjective(loss=Choice(loss, {"scope": "turn"}), correction=Choice("bypass"), aggregation="token")
    require_same_gradient(tmp_path, policy, shared=True, budget=300)


@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_each_aggregation_has_the_undivided_gradient(tmp_path: Path, aggregation: Any) -> None:
    kind: Aggregation = aggregation
    policy = PolicyObjective(loss=Choice("ppo"), correction=Choice("bypass"), aggregation=kind, constant=40)
    require_same_gradient(tmp_path, policy, shared=True, budget=40)


CORRECTIONS_WITH = [
    ("decoupled", {"scope": "token", "truncate": 1.1}),
    ("decoupled", {"scope": "trajectory", "truncate": 1.5}),
    ("kept", {"scope": "turn", "truncate": 1.5}),
    ("log_linear", {"scope": "turn"}),
    ("importance", {"scope": "trajectory"}),
]


@pytest.mark.parametrize(("kind", "options"), CORRECTIONS_WITH)
def test_each_correction_has_the_undivided_gradient(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    loss = "reinforce" if kind == "importance" else "ppo"
    policy = PolicyObjective(loss=Choice(loss), correction=Choice(kind, options), aggregation="token")
    assert policy.scope == ("token" if options["scope"] == "token" else "episode")
    found = require_same_gradient(tmp_path, policy, shared=True, budget=40)
    assert found["weight_mean"] != 1.0


@pytest.mark.parametrize("mask", [m for m in MASKS.builtin() if m != "none"])
def test_each_mask_has_the_undivided_gradient(tmp_path: Path, mask: str) -> None:
    wide, bad = {"bounds": (0.4, 2.0)}, {"delta": 1e-3, "scope": "turn"}
    options: dict[str, dict[str, Any]] = {"geometric": wide, "trust_region": wide, "opsm": bad}
    chosen = Choice(mask, options.get(mask, {}))
    policy = PolicyObjective(loss=Choice("ppo"), correction=Choice("bypass"), mask=chosen, aggregation="token")
    assert policy.scope == ("minibatch" if mask == "m2po" else "episode")
    found = require_same_gradient(tmp_path, policy, shared=True, budget=300, seed=int(mask == "opsm"))
    assert 0.0 < found["masked_share/by_mask"] < 1.0
    assert "masked_share/by_age" not in found


def stepped(tmp_path: Path, name: str, batch: Batch, *, lr: float, algorithm: AlgorithmConfig, **more: Any) -> Any:
    """Take one step, and return its metrics and the change of each row's log-probabilities."""
    made = learner(tiny_model(), tmp_path / name, SMOOTH.model_copy(update={"lr": lr, **more}), algorithm)

    async def job(it: TorchLearner) -> Any:
        before = await it.logprobs(batch)
        metrics = await it.step(batch)
        after = await it.logprobs(replace(batch, version=1))
        return metrics, [a - b for a, b in zip(after, before, strict=True)]

    return run(made, job)


@pytest.mark.parametrize("loss", LOSSES.builtin())
def test_with_the_sign_flipped_what_was_learned_is_unlearned(tmp_path: Path, loss: str) -> None:
    batch = make_batch(tiny_model(), noise=0.02)
    wide = {"clip_low": 0.3, "clip_high": 0.4} if loss.startswith("gspo") else {}
    correction = Choice("importance" if loss == "reinforce" else "bypass")
    chosen = AlgorithmConfig(loss=Choice(loss, wide), correction=correction)
    for sign in (1.0, -1.0):
        rows = [replace(r, advantages=sign * r.advantages) for r in batch.rows]
        given = replace(batch, rows=tuple(rows))
        _, moved = stepped(tmp_path, f"{loss}{sign}", given, lr=0.05, algorithm=chosen)
        gain = sum(float((m * r.advantages).sum()) for m, r in zip(moved, rows, strict=True))
        assert gain > 0, "good tokens became likelier, and bad ones less so"


def test_the_step_shrinks_with_the_effective_sample_size(tmp_path: Path) -> None:
    # AdamW with a large eps is linear in the gradient: the weights move by the learning rate times √ESS.
    batch = make_batch(tiny_model(), noise=0.5)
    chosen = AlgorithmConfig()
    plain, _ = stepped(tmp_path, "plain", batch, lr=0.05, algorithm=chosen)
    found, _ = stepped(tmp_path, "ess", batch, lr=0.05, algorithm=chosen, ess_step="token")
    assert plain["lr"] == 0.05
    assert found["lr"] == pytest.approx(0.05 * math.sqrt(found["off_policy/ess"]))
    assert 0.02 < found["lr"] < 0.05
    longer, _ = stepped(tmp_path, "long", batch, lr=0.05, algorithm=chosen, ess_step="trajectory")
    assert longer["lr"] < found["lr"]


def test_a_pull_to_the_sampler_trains_rows_without_advantages(tmp_path: Path) -> None:
    batch = make_batch(tiny_model(), noise=0.3)
    rows = tuple(replace(r, advantages=np.zeros_like(r.advantages)) for r in batch.rows)
    given = replace(batch, rows=rows)
    still, _ = stepped(tmp_path, "still", given, lr=0.05, algorithm=AlgorithmConfig())
    assert still["minibatches_empty"] == 1.0
    pulled, moved = stepped(tmp_path, "pulled", given, lr=0.05, algorithm=AlgorithmConfig(kl=KlConfig(sampler=1.0)))
    assert pulled["grad_norm"] > 0
    assert pulled["rows_skipped"] == 0
    # log π − log μ of the sampled tokens, before the step, and how it moved: towards 0.
    tiny = tiny_model()
    apart = [(row_logprobs(tiny, r, TEMPERATURE).detach().numpy() - r.logprobs[r.mask]) for r in rows]
    assert sum(float((a * m[r.mask]).sum()) for a, m, r in zip(apart, moved, rows, strict=True)) < 0
