"""The lean decoder against transformers' own forward pass, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.cpu.decoder import CPUDecoder, RowSegment, Weights
from areal_agents.errors import EngineError, ModelError
from tests.tiny_models import VOCABULARY, settled, tiny_config, tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "yarn_rope": ("qwen3", {"rope_parameters": YARN_ROPE}),
    "llama_no_groups": ("llama", {"num_key_value_heads": 6}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


def make(model: Any, dtype: torch.dtype = torch.float32, max_batch: int = 4) -> CPUDecoder:
    shape = Shape.of(model.config, 128)
    return CPUDecoder(
        shape, Weights.build(shape, model.state_dict(), dtype), dtype, max_batch=max_batch, max_context=128
    )


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def reference(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_rotary_tables_are_those_of_transformers(name: str) -> None:
    kind, changes = MODELS[name]
    model = tiny_model(kind, **changes)
    shape, positions = Shape.of(model.config, 128), torch.arange(128)[None]
    cos, sin = shape.rotary(128)
    half = shape.head_dim // 2
    want = settled(lambda: torch.stack(model.model.rotary_emb(torch.zeros(1), positions))[:, 0])
    torch.testing.assert_close(cos[:, -1], want[0], atol=2e-7, rtol=0)  # the last head is a key's: not scaled
    torch.testing.assert_close(sin[:, -1, half:], want[1][:, half:], atol=2e-7, rtol=0)
    torch.testing.assert_close(sin[:, -1, :half], -want[1][:, :half], atol=2e-7, rtol=0)
    torch.testing.assert_close(cos[:, 0], cos[:, -1] * shape.head_dim**-0.5)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_a_full_forward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows over several blocks, a chunked prefill, then decode: logits within 1e-4 of transformers in fp32."""
    monkeypatch.setattr("areal_agents.engines.cpu.decoder.BLOCK", 16)
    kind, changes = MODELS[name]
    model = tiny_model(kind, **changes)
    decoder = make(model)
    rows = [random_ids(n, seed) for seed, n in enumerate((40, 7, 23))]
    expected = [reference(model, ids) for ids in rows]
    first = decoder.prefill(
        [RowSegment(0, 0, rows[0][:10]), RowSegment(1, 0, rows[1][:3]), RowSegment(2, 0, rows[2][:19])]
    )
    for got, want in zip(first, (expected[0][9], expected[1][2], expected[2][18]), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    second = decoder.prefill([RowSegment(0, 10, rows[0][10:36])])
    torch.testing.assert_close(second[0], expected[0][35], atol=1e-4, rtol=0)
    for step in range(4):
        at = [36 + step, 3 + step, 19 + step]
        logits = decoder.decode([row[i] for row, i in zip(rows, at, strict=True)], at)
        for got, want, i in zip(logits, expected, at, strict=True):
            torch.testing.assert_close(got, want[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("block", [8, 128])
def test_rows_are_saved_loaded_and_copied(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.engines.cpu.decoder.BLOCK", block)
    model = tiny_model()
    decoder = make(model)
    ids = random_ids(20, 3)
    expected = reference(model, ids)
    decoder.prefill([RowSegment(2, 0, ids[:15])])
    saved = decoder.save(2, 12)
    decoder.wipe(2)
    decoder.load(saved, 1, 10)
    decoder.copy(1, 0, 10)
    for row in (0, 1):
        logits = decoder.prefill([RowSegment(row, 10, ids[10:])])
        torch.testing.assert_close(logits[0], expected[-1], atol=1e-4, rtol=0)


def test_a_long_row_does_not_change_its_short_neighbour() -> None:
    model = tiny_model()
    decoder = make(model)
    long, short = random_ids(100, 1), random_ids(5, 2)
    decoder.prefill([RowSegment(0, 0, short[:4]), RowSegment(1, 0, long[:99])])
    logits = decoder.decode([short[4], long[99]], [4, 99])
    torch.testing.assert_close(logits[0], reference(model, short)[-1], atol=1e-4, rtol=0)


def test_bf16_stays_close_to_fp32() -> None:
    """Mean |Δ logprob| of bf16 compute over random ids: well below 0.1 on this peaked model."""
    model = tiny_model().to(torch.bfloat16)
    ids = random_ids(60, 5)
    want = torch.log_softmax(reference(model.float(), ids), -1)[-1]
    got = torch.log_softmax(make(model, torch.bfloat16).prefill([RowSegment(0, 0, ids)])[0].float(), -1)
    assert float((got - want).abs().mean()) < 0.1


def test_swapped_weights_are_used() -> None:
    old, new = tiny_model(seed=0), tiny_model(seed=1)
    decoder = make(old)
    ids = random_ids(9, 4)
    decoder.swap(Weights.build(decoder.shape, new.state_dict(), torch.float32))
    logits = decoder.prefill([RowSegment(0, 0, ids)])
    torch.testing.assert_close(logits[0], reference(new, ids)[-1], atol=1e-4, rtol=0)


def test_built_weights_do_not_alias_their_source() -> None:
    """The source is shared memory that its owner overwrites for the next version."""
    model = tiny_model()
    decoder = make(model)
    ids = random_ids(9, 4)
    want = reference(model, ids)[-1].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(decoder.prefill([RowSegment(0, 0, ids)])[0], want, atol=1e-4, rtol=0)


def test_tied_weights_need_one_name_only() -> None:
    model = tiny_model(tie_word_embeddings=True)
    shape = Shape.of(model.config, 64)
    for gone in ("lm_head.weight", "model.embed_tokens.weight"):
        Weights.build(shape, {k: v for k, v in model.state_dict().items() if k != gone}, torch.float32)


def test_weights_that_do_not_fit_are_refused() -> None:
    model = tiny_model()
    shape, state = Shape.of(model.config, 64), model.state_dict()
    with pytest.raises(EngineError, match=r"1 missing \['model.norm.weight'\]"):
        Weights.build(shape, {k: v for k, v in state.items() if k != "model.norm.weight"}, torch.float32)
    with pytest.raises(EngineError, match=r"1 unknown \['lora'\]"):
        Weights.build(shape, state | {"lora": torch.zeros(1)}, torch.float32)
    with pytest.raises(EngineError, match=r"model.norm.weight is \(3,\), expected \(48,\)"):
        Weights.build(shape, state | {"model.norm.weight": torch.zeros(3)}, torch.float32)


def test_models_it_would_compute_wrongly_are_refused() -> None:
    import transformers

    with pytest.raises(ModelError, match="computes llama, mistral, qwen2, qwen3 models, not 'gpt2'"):
        Shape.of(transformers.GPT2Config(), 64)
    with pytest.raises(ModelError, match="silu"):
        Shape.of(tiny_config(hidden_act="gelu"), 64)
    with pytest.raises(ModelError, match="rotary"):
        Shape.of(tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), 64)
    with pytest.raises(ModelError, match="sliding window of 32"):
        Shape.of(tiny_config("mistral", sliding_window=32), 64)
    Shape.of(tiny_config("mistral", sliding_window=32), 32)
