"""The learner against the same training written naively; publishing; checkpoints."""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.objective import split_episodes
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.packing import pack_rows
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.weights.shared_memory import AttachedWeights
from tests.learner_data import make_batch, naive_loss, row_logprobs
from tests.tiny_models import save_tiny, tiny_model

# With a large eps AdamW's step is smooth in the gradient: rounding is not blown up to a sign.
SMOOTH = LearnerConfig(lr=0.5, eps=1.0, grad_clip=1e6, precision="fp32", token_budget=96, logprob_chunk=7)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learner(
    model: Any, folder: Path, config: LearnerConfig = SMOOTH, algorithm: AlgorithmConfig | None = None, **kwargs: Any
) -> TorchLearner:
    save_tiny(folder, model)
    options: dict[str, Any] = {"total_steps": 10, "publish_dtype": torch.float32, "threads": 1} | kwargs
    return TorchLearner(folder, learner=config, algorithm=algorithm or AlgorithmConfig(), **options)


def run(made: TorchLearner, job: Callable[[TorchLearner], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await job(made)
        finally:
            await made.close()

    return asyncio.run(main())


def smooth_adamw(model: Any, c: LearnerConfig = SMOOTH) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=0.0, foreach=False)


def largest_difference(a: Mapping[str, Tensor], model: Any) -> float:
    b = model.state_dict()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_are_those_of_a_plain_forward(tmp_path: Path, shared: bool, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    batch = make_batch(model, temperature=0.7)
    made = learner(model, tmp_path / "m")
    assert made._decoder.shared
    if not shared:
        made._decoder.shared = False
        made._model.set_attn_implementation("sdpa")
    found = run(made, lambda it: it.logprobs(batch))
    for row, logprobs in zip(batch.rows, found, strict=True):
        expected = row_logprobs(model, row, 0.7).detach().numpy()
        np.testing.assert_allclose(logprobs[row.mask], expected, atol=1e-5)
        assert not logprobs[~row.mask].any()


@pytest.mark.parametrize("aggregation", ["token", "episode"])
@pytest.mark.parametrize("correction", ["bypass", "decoupled"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_equals_the_naive_loss_over_the_undivided_batch(
    tmp_path: Path, aggregation: Any, correction: Any, shared: bool
) -> None:
    options = {"truncate": 2.0} if correction == "decoupled" else {}
    a = AlgorithmConfig(aggregation=aggregation, correction=Choice(correction, options))
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", algorithm=a)
    if not shared:
        made._decoder.shared = False
        made._model.set_attn_implementation("sdpa")
    before = copy.deepcopy(model)
    proximal = None
    if correction == "decoupled":
        proximal = [np.zeros(len(r), np.float32) for r in batch.rows]
        for row, p in zip(batch.rows, proximal, strict=True):
            p[row.mask] = row_logprobs(model, row, batch.temperature).detach().numpy()
    loss = naive_loss(model, batch, range(len(batch.rows)), batch.episodes, a, proximal)
    torch.autograd.backward(loss)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    smooth_adamw(model).step()
    metrics = run(made, lambda it: it.step(batch))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["off_policy/masked_share"] > 0
    assert metrics["off_policy/clip_fraction"] > 0 or correction == "decoupled"
    assert metrics["rows_skipped"] == 1
    assert largest_difference(made.tensors(), model) < 1e-5
    assert largest_difference(made.tensors(), before) > 1e-3, "the step moved the weights"


@pytest.mark.parametrize("correction", ["bypass", "decoupled"])
def test_two_minibatches_a_batch_and_two_batches_equal_a_naive_loop(tmp_path: Path, correction: Any) -> None:
    a = AlgorithmConfig(correction=Choice(correction, {"token_mask": None}), aggregation="episode")
    c = SMOOTH.model_copy(update={"minibatches": 2, "lr": 0.05})  # four steps: rounding grows with their size
    model = tiny_model()
    before = copy.deepcopy(model)
    first = make_batch(model, seed=1)
    second = replace(make_batch(model, seed=2), version=1)
    made = learner(model, tmp_path / "m", c, a, seed=5)
    optimizer = smooth_adamw(model, c)
    losses: list[list[float]] = []
    for batch in (first, second):
        losses.append([])
        with torch.no_grad():
            fixed = [np.zeros(len(r), np.float32) for r in batch.rows]
            for row, p in zip(batch.rows, fixed, strict=True):
                p[row.mask] = row_logprobs(model, row, batch.temperature).numpy()
        parts = split_episodes(batch.episodes, 2, seed=5, version=batch.version)
        assert sorted(np.concatenate(parts).tolist()) == list(range(7))
        for part in parts:
            rows = [i for i, r in enumerate(batch.rows) if r.episode in part]
            proximal = fixed if correction == "decoupled" else None
            optimizer.zero_grad()
            loss = naive_loss(model, batch, rows, len(part), a, proximal)
            torch.autograd.backward(loss)
            losses[-1].append(float(loss.detach()))
            optimizer.step()

    async def job(it: TorchLearner) -> list[float]:
        return [(await it.step(batch))["loss"] for batch in (first, second)]

    assert run(made, job) == pytest.approx([sum(of) / 2 for of in losses], abs=1e-4), "a mean over minibatches"
    assert made.version == 2
    assert largest_difference(made.tensors(), model) < 1e-5
    assert largest_difference(made.tensors(), before) > 1e-3


def test_over_age_tokens_get_no_gradient_and_stay_in_the_denominator(tmp_path: Path) -> None:
    a, model = AlgorithmConfig(), tiny_model()
    batch = make_batch(model, versions=(0, 1, 2))
    batch = replace(batch, version=2)
    made = learner(model, tmp_path / "m", algorithm=a, max_staleness=1)
    made._version = 2
    torch.autograd.backward(naive_loss(model, batch, range(len(batch.rows)), batch.episodes, a, max_staleness=1))
    smooth_adamw(model).step()
    metrics = run(made, lambda it: it.step(batch))
    assert largest_difference(made.tensors(), model) < 1e-5
    ages = np.concatenate([2 - r.versions[r.mask] for r in batch.rows])
    assert metrics["over_age_share"] == pytest.approx(float((ages > 1).mean()))


def test_gradient_clipping_and_weight_decay(tmp_path: Path) -> None:
    c = SMOOTH.model_copy(update={"grad_clip": 1e-3, "weight_decay": 0.1})
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", c)
    torch.autograd.backward(naive_loss(model, batch, range(len(batch.rows)), batch.episodes, AlgorithmConfig()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(1 - 0.5 * 0.1)
    smooth_adamw(model).step()
    run(made, lambda it: it.step(batch))
    assert largest_difference(made.tensors(), model) < 1e-5


def test_a_step_without_a_finite_gradient_is_skipped_and_the_version_advances(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m")
    batch.rows[0].advantages[batch.rows[0].mask] = np.inf
    metrics = run(made, lambda it: it.step(batch))
    assert metrics["skipped"] == 1
    assert made.version == 1
    assert largest_difference(made.tensors(), model) == 0.0


def test_a_batch_without_a_gradient_is_consumed_without_a_step(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    batch = replace(batch, rows=tuple(replace(r, advantages=0 * r.advantages) for r in batch.rows))
    made = learner(model, tmp_path / "m")
    metrics = run(made, lambda it: it.step(batch))
    assert (metrics["minibatches_empty"], metrics["skipped"], metrics["rows_skipped"]) == (1, 0, len(batch.rows))
    assert metrics["tokens_forward"] == 0
    assert metrics["tokens"] == sum(int(r.mask.sum()) for r in batch.rows)
    assert made.version == 1
    assert largest_difference(made.tensors(), model) == 0.0


def test_a_wrong_batch_is_refused_and_leaves_the_version(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m")
    headless = replace(batch.rows[0], mask=np.ones_like(batch.rows[0].mask))
    wrong: list[tuple[Batch, str]] = [
        (replace(batch, version=3), "for version 3, the learner is at 0"),
        (replace(batch, episodes=0, rows=()), "without episodes"),
        (replace(batch, episodes=2), "a row of episode 2 in a batch of 2"),
        (replace(batch, rows=(headless,)), "first token is sampled"),
    ]

    async def job(it: TorchLearner) -> None:
        for bad, message in wrong:
            with pytest.raises(ValueError, match=message):
                await it.step(bad)

    run(made, job)
    assert made.version == 0
    assert largest_difference(made.tensors(), model) == 0.0


def test_a_step_that_raised_leaves_no_gradient_to_the_next(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made, fresh = learner(model, tmp_path / "m"), learner(model, tmp_path / "f")
    # Packs are made in the order of their tokens: the others are through when this row's turn comes.
    last = max(range(len(batch.rows)), key=lambda i: batch.rows[i].ids.tolist())
    rows = list(batch.rows)
    rows[last] = replace(rows[last], mask=np.ones_like(rows[last].mask))

    async def job(it: TorchLearner) -> None:
        with pytest.raises(ValueError, match="first token is sampled"):
            await it.step(replace(batch, rows=tuple(rows)))
        assert all(p.grad is None for p in it._parameters)
        await it.step(batch)

    run(made, job)
    run(fresh, lambda it: it.step(batch))
    for name, tensor in fresh.tensors().items():
        assert torch.equal(made.tensors()[name], tensor), name


def test_bf16_trains_the_fp32_masters_towards_the_same_place(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    batch = make_batch(model, noise=0.05)
    c = SMOOTH.model_copy(update={"precision": "bf16"})
    unmasked = AlgorithmConfig(correction=Choice("bypass", {"token_mask": None}))
    made = learner(model, tmp_path / "m", c, unmasked)
    exact = learner(model, tmp_path / "e", c.model_copy(update={"precision": "fp32"}), unmasked)
    start = {n: t.clone() for n, t in made.tensors().items()}
    run(made, lambda it: it.step(batch))
    run(exact, lambda it: it.step(batch))
    moved = torch.cat([(made.tensors()[n] - t).flatten() for n, t in start.items()])
    wanted = torch.cat([(exact.tensors()[n] - t).flatten() for n, t in start.items()])
    assert all(t.dtype == torch.float32 for t in made.tensors().values())
    assert float(torch.cosine_similarity(moved, wanted, dim=0)) > 0.98
    assert float(moved.norm() / wanted.norm()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_nothing_but_what_is_kept(tmp_path: Path, precision: Any) -> None:
    model = tiny_model(attention_dropout=0.5)  # the layers are in training mode then: dropout must stay off
    batch = make_batch(model, noise=0.05)
    c = SMOOTH.model_copy(update={"precision": precision, "token_budget": 64})
    plain = learner(model, tmp_path / "a", c)
    saving = learner(model, tmp_path / "b", c.model_copy(update={"gradient_checkpointing": True}))
    kept: dict[str, int] = {}
    for name, made in (("plain", plain), ("saving", saving)):
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            made._decoder.hidden(pack_rows([r.ids for r in batch.rows], token_budget=512, shared=True)[0])
        kept[name] = sum(sizes)
        run(made, lambda it: it.step(batch))
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, saving.tensors()[name]), name
    assert kept["saving"] < kept["plain"] / 4


def test_the_warm_start_lowers_the_loss_and_leaves_the_version(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    c = LearnerConfig(precision="fp32", token_budget=96)
    made = learner(model, tmp_path / "m", c)
    total = sum(int(r.mask.sum()) for r in batch.rows)
    expected = sum(-float(row_logprobs(model, r, 1.0).detach().sum()) for r in batch.rows) / total

    async def job(it: TorchLearner) -> list[float]:
        return [(await it.sft_step(batch.rows, lr=3e-3))["loss"] for _ in range(12)]

    found = run(made, job)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[-1] < 0.6 * found[0]
    assert made.version == 0


@pytest.mark.parametrize("tied", [True, False])
def test_published_weights_arrive_and_are_not_overwritten_while_they_are_read(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    batch = make_batch(model)
    made = learner(model, tmp_path / "m")

    async def job(it: TorchLearner) -> None:
        async with it.publish() as old:
            assert old.version == 0
            assert ("lm_head.weight" in {e.name for e in old.manifest}) is not tied
            await it.step(batch)
            async with it.publish() as new:
                assert (new.version, new.locator != old.locator) == (1, True)
                third = asyncio.ensure_future(it.publish().__aenter__())
                await asyncio.wait([third], timeout=0.05)
                assert not third.done(), "both buffers are being read"
                with AttachedWeights(old) as a, AttachedWeights(new) as b:
                    for name, tensor in model.state_dict().items():
                        if name in a.tensors:
                            torch.testing.assert_close(a.tensors[name], tensor, rtol=0, atol=0)
                    for name, tensor in it.tensors().items():
                        torch.testing.assert_close(b.tensors[name], tensor, rtol=0, atol=0)
            assert (await third).locator == new.locator

    run(made, job)


def test_a_loaded_checkpoint_goes_on_bit_identically(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    batches = [replace(make_batch(model, seed=s), version=s) for s in range(3)]
    c = SMOOTH.model_copy(update={"minibatches": 2, "schedule": "cosine", "eps": 1e-8, "lr": 1e-3})
    made = learner(model, tmp_path / "m", c, seed=3)

    async def whole(it: TorchLearner) -> None:
        await it.step(batches[0])
        await it.step(batches[1])
        await it.save(tmp_path / "checkpoint")
        await it.save(tmp_path / "checkpoint")  # again: replaces
        await it.step(batches[2])

    run(made, whole)
    resumed = TorchLearner(
        tmp_path / "m", learner=c, algorithm=AlgorithmConfig(), total_steps=10, publish_dtype=torch.float32, threads=1
    )

    async def rest(it: TorchLearner) -> None:
        await it.load(tmp_path / "checkpoint")
        assert it.version == 2
        await it.step(batches[2])

    run(resumed, rest)
    for name, tensor in made.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "m"], "no temporary folder is left"


def test_an_exported_folder_is_a_transformers_model(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    save_tiny(tmp_path / "m", model)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "manifest.json").write_text("{}")
    made = TorchLearner(
        tmp_path / "m", learner=SMOOTH, algorithm=AlgorithmConfig(), total_steps=1, publish_dtype=torch.bfloat16
    )
    run(made, lambda it: it.export(tmp_path / "out" / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    assert (tmp_path / "out" / "model" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "model" / "manifest.json").exists()  # checksums of other weights
    assert len({f.stat().st_mode for f in (tmp_path / "out" / "model").iterdir()}) == 1


def test_missing_and_foreign_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        TorchLearner(tmp_path / "none", learner=SMOOTH, algorithm=AlgorithmConfig(), total_steps=1)
    made = learner(tiny_model(), tmp_path / "m")
    other = learner(tiny_model(intermediate_size=64), tmp_path / "o")

    async def job(it: TorchLearner) -> None:
        with pytest.raises(ModelError, match="no checkpoint"):
            await it.load(tmp_path / "m")
        await other.save(tmp_path / "c")
        await other.close()
        with pytest.raises(ModelError, match="of another model"):
            await it.load(tmp_path / "c")

    run(made, job)


def test_the_event_loop_goes_on_during_a_step_and_its_thread_has_its_cores(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    made = learner(model, tmp_path / "m", threads=2)

    async def job(it: TorchLearner) -> int:
        stepping, turns = asyncio.ensure_future(it.step(batch)), 0
        while not stepping.done():
            await asyncio.sleep(0)
            turns += 1
        assert await it._run(torch.get_num_threads) == 2
        return turns

    assert run(made, job) > 10
