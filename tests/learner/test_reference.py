"""The KL term and the entropy bonus in the learner: their gradient, and what the reference policy is."""

from __future__ import annotations

import copy
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from areal_agents import settings
from areal_agents.algorithms.batch import Batch
from areal_agents.errors import ConfigError
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.reference import REFERENCE, Reference
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.settings.kl import KlConfig
from tests.learner.test_learner import SMOOTH, largest_difference, learner, run, smooth_adamw
from tests.learner.test_passes import entropy_of
from tests.learner_data import make_batch, naive_loss, row_logprobs
from tests.tiny_models import tiny_model

KL = AlgorithmConfig(kl=KlConfig(coef=0.3))


def nudged(model: Any, size: float = 0.05, seed: int = 3) -> Any:
    """A copy with other weights, so that it is a policy of its own."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return other


def naive_terms(model: Any, reference: Any, batch: Batch, a: AlgorithmConfig) -> Tensor:
    """What KL and entropy add to the naive loss: a mean over all tokens, those that the mask keeps."""
    total, count = torch.zeros(()), sum(int(r.mask.sum()) for r in batch.rows)
    for row in batch.rows:
        pi = row_logprobs(model, row, batch.temperature)
        ref = row_logprobs(reference, row, batch.temperature).detach()
        mu = torch.from_numpy(row.logprobs[row.mask])
        u = torch.exp(pi - mu)
        k3 = torch.exp(ref - pi) - 1 + pi - ref
        kept = ((u >= 0.5) & (u <= 5.0)).detach()
        term = a.kl.coef * (u * k3 if a.kl.estimator == "k3_unbiased" else k3) - a.entropy * entropy_of(model, row)
        total = total + (term * kept).sum()
    return total / count


@pytest.mark.parametrize("estimator", ["k3", "k3_unbiased"])
def test_a_step_has_the_gradient_of_the_naive_sum(tmp_path: Path, estimator: Any) -> None:
    a = AlgorithmConfig(entropy=0.2, kl=KlConfig(coef=0.3, estimator=estimator))
    model = tiny_model()
    batch = make_batch(model)
    reference = copy.deepcopy(model)
    made = learner(model, tmp_path / "m", algorithm=a)
    made._kl._take()
    model = nudged(model)
    with torch.no_grad():
        for name, tensor in made.tensors().items():
            tensor.copy_(model.state_dict()[name])
    loss = naive_loss(model, batch, range(len(batch.rows)), batch.episodes, a)
    loss = loss + naive_terms(model, reference, batch, a)
    torch.autograd.backward(loss)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    smooth_adamw(model).step()
    metrics = run(made, lambda it: it.step(batch))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["rows_skipped"] == 0, "a token without an advantage has a gradient too"
    assert largest_difference(made.tensors(), model) < 1e-5
    entropy = torch.cat([entropy_of(nudged(reference), r) for r in batch.rows]).mean()
    assert metrics["entropy"] == pytest.approx(float(entropy.detach()), rel=1e-4)
    assert metrics["kl_coef"] == 0.3
    assert metrics["kl_reference_k3"] > 0.01


def test_without_the_terms_no_reference_is_made(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m")
    metrics = run(made, lambda it: it.step(make_batch(model)))
    assert made._kl._made is None
    assert not {"entropy", "kl_coef", "kl_reference"} & metrics.keys()


def reference_tensors(made: TorchLearner) -> dict[str, Tensor]:
    reference = made._kl._reference
    assert isinstance(reference, Reference)
    return {n: p.clone() for n, p in reference._decoder.model.named_parameters()}


async def _warm_started(it: TorchLearner, batch: Batch) -> None:
    await it.sft_step(batch.rows, lr=0.01)


async def _plain(it: TorchLearner, batch: Batch) -> None:
    return


@pytest.mark.parametrize("begin", [_plain, _warm_started])
def test_the_reference_is_the_policy_that_training_began_with_also_after_a_resume(
    tmp_path: Path, begin: Callable[[TorchLearner, Batch], Awaitable[None]]
) -> None:
    model = tiny_model()
    batches = [make_batch(model, seed=s, version=s) for s in range(3)]
    begun: dict[str, Tensor] = {}

    async def first(it: TorchLearner) -> list[Any]:
        await begin(it, batches[0])
        begun.update({n: t.clone() for n, t in it.tensors().items()})
        metrics = [await it.step(batches[0]), await it.step(batches[1])]
        await it.save(tmp_path / "saved")
        return [*metrics, await it.step(batches[2])]

    made = learner(model, tmp_path / "m", algorithm=KL)
    whole = run(made, first)
    assert whole[0]["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert abs(whole[1]["kl_reference"]) > 1e-4
    for name, tensor in reference_tensors(made).items():
        assert torch.equal(tensor, begun[name])
    assert (tmp_path / "saved" / REFERENCE).exists() == (begin is _warm_started)

    async def second(it: TorchLearner) -> Any:
        await it.load(tmp_path / "saved")
        return await it.step(batches[2])

    again = learner(model, tmp_path / "m", algorithm=KL)
    resumed = run(again, second)
    assert {k: v for k, v in resumed.items() if "second" not in k and "memory" not in k} == {
        k: v for k, v in whole[2].items() if "second" not in k and "memory" not in k
    }
    assert largest_difference(made.tensors(), again._model) == 0.0


def test_a_lost_reference_is_refused(tmp_path: Path) -> None:
    model = tiny_model()

    async def first(it: TorchLearner) -> None:
        await it.sft_step(make_batch(model).rows, lr=0.01)
        await it.save(tmp_path / "saved")

    run(learner(model, tmp_path / "m"), first)
    with pytest.raises(ConfigError, match=r"had no KL term .* leave coef at 0"):
        run(learner(model, tmp_path / "m", algorithm=KL), lambda it: it.load(tmp_path / "saved"))


def test_a_new_reference_is_taken_when_it_is_due_and_the_coefficient_adapts(tmp_path: Path) -> None:
    model = tiny_model()
    a = AlgorithmConfig(kl=KlConfig(coef=0.3, refresh=2, target=0.05, horizon=70))
    batches = [make_batch(model, seed=s, version=s) for s in range(3)]
    made = learner(model, tmp_path / "m", algorithm=a)

    async def main(it: TorchLearner) -> list[Any]:
        return [await it.step(b) for b in batches]

    metrics = run(made, main)
    assert metrics[2]["kl_reference"] == pytest.approx(0.0, abs=1e-6), "the reference of step 3 is the policy after 2"
    assert metrics[1]["kl_reference"] > 0.05
    # KL 0 in the first step: β falls by 0.2 · 7/70; then it rises by as much.
    assert [m["kl_coef"] for m in metrics] == pytest.approx([0.3, 0.3 * 0.98, 0.3 * 0.98 * 1.02])


def test_the_coefficient_follows_k1_and_not_k3(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", algorithm=AlgorithmConfig(kl=KlConfig(coef=0.3, target=0.05, horizon=12)))

    async def main(it: TorchLearner) -> list[Any]:
        return [await it.step(make_batch(model, seed=s, version=s)) for s in range(3)]

    last = run(made, main)[-1]
    assert last["kl_reference"] < 0.04, "mean log π − log ref of what another policy sampled may be negative"
    assert last["kl_reference_k3"] > 0.06, "k3 never is: by it the coefficient would rise"
    assert made._kl.coef == pytest.approx(last["kl_coef"] * (1 - 0.2 * 7 / 12))  # of 7 episodes


def test_bf16_gives_the_reference_the_policys_own_numbers(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", SMOOTH.model_copy(update={"precision": "bf16"}), algorithm=KL)
    own = run(made, lambda it: it.logprobs(batch))
    found, _ = made._kl.logprobs(batch)
    assert all(np.array_equal(a, b) for a, b in zip(own, found, strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm.kl.coef", "0.1", "--algorithm.kl.estimator", "k1"], "a gradient of 0 on average"),
        (["--algorithm.kl.refresh", "3"], "do nothing while algorithm.kl.coef is 0"),
        (["--algorithm.kl.coef", "0.1", "--algorithm.kl.horizon", "500"], "horizon = 500 does nothing without"),
        (
            ["--algorithm.kl.coef", "0.1", "--algorithm.kl.refresh", "1"],
            "the reference the policy itself at every step",
        ),
        (["--algorithm.entropy", "-1"], "algorithm.entropy"),
    ],
)
def test_settings_that_do_nothing_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, flags)
    assert settings.load(None, ["--algorithm.kl.coef", "0.1"]).algorithm.kl.coef == 0.1
    renewed = ["--algorithm.kl.coef", "0.1", "--algorithm.kl.refresh"]
    assert settings.load(None, [*renewed, "2"]).algorithm.kl.refresh == 2
    assert settings.load(None, [*renewed, "1", "--learner.minibatches", "2"]).algorithm.kl.refresh == 1
