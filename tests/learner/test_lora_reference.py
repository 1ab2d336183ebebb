"""Where adapters train, the reference that never moved is the frozen base, which costs no memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.algorithms.batch import Batch
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.reference import REFERENCE, AdapterReference, BaseReference, Limits, Reference
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.settings.kl import KlConfig
from tests.learner.test_lora import learner, one_thread, run
from tests.learner_data import make_batch
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture
KL = AlgorithmConfig(kl=KlConfig(coef=0.3))


def batches(model: Any) -> list[Batch]:
    return [make_batch(model, seed=v, version=v) for v in range(4)]


def numbers_in_memory() -> int:
    """Numbers of all tensors that are alive, each storage once."""
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in found}.values())


def test_it_gives_the_numbers_of_a_copy_and_takes_no_memory(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", algorithm=KL)
    all_ = batches(model)

    async def job(it: TorchLearner) -> None:
        copied = Reference(it._decoder, Limits(96, 7))  # as taken where all weights train
        adapters = AdapterReference(it._decoder, Limits(96, 7))
        for batch in all_[:3]:
            await it.step(batch)
        moved = await it.logprobs(make_batch(model, seed=3, version=3))
        before = numbers_in_memory()
        asked, coef = await it.reference(all_[3])
        now = numbers_in_memory()
        assert coef == 0.3
        assert isinstance(it._kl._made, BaseReference)
        for row, one, other, third, policy in zip(
            all_[3].rows, asked, copied.logprobs(all_[3].rows, all_[3].temperature)[0],
            adapters.logprobs(all_[3].rows, all_[3].temperature)[0], moved, strict=True,
        ):  # fmt: skip
            assert np.array_equal(one, third)
            assert np.abs(one - other).max() < 1e-6
            assert np.abs(one - policy)[row.mask].max() > 1e-4
        assert now - before < sum(r.mask.size for r in all_[3].rows) + 10, "the answer's own numbers, and no weights"
        assert all(p.requires_grad for p in it._parameters), "asking left the adapters trainable"

    run(made, job)


def test_a_whole_copy_would_be_seen_by_that_count(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", algorithm=KL)
    before = numbers_in_memory()
    held = Reference(made._decoder, Limits(96, 7))
    assert numbers_in_memory() - before >= sum(p.numel() for p in model.parameters())
    del held
    before = numbers_in_memory()
    adapters = AdapterReference(made._decoder, Limits(96, 7))
    assert numbers_in_memory() - before == sum(t.numel() for t in adapters._copied.tensors.values())
    run(made, lambda it: it.logprobs(make_batch(model)))


def test_a_run_goes_on_without_a_file_of_the_reference(tmp_path: Path) -> None:
    model = tiny_model()
    all_ = batches(model)

    async def first(it: TorchLearner) -> Any:
        await it.step(all_[0])
        await it.save(tmp_path / "saved")
        return await it.step(all_[1])

    async def second(it: TorchLearner) -> Any:
        await it.load(tmp_path / "saved")
        return await it.step(all_[1])

    whole = run(learner(model, tmp_path / "m", algorithm=KL), first)
    assert not (tmp_path / "saved" / REFERENCE).exists()
    again = learner(model, tmp_path / "m", algorithm=KL)
    resumed = run(again, second)
    assert isinstance(again._kl._made, BaseReference)
    for name in ("loss", "grad_norm", "kl_reference"):
        assert resumed[name] == pytest.approx(whole[name], abs=1e-7)
    assert whole["kl_reference"] != 0


def test_a_refresh_makes_it_a_copy_of_the_adapters_that_a_checkpoint_holds(tmp_path: Path) -> None:
    model = tiny_model()
    all_ = batches(model)
    renewed = AlgorithmConfig(kl=KlConfig(coef=0.3, refresh=2))

    async def first(it: TorchLearner) -> Any:
        await it.step(all_[0])
        assert isinstance(it._kl._made, BaseReference)
        await it.step(all_[1])
        assert isinstance(it._kl._made, AdapterReference)
        await it.save(tmp_path / "saved")
        own = await it.logprobs(all_[2])
        asked, _ = await it.reference(all_[2])
        for a, b in zip(own, asked, strict=True):
            assert np.array_equal(a, b)
        return await it.step(all_[2])

    async def second(it: TorchLearner) -> Any:
        await it.step(all_[0])  # its reference is the base, until the checkpoint brings another
        await it.load(tmp_path / "saved")
        return await it.step(all_[2])

    whole = run(learner(model, tmp_path / "m", algorithm=renewed), first)
    assert (tmp_path / "saved" / REFERENCE).is_file()
    resumed = run(learner(model, tmp_path / "m", algorithm=renewed), second)
    for name in ("loss", "grad_norm", "kl_reference"):
        assert resumed[name] == pytest.approx(whole[name], abs=1e-7)
