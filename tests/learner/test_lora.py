"""Adapters against peft's own loop, against the merged model, and from a checkpoint on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from areal_agents.algorithms.batch import Batch
from areal_agents.errors import ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.reference import AdapterReference
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.settings.kl import KlConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.weights.shared_memory import AttachedWeights
from tests.learner_data import make_batch, naive_loss, row_logprobs
from tests.tiny_models import forward_logprobs, save_tiny, tiny_model

RANK = LoraConfig(rank=4, alpha=8.0)
# With a large eps AdamW's step is smooth in the gradient: rounding is not blown up to a sign.
SMOOTH = LearnerConfig(lr=0.05, eps=1.0, grad_clip=1e6, precision="fp32", token_budget=96, logprob_chunk=7, lora=RANK)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learner(
    model: Any, folder: Path, config: LearnerConfig = SMOOTH, algorithm: AlgorithmConfig | None = None, **kwargs: Any
) -> TorchLearner:
    if not folder.exists():
        save_tiny(folder, model)
    options: dict[str, Any] = {"total_steps": 10, "publish_dtype": torch.float32, "threads": 1} | kwargs
    return TorchLearner(folder, learner=config, algorithm=algorithm or AlgorithmConfig(), **options)


def changed(config: LearnerConfig = SMOOTH, **changes: Any) -> LearnerConfig:
    return config.model_copy(update=changes)


def run(made: TorchLearner, job: Callable[[TorchLearner], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            return await job(made)
        finally:
            await made.close()

    return asyncio.run(main())


def stirred(made: TorchLearner, *, seed: int = 3, scale: float = 0.3) -> TorchLearner:
    """The learner with B drawn anew: at 0 it would hide every mistake of A."""
    numbers = torch.Generator().manual_seed(seed)
    assert made.lora is not None
    for name, tensor in made.lora.adapters().items():
        if "lora_B" in name:
            tensor.copy_(scale * torch.randn(tensor.shape, generator=numbers))
    return made


def padded(made: TorchLearner) -> TorchLearner:
    made._decoder.shared = False
    made._model.set_attn_implementation("sdpa")
    return made


def peft_model(model: Any, made: TorchLearner) -> Any:
    """The same model and adapters as peft puts them together, by its own choice of all linear layers."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    other = peft.get_peft_model(model, config).eval()
    state = other.state_dict()
    assert made.lora is not None
    for name, tensor in made.lora.adapters().items():
        state[f"base_model.model.{name.replace('.weight', '.default.weight')}"].copy_(tensor)
    return other


async def base_logprobs(it: TorchLearner, batch: Batch) -> Any:
    assert it.lora is not None
    with it.lora.disabled():
        return await it.logprobs(batch)


def every(batch: Batch, found: Any) -> Any:
    return np.concatenate([x[row.mask] for x, row in zip(found, batch.rows, strict=True)])


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_policy_is_the_base_model_to_the_bit(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    batch = make_batch(model)
    plain = run(learner(model, tmp_path / "m", changed(lora=LoraConfig())), lambda it: it.logprobs(batch))
    made = learner(model, tmp_path / "m")
    assert made._decoder.shared
    source = model.state_dict()
    assert set(made.tensors()) == set(source) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(t, source[n]) for n, t in made.tensors().items())
    found = run(made, lambda it: it.logprobs(batch))
    assert np.array_equal(every(batch, found), every(batch, plain))


@pytest.mark.parametrize("layout", ["shared", "padded", "checkpointed"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_step_is_that_of_a_plain_peft_loop(tmp_path: Path, kind: str, layout: str) -> None:
    """One row at a time, peft's own wrapper, full logits, autograd: the same loss, gradient norm, A and B."""
    model = tiny_model(kind)
    batch = make_batch(model)
    made = stirred(learner(model, tmp_path / "m", changed(gradient_checkpointing=layout == "checkpointed")))
    if layout == "padded":
        padded(made)
    naive = peft_model(model, made)
    loss = naive_loss(naive, batch, range(len(batch.rows)), batch.episodes, AlgorithmConfig())
    torch.autograd.backward(loss)
    trained = [p for p in naive.parameters() if p.requires_grad]
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained))
    torch.optim.AdamW(trained, lr=0.05, betas=SMOOTH.betas, eps=1.0, weight_decay=0.0, foreach=False).step()
    metrics = run(made, lambda it: it.step(batch))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    state = naive.state_dict()
    assert made.lora is not None
    for name, tensor in made.lora.adapters().items():
        wanted = state[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=0)


def test_the_merged_weights_say_what_the_adapters_say_after_steps(tmp_path: Path) -> None:
    model = tiny_model(initializer_range=0.05)
    made = stirred(learner(model, tmp_path / "m"), scale=0.05)

    async def job(it: TorchLearner) -> Any:
        before = await it.logprobs(make_batch(model))
        for version in range(3):
            await it.step(replace(make_batch(model, seed=version), version=version))
        batch = replace(make_batch(model), version=3)
        return batch, before, await it.logprobs(batch), await base_logprobs(it, batch)

    batch, before, after, base = run(made, job)
    merged = tiny_model(initializer_range=0.05)
    merged.load_state_dict(dict(made.tensors()))
    for row, ours, reference in zip(batch.rows, after, base, strict=True):
        wanted = row_logprobs(merged, row, batch.temperature).detach().numpy()
        np.testing.assert_allclose(ours[row.mask], wanted, atol=1e-6, rtol=1e-6)
        frozen = row_logprobs(model, row, batch.temperature).detach().numpy()
        np.testing.assert_allclose(reference[row.mask], frozen, atol=1e-6, rtol=1e-6)
    assert np.abs(every(batch, after) - every(batch, before)).max() > 0.01
    assert np.abs(every(batch, after) - every(batch, base)).max() > 0.1


def test_the_base_serves_as_reference_and_the_adapters_train_on(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)
    plain, asked = (stirred(learner(model, tmp_path / "m")) for _ in range(2))

    async def with_reference(it: TorchLearner) -> Any:
        await base_logprobs(it, batch)
        assert it.lora is not None
        with pytest.raises(ValueError, match="in it"), it.lora.disabled():
            raise ValueError("in it")
        return await it.step(batch)

    run(plain, lambda it: it.step(batch))
    run(asked, with_reference)
    assert plain.lora is not None
    assert asked.lora is not None
    for name, tensor in asked.lora.adapters().items():
        assert torch.equal(tensor, plain.lora.adapters()[name]), name
    assert learner(model, tmp_path / "m", changed(lora=LoraConfig())).lora is None


def test_the_kl_terms_reference_is_a_copy_of_the_adapters_alone(tmp_path: Path) -> None:
    """Of those after the warm start; a checkpoint holds it, and the policy is as if nobody had asked."""
    model = tiny_model()
    batches = [replace(make_batch(model, seed=v), version=v) for v in range(3)]
    kl = AlgorithmConfig(kl=KlConfig(coef=0.3))

    async def first(it: TorchLearner) -> Any:
        assert (
            every(batches[0], it._kl.logprobs(batches[0])[0]).tolist()
            == every(batches[0], await base_logprobs(it, batches[0])).tolist()
        )
        it._kl._made = None  # as if nobody had asked yet
        await it.sft_step(batches[0].rows, lr=0.05)
        begun = await it.logprobs(batches[0])
        await it.step(batches[0])
        await it.save(tmp_path / "saved")
        then = await it.logprobs(batches[1])
        asked = it._kl.logprobs(batches[0])[0]
        assert np.array_equal(every(batches[1], await it.logprobs(batches[1])), every(batches[1], then))
        now = await it.logprobs(replace(batches[0], version=1))
        return begun, asked, now, await it.step(batches[1])

    async def second(it: TorchLearner) -> Any:
        await it.load(tmp_path / "saved")
        return it._kl.logprobs(batches[0])[0], await it.step(batches[1])

    made = learner(model, tmp_path / "m", algorithm=kl)
    begun, asked, now, stepped = run(made, first)
    assert np.array_equal(every(batches[0], asked), every(batches[0], begun))
    assert np.abs(every(batches[0], asked) - every(batches[0], now)).max() > 1e-3
    assert made.lora is not None
    reference = made._kl._reference
    assert isinstance(reference, AdapterReference)
    assert sum(t.numel() for t in reference._copied.tensors.values()) == 12 * (144 + 160 + 144 + 384)
    again = learner(model, tmp_path / "m", algorithm=kl)
    resumed, same = run(again, second)
    assert np.array_equal(every(batches[0], resumed), every(batches[0], begun))
    for name in ("loss", "grad_norm", "kl_reference"):
        assert same[name] == pytest.approx(stepped[name], abs=1e-7)
    assert stepped["kl_reference"] != 0


def test_nothing_but_adapters_has_gradients_and_moments(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    made = stirred(learner(model, tmp_path / "m"))
    seen: list[str] = []
    step = made._optimizer.step

    def watched() -> Any:
        seen.extend(n for n, p in made._model.named_parameters() if p.grad is not None)
        return step()

    made._optimizer.step = watched  # type: ignore[assignment,method-assign]
    run(made, lambda it: it.step(make_batch(model)))
    # hidden 48, intermediate 80, 6 heads and 2 of keys of 16; per layer: q, k, v, o, gate, up, down
    inputs_and_outputs = (48 + 96) + 2 * (48 + 32) + (96 + 48) + 3 * (48 + 80)
    numbers = 3 * 4 * inputs_and_outputs
    moments = [t for s in made._optimizer.state.values() for n, t in s.items() if n != "step"]
    assert sum(t.numel() for t in moments) == 2 * numbers
    assert len(seen) == 2 * 7 * 3
    assert all(".lora_" in name for name in seen)
    assert made.lora is not None
    assert sum(t.numel() for t in made.lora.adapters().values()) == numbers


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_of_bf16_stays_so_and_computes_the_same(tmp_path: Path, tied: bool) -> None:
    """A learner in bf16 casts each weight to bf16 anyway: keeping them so changes no bit, and halves them."""
    model = tiny_model(tie_word_embeddings=tied)
    batch = make_batch(model)
    save_tiny(tmp_path / "m", model.to(torch.bfloat16))
    config = changed(precision="bf16")
    plain = run(learner(model, tmp_path / "m", changed(config, lora=LoraConfig())), lambda it: it.logprobs(batch))
    made = learner(model, tmp_path / "m", config)
    formats = {n: p.dtype for n, p in made._model.named_parameters()}
    assert {d for n, d in formats.items() if "lora" in n or "norm" in n} == {torch.float32}
    assert {d for n, d in formats.items() if "lora" not in n and "norm" not in n} == {torch.bfloat16}

    async def job(it: TorchLearner) -> Any:
        first = await it.logprobs(batch)
        await it.step(batch)
        async with it.publish() as ref:
            with AttachedWeights(ref) as opened:
                return first, ref.probe, {n: t.clone() for n, t in opened.tensors.items()}

    first, said, published = run(made, job)
    assert np.array_equal(every(batch, first), every(batch, plain))
    assert all(t.dtype == torch.float32 for t in published.values())
    served = tiny_model(tie_word_embeddings=tied)
    served.load_state_dict(published, strict=not tied)
    np.testing.assert_allclose(said.logprobs, forward_logprobs(served, said.ids).numpy(), atol=1e-4)


def test_a_base_of_fp32_keeps_its_numbers_where_the_learner_computes_in_bf16(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", changed(precision="bf16"))
    run(made, lambda it: it.step(make_batch(model)))
    assert all(torch.equal(made.tensors()[n], t) for n, t in model.state_dict().items() if "proj" not in n)
    assert {p.dtype for p in made._model.parameters()} == {torch.float32}


def test_targets_choose_layers_by_the_end_of_their_names(tmp_path: Path) -> None:
    model = tiny_model()
    chosen = LoraConfig(rank=2, targets=("v_proj", "layers.0.mlp.up_proj"))
    made = stirred(learner(model, tmp_path / "m", changed(lora=chosen)))
    assert made.lora is not None
    names = {f"model.layers.{i}.self_attn.v_proj" for i in range(3)} | {"model.layers.0.mlp.up_proj"}
    assert set(made.lora.layers) == names
    run(made, lambda it: it.export(tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    ids = (3, 1, 4, 1, 5, 9, 2, 6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(forward_logprobs(wrapped, ids), forward_logprobs(merged, ids), atol=1e-5, rtol=0)


def test_the_seed_decides_a_and_no_other_random_number(tmp_path: Path) -> None:
    model = tiny_model()
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    made = [learner(model, tmp_path / "m", seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), wanted)
    first, same, other = (it.lora.adapters()["model.layers.0.mlp.up_proj.lora_A.weight"] for it in made if it.lora)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    for it in made:
        asyncio.run(it.close())


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        (LoraConfig(rank=4, targets=("q_proj", "query")), r"'query' names no linear layer of LlamaForCausalLM: it has"),
        (LoraConfig(rank=4, targets=("proj", "_proj")), r"'proj', '_proj' name no linear layer"),
        (LoraConfig(rank=4, targets=("embed_tokens",)), "'embed_tokens' names no linear layer"),
        (LoraConfig(rank=4, targets=("q_proj", "lm_head")), "'lm_head' is the output head"),
        (LoraConfig(rank=33), r"rank = 33 is more than model\.layers\.0\.self_attn\.k_proj can have, which is 32 x 48"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(tmp_path: Path, lora: LoraConfig, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        learner(tiny_model(), tmp_path / "m", changed(lora=lora))


def test_layers_that_are_too_small_are_told_with_those_that_are_not(tmp_path: Path) -> None:
    # Each layer has a gate of one output for the expert that all tokens go through.
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes))
    larger = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    with pytest.raises(ModelError) as it:
        learner(model, tmp_path / "m")
    assert "model.layers.0.mlp.shared_expert_gate can have, which is 1 x 32 (2 layers are too small)" in str(it.value)
    assert f"lower it to 1, or name larger layers in learner.lora.targets ({', '.join(larger)})" in str(it.value)
    made = learner(model, tmp_path / "m", changed(lora=LoraConfig(rank=4, targets=larger)))
    assert made.lora is not None
    assert len(made.lora.layers) == 2 * (4 + 3)
    asyncio.run(made.close())
    with pytest.raises(ModelError, match="lower it to 1, or train all weights"):
        learner(model, tmp_path / "m", changed(lora=LoraConfig(rank=4, targets=("shared_expert_gate",))))
