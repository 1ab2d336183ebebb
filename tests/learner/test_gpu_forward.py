"""The learner on a GPU, as far as fake tensors show it: formats, masks, devices. Numbers only where a CPU has them."""

from __future__ import annotations

import asyncio
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.attention import varlen
from torch.nn.attention.bias import CausalBias

from areal_agents.learner import checkpoint
from areal_agents.learner import tree_attention as room
from areal_agents.learner.forward import Decoder
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.packing import Pack, Segment, pack_rows
from areal_agents.learner.passes import Objective
from areal_agents.learner.probe import probe
from areal_agents.learner.tree_attention import Tree, tree_attention
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from tests.fake_cuda import CUDA, fake_cuda, is_dense, move
from tests.learner.test_forward import rows_with_shared_prefixes
from tests.learner_data import make_batch
from tests.tiny_models import save_tiny, tiny_model


def one_pack() -> Pack:
    (pack,) = pack_rows(rows_with_shared_prefixes(), token_budget=1000)
    return pack


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_attention_gets_the_autocast_format_and_no_dense_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, pack = Decoder(tiny_model(kind), torch.bfloat16), one_pack()
    with fake_cuda(monkeypatch) as spy:
        move(decoder)
        with decoder.autocast():
            hidden = decoder.hidden(pack)
        assert (hidden.device, hidden.dtype) == (CUDA, torch.bfloat16)
    assert len(spy.calls) == 3 * len(pack.segments), "one call a layer and segment"
    for call, (i, segment) in zip(spy.calls, list(enumerate(pack.segments)) * 3, strict=True):
        path = [pack.segments[p] for p in (*segment.path, i)]
        n, seen = segment.stop - segment.start, sum(s.stop - s.start for s in path)
        assert {call[name].dtype for name in ("query", "key", "value")} == {torch.bfloat16}
        assert [tuple(call[name].shape) for name in ("query", "key", "value")] == [
            (1, 6, n, 16), (1, 2, seen, 16), (1, 2, seen, 16),
        ]  # fmt: skip
        assert call["enable_gqa"] is True
        mask = call["attn_mask"]
        assert not is_dense(mask)
        assert call["is_causal"] is (mask is None) is (not segment.path)
        if mask is not None:
            assert (mask.seq_len_q, mask.seq_len_kv) == (n, seen)


def test_fp32_attention_leaves_no_grouped_heads_to_the_kernel_and_no_dense_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, pack = Decoder(tiny_model(), torch.float32), one_pack()
    with fake_cuda(monkeypatch) as spy:
        move(decoder)
        with decoder.autocast():
            assert decoder.hidden(pack).dtype == torch.float32
    for call in spy.calls:
        assert {call[name].dtype for name in ("query", "key", "value")} == {torch.float32}
        assert {call[name].shape[1] for name in ("query", "key", "value")} == {6}
        assert call["enable_gqa"] is False
        assert not is_dense(call["attn_mask"])


def test_masks_of_gpus_and_cpus_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = one_pack()
    sizes = [s.stop - s.start for s in pack.segments]
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(sizes), 16, requires_grad=True) for heads in (6, 2, 2)]
    weights = torch.randn(1, sum(sizes), 6, 16)
    found = []
    for device in (torch.device("cpu"), CUDA):
        tree = Tree(pack, device)
        assert {is_dense(mask) for mask in tree.masks if mask is not None} == {device.type == "cpu"}
        query, key, value = inputs
        out, _ = tree_attention(nn.Identity(), query, key, value, None, scaling=0.25, tree=tree)
        found.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def slow_flash(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, max_q: int, max_k: int, *, scale: float
) -> Tensor:
    """Causal attention over sequences of any lengths, one query after the other; the last one sees every key."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    assert (max_q, max_k) == (int(bounds_q.diff().max()), int(bounds_k.diff().max()))
    out = []
    for i in range(len(bounds_q) - 1):
        (a, b), (c, d) = bounds_q[i : i + 2].tolist(), bounds_k[i : i + 2].tolist()
        for n in range(a, b):
            keys, values = (x[c : d - (b - 1 - n)].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scores = torch.einsum("hd,thd->ht", q[n], keys) * scale
            out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
    return torch.stack(out)


def test_all_segments_in_one_call_mean_the_same_as_one_call_a_segment() -> None:
    pack = one_pack()
    tree = Tree(pack, torch.device("cpu"))
    assert any(len(s.path) > 1 for s in pack.segments), "a fork of a fork"
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, pack.tokens, 16, requires_grad=True) for heads in (6, 2, 2)]
    weights = torch.randn(1, pack.tokens, 6, 16)
    query, key, value = inputs
    found = []
    for out in (
        tree_attention(nn.Identity(), query, key, value, None, scaling=0.25, tree=tree)[0],
        room._in_one_call(slow_flash, query, key, value, 0.25, tree),
    ):
        assert out.shape == weights.shape
        found.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "one"),
    [
        ((8, 0), torch.bfloat16, 64, True),
        ((9, 0), torch.bfloat16, 256, True),
        ((7, 5), torch.bfloat16, 64, False),
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 264, False),
        ((9, 0), torch.bfloat16, 60, False),
    ],
)
def test_one_call_is_taken_where_flash_attention_has_a_kernel(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(room, "_doubt", lambda *args: "")
    assert (room._flash.__wrapped__(CUDA, dtype, head_dim) is not None) is one


def test_a_flash_attention_that_disagrees_is_not_used_and_this_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert room._doubt(slow_flash, cpu, torch.float32, 16) == ""

    def upper_left(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> Tensor:
        return slow_flash(q, k.flip(0), v, *rest, scale=scale)

    assert re.fullmatch(
        r"it is \S+ off, relatively, from one call a segment", room._doubt(upper_left, cpu, torch.float32, 16)
    )

    def refuses(*args: Any, **named: Any) -> Tensor:
        raise RuntimeError("no kernel\nwith a trace")

    assert room._doubt(refuses, cpu, torch.float32, 16) == "it raises no kernel"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(room, "_doubt", lambda *args: "it raises no kernel")
    with pytest.warns(UserWarning, match="varlen_attn is not used on NVIDIA H100: it raises no kernel"):
        assert room._flash.__wrapped__(CUDA, torch.bfloat16, 64) is None


def test_the_proof_of_flash_attention_leaves_a_checkpointed_layer_alone() -> None:
    x = torch.ones(3, requires_grad=True)
    proofs: list[str] = []

    def layer(x: Tensor) -> Tensor:
        if not proofs:  # the first time alone, as the cache has it
            proofs.append(room._doubt(slow_flash, torch.device("cpu"), torch.float32, 16))
        return (x * 2).exp()

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert proofs == [""]
    torch.testing.assert_close(x.grad, torch.full((3,), 2 * float(np.exp(2))))


def test_on_a_card_with_flash_attention_a_layer_is_one_call_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, pack = Decoder(tiny_model("qwen2"), torch.bfloat16), one_pack()
    calls: list[tuple[Any, ...]] = []

    def flash(*args: Any, **named: Any) -> Tensor:
        calls.append(args)
        assert named == {"window_size": (-1, 0), "enable_gqa": True, "scale": 0.25}
        return torch.empty_like(args[0])

    monkeypatch.setattr(varlen, "varlen_attn", functools.wraps(varlen.varlen_attn)(flash))
    monkeypatch.setattr(room, "_doubt", lambda *args: "")
    with fake_cuda(monkeypatch, capability=(9, 0)) as spy:
        move(decoder)
        with decoder.autocast():
            hidden = decoder.hidden(pack)
        assert (hidden.device, hidden.dtype) == (CUDA, torch.bfloat16)
        assert len(calls) == 3, "one a layer"
        seen = sum(s.stop - s.start for segment in pack.segments for s in _path(pack, segment))
        for query, key, value, bounds_q, bounds_k, _, _ in calls:
            assert {x.dtype for x in (query, key, value)} == {torch.bfloat16}
            assert [tuple(x.shape) for x in (query, key, value)] == [(pack.tokens, 6, 16), (seen, 2, 16), (seen, 2, 16)]
            assert len(bounds_q) == len(bounds_k) == len(pack.segments) + 1
    assert not spy.calls


def _path(pack: Pack, segment: Segment) -> list[Segment]:
    return [*(pack.segments[p] for p in segment.path), segment]


def test_the_mask_of_a_gpu_takes_no_memory() -> None:
    long = 10**6  # a dense mask would take 8 TB
    segments = (Segment(0, long, ()), Segment(long, 2 * long, (0,)))
    nothing = np.zeros(0, np.int64)
    tree = Tree(Pack((0,), (1, 2 * long), nothing, nothing, (nothing,), segments), CUDA)
    mask = tree.masks[1]
    assert isinstance(mask, CausalBias)
    assert (mask.seq_len_q, mask.seq_len_kv, torch.numel(mask)) == (long, 2 * long, 2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_its_tensors_on_one_device(
    tmp_path: Path, precision: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but autograd's own pass through the layers: PyTorch's engine asks for a real GPU."""
    model = tiny_model("qwen2", tie_word_embeddings=checkpointing)
    batch = make_batch(model)
    config = LearnerConfig(
        precision=precision, token_budget=96, logprob_chunk=7, gradient_checkpointing=checkpointing, device="cpu"
    )
    made = TorchLearner(save_tiny(tmp_path / "m", model), learner=config, algorithm=AlgorithmConfig(), total_steps=1)
    backward, passes = Tensor.backward, list[torch.dtype]()

    def layers(states: Tensor, gradient: Tensor | None = None, **kwargs: Any) -> None:
        if states.device == CUDA:
            assert gradient is not None
            assert (gradient.device, gradient.dtype, gradient.shape) == (CUDA, states.dtype, states.shape)
            passes.append(states.dtype)
        else:
            backward(states, gradient, **kwargs)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(Tensor, "backward", layers)
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: 1.0)  # of the loss and the gradient's norm
    with fake_cuda(monkeypatch):
        move(made._decoder)
        parameters = made._parameters = list(made._model.parameters())
        optimizer = made._new_optimizer(1e-3)
        _, forwarded = made._passes.backward(
            batch.rows, None, 0.7, Objective(lambda scored, tokens: scored.logprobs_T.sum())
        )
        assert forwarded > 0
        head = made._decoder.head.weight.grad
        assert head is not None
        assert (head.device, head.dtype) == (CUDA, torch.float32)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        assert made._apply(optimizer, 1e-3) == 1.0
        assert optimizer.state[parameters[0]]["exp_avg"].device == CUDA
        with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):  # its last line: the numbers
            probe(made._decoder, made._probe_ids, torch.bfloat16)
    assert len(passes) > 1
    assert set(passes) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    asyncio.run(made.close())


def test_a_models_file_is_written_from_tensors_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, tiny_model())
    written: list[dict[str, Tensor]] = []
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path, metadata: written.append(tensors))
    with fake_cuda(monkeypatch):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / checkpoint.WEIGHTS).touch()
        tensors = {"a": torch.empty(3, 2, device=CUDA).t()}
        checkpoint.write_model(tmp_path / "out", tensors, source=tmp_path, dtype=torch.bfloat16)
    ((name, tensor),) = written[0].items()
    assert (name, tensor.device.type, tensor.dtype, tensor.is_contiguous()) == ("a", "cpu", torch.bfloat16, True)
