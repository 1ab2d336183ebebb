"""A lean forward pass of the Llama family on the CPU, over a static KV.

One decode step does per layer: RMSNorm, one fused QKV product, rotary positions, two products over the KV of all rows,
the output product, RMSNorm, gate and up, down. The residual stream, norms, rotary and log-softmax are float32. Products
run in the compute dtype. Weights lie in oneDNN's blocked layout (1.3 to 2 times faster than row-major here).

Not covered: sliding windows, rotary scalings that change with the length, mixtures of experts, other activations.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from areal_agents.engines.cpu.architecture import Shape
from areal_agents.errors import EngineError, ModelError

Linear = Callable[[Tensor], Tensor]
Attend = Callable[[int, Tensor], Tensor]
"""``attend(layer, queries)`` reads the KV."""

BLOCK = 128
"""Positions in one block of KV."""


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def _packs(dtype: torch.dtype) -> bool:
    """Say whether oneDNN has a blocked layout for weights in ``dtype`` here: for bf16 it needs AVX-512."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):  # type: ignore[no-untyped-call]
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Return the function x ↦ x Wᵀ + b in ``dtype``.

    ``weight`` is W [out, in] and ``bias`` is b [out]. W lies in oneDNN's blocked layout where this torch has it, and
    this processor takes it in ``dtype``.
    """
    weight = weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    if not _packs(dtype):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    product = torch.ops.mkldnn._linear_pointwise.default
    none: list[float] = []
    return lambda x: product(x, packed, bias, "none", none, "")


@dataclass(frozen=True, slots=True)
class Layer:
    norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """[q heads + kv heads, head_dim] scales, where the family normalises queries and keys."""
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """One version of the weights, ready to compute with.

    It is built beside the version in use, then swapped in.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear

    @classmethod
    @torch.inference_mode()
    def build(cls, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
        """Copy, cast and pack transformers' parameters.

        Nothing of the result lies in the memory of ``tensors``, which a learner may refill.

        Raises EngineError on missing, unknown or misshapen parameters.
        """
        tensors = shape.complete(tensors)

        def cat(prefix: str, names: Sequence[str], kind: str) -> Tensor | None:
            parts = [tensors.get(f"{prefix}.{name}.{kind}") for name in names]
            found = [part for part in parts if part is not None]
            return torch.cat(found) if found else None

        def linear(prefix: str, *names: str) -> Linear:
            weight = cat(prefix, names, "weight")
            assert weight is not None
            return pack_linear(weight, cat(prefix, names, "bias"), dtype)

        layers = []
        for i in range(shape.layers):
            layer = f"model.layers.{i}"
            qk_norm = None
            if shape.qk_norm:
                q = tensors[f"{layer}.self_attn.q_norm.weight"].float().expand(shape.heads, -1)
                k = tensors[f"{layer}.self_attn.k_norm.weight"].float().expand(shape.kv_heads, -1)
                qk_norm = torch.cat([q, k])
            layers.append(
                Layer(
                    norm=tensors[f"{layer}.input_layernorm.weight"].float().clone(),
                    qkv=linear(f"{layer}.self_attn", "q_proj", "k_proj", "v_proj"),
                    qk_norm=qk_norm,
                    out=linear(f"{layer}.self_attn", "o_proj"),
                    mlp_norm=tensors[f"{layer}.post_attention_layernorm.weight"].float().clone(),
                    gate_up=linear(f"{layer}.mlp", "gate_proj", "up_proj"),
                    down=linear(f"{layer}.mlp", "down_proj"),
                )
            )
        return cls(
            embedding=tensors["model.embed_tokens.weight"].to(dtype, copy=True),
            layers=tuple(layers),
            norm=tensors["model.norm.weight"].float().clone(),
            head=pack_linear(tensors["lm_head.weight"].clone(), None, dtype),
        )


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Consecutive tokens of one row, at positions start .. start + len(ids) - 1."""

    row: int
    start: int
    ids: Sequence[int]


class CPUDecoder:
    """The model, and the KV of ``max_batch`` rows.

    The KV is [layers, 2, blocks, rows, kv heads, BLOCK, head_dim]. Positions are cut into blocks so that one block of
    rows 0..n-1 is dense: oneDNN copies what is not, at the price of the product itself. The KV is anonymous memory: a
    page costs memory once a token was written into it. The decoder is also the scheduler's ``KVStore``, in whole
    blocks.

    Args:
        shape: the model's sizes.
        weights: the first ones to compute with.
        dtype: of products and KV.
        max_batch: number of rows.
        max_context: positions of a row.
        deterministic: compute ``max_batch`` tokens in every pass, whoever they belong to (``_fixed``). Then a token's
            logits are a function of the tokens before it alone.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        dtype: torch.dtype,
        *,
        max_batch: int,
        max_context: int,
        deterministic: bool = False,
    ) -> None:
        self.shape, self.weights, self.dtype, self.deterministic = shape, weights, dtype, deterministic
        self._cos, self._sin = shape.rotary(max_context)
        self._rows = max_batch
        size = (shape.layers, 2, _blocks(max_context), max_batch, shape.kv_heads, BLOCK, shape.head_dim)
        nbytes = math.prod(size) * dtype.itemsize
        # Zero pages rather than malloc's leftovers: masked positions are multiplied by 0, and 0 times NaN is NaN.
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._kv = torch.frombuffer(self._memory, dtype=dtype).view(size)
        self._flat = self._kv.view(shape.layers, 2, -1, shape.head_dim)

    # --- KVStore ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def save(self, row: int, n: int) -> Tensor:
        return self._kv[:, :, : _blocks(n), row].clone()

    @torch.inference_mode()
    def load(self, saved: object, row: int, n: int) -> None:
        assert isinstance(saved, Tensor)
        self._kv[:, :, : _blocks(n), row].copy_(saved[:, :, : _blocks(n)])

    @torch.inference_mode()
    def copy(self, source: int, target: int, n: int) -> None:
        self._kv[:, :, : _blocks(n), target].copy_(self._kv[:, :, : _blocks(n), source])

    def wipe(self, row: int) -> None:
        """Zero a row that may hold NaN."""
        self._kv[:, :, :, row].zero_()

    # --- forward ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Compute one token for each of rows 0..n-1.

        Its keys and values are written at ``positions``, one a row. Returns logits [n, vocabulary] of what comes next.
        """
        n = len(ids)
        if self.deterministic:  # rows that are free compute a token that nobody reads
            free = [0] * (self._rows - n)
            ids, positions = [*ids, *free], [*positions, *free]
        attend = self._attend_one_query(positions, None)
        hidden = self._forward(torch.tensor(ids), torch.tensor(positions), torch.arange(len(ids)), attend)
        return self._logits(hidden)[:n]

    def _attend_one_query(self, positions: Sequence[int], rows: Tensor | None) -> Attend:
        """Return the attention of one query at each of ``positions`` over the KV of its row.

        ``rows`` are the queries' rows. None is 0, 1, 2, …, whose KV is read where it lies.
        """
        shape, queries = self.shape, len(positions)
        groups, pairs = shape.heads // shape.kv_heads, queries * shape.kv_heads
        position = torch.tensor(positions)
        blocks = _blocks(max(positions) + 1)
        unmasked = 0 if self.deterministic else (min(positions) + 1) // BLOCK
        hidden_at = torch.arange(blocks * BLOCK).view(blocks, 1, 1, BLOCK) > position[:, None, None]
        mask = torch.zeros(blocks, queries, shape.kv_heads, BLOCK, dtype=self.dtype)
        mask = mask.masked_fill_(hidden_at, -torch.inf).view(blocks, pairs, BLOCK, 1).expand(-1, -1, -1, groups)
        scores = torch.empty(blocks, pairs, BLOCK, groups, dtype=self.dtype)

        def attend(layer: int, q: Tensor) -> Tensor:
            kv = self._kv[layer, :, :blocks]
            kv = kv[:, :, :queries] if rows is None else kv.index_select(2, rows)
            keys, values = kv.view(2, blocks, pairs, BLOCK, shape.head_dim).unbind()
            query = q.reshape(-1, groups, shape.head_dim).transpose(1, 2)
            # K @ qᵀ, not q @ Kᵀ: oneDNN is three times faster when the long side comes first.
            for j in range(unmasked):
                torch.bmm(keys[j], query, out=scores[j])
            for j in range(unmasked, blocks):
                torch.baddbmm(mask[j], keys[j], query, out=scores[j])
            weights = torch.softmax(scores.permute(1, 3, 0, 2).reshape(pairs, groups, -1), -1)
            weights = weights.view(pairs, groups, blocks, BLOCK).permute(2, 0, 1, 3).contiguous()
            out = torch.bmm(weights[0], values[0]).float()
            for j in range(1, blocks):
                out += torch.bmm(weights[j], values[j])
            return out.view(queries, -1).to(self.dtype)

        return attend

    @torch.inference_mode()
    def prefill(self, segments: Sequence[RowSegment]) -> Tensor:
        """Compute several rows' tokens in one packed pass.

        Returns logits [segments, vocabulary], each after the last token of its segment.
        """
        if self.deterministic:
            return self._fixed(segments)
        shape = self.shape
        ids = torch.tensor([i for s in segments for i in s.ids])
        position = torch.cat([torch.arange(s.start, s.start + len(s.ids)) for s in segments])
        rows = torch.cat([torch.full((len(s.ids),), s.row) for s in segments])
        ends = torch.tensor([len(s.ids) for s in segments]).cumsum(0)
        groups = shape.heads // shape.kv_heads
        masks = []
        for s in segments:
            visible = torch.arange(s.start + len(s.ids)) <= torch.arange(s.start, s.start + len(s.ids))[:, None]
            mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, -torch.inf)
            masks.append(mask.repeat(groups, 1))

        def attend(layer: int, q: Tensor) -> Tensor:
            out = []
            for s, mask, end in zip(segments, masks, ends.tolist(), strict=True):
                n = len(s.ids)
                part = q[end - n : end].view(n, shape.kv_heads, groups, shape.head_dim).permute(1, 2, 0, 3)
                end_block = _blocks(s.start + n)
                kv = (
                    self._kv[layer, :, :end_block, s.row]
                    .transpose(1, 2)
                    .reshape(2, 1, shape.kv_heads, -1, shape.head_dim)
                )
                keys, values = kv[:, :, :, : s.start + n]
                folded = part.reshape(1, shape.kv_heads, groups * n, shape.head_dim)
                mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=1.0)
                mixed = mixed.view(shape.kv_heads, groups, n, shape.head_dim)
                out.append(mixed.permute(2, 0, 1, 3).reshape(n, -1))
            return torch.cat(out)

        hidden = self._forward(ids, position, rows, attend)
        return self._logits(hidden[ends - 1])

    def _fixed(self, segments: Sequence[RowSegment]) -> Tensor:
        """Compute segments as ``decode`` computes rows: ``max_batch`` tokens a pass, one query each.

        The passes of both have one size, and no number of a pass depends on another token's place. So it does not
        matter whether a token's KV was decoded, or prefilled, or with what.
        """
        slots = [(s.row, s.start + i, id, i + 1 == len(s.ids)) for s in segments for i, id in enumerate(s.ids)]
        logits = []
        for first in range(0, len(slots), self._rows):
            part = slots[first : first + self._rows]
            padded = part + part[-1:] * (self._rows - len(part))  # the last one again: it writes the same KV
            rows, positions, ids, _ = (list(column) for column in zip(*padded, strict=True))
            index = torch.tensor(rows)
            hidden = self._forward(
                torch.tensor(ids), torch.tensor(positions), index, self._attend_one_query(positions, index)
            )
            if ends := [i for i, slot in enumerate(part) if slot[3]]:
                logits.append(self._logits(hidden)[ends])
        return torch.cat(logits)

    @torch.inference_mode()
    def prove_deterministic(self) -> None:
        """Compute one sequence in every row, and once more as a prefill.

        It overwrites KV. Raises ModelError where the results differ in a bit, because this machine's products depend on
        a row's place.
        """
        sequence = [i % self.shape.vocabulary for i in (3, 1, 4, 1, 5)][: len(self._cos)]
        for position, id in enumerate(sequence):
            logits = self.decode([id] * self._rows, [position] * self._rows)
        again = self._fixed([RowSegment(0, 0, sequence)])
        if not torch.equal(logits.nan_to_num(), again.nan_to_num().expand_as(logits)):
            raise ModelError(
                "engine.deterministic cannot be had: on this processor the logits of a row depend on its place in the "
                "batch. Try another engine.max_batch or engine.threads = 1, or set it to false"
            )

    def _forward(self, ids: Tensor, position: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Return the residual stream [tokens, hidden] after the last layer.

        A layer's keys and values are written into the KV before ``attend(layer, queries)`` reads them.
        """
        shape, dtype = self.shape, self.dtype
        n, half = len(ids), shape.head_dim // 2
        keyed = (shape.heads + shape.kv_heads) * shape.head_dim
        cos, sin = self._cos[position], self._sin[position]
        head = torch.arange(shape.kv_heads)
        line = (position // BLOCK * self._rows + rows)[:, None] * shape.kv_heads + head
        slot = (line * BLOCK + (position % BLOCK)[:, None]).flatten()
        x = self.weights.embedding[ids].float()
        for i, layer in enumerate(self.weights.layers):
            h = F.rms_norm(x, (shape.hidden,), layer.norm, shape.eps).to(dtype)
            qkv = layer.qkv(h)
            qk = qkv[:, :keyed].view(n, -1, shape.head_dim).float()
            if layer.qk_norm is not None:
                qk = F.rms_norm(qk, (shape.head_dim,), None, shape.eps) * layer.qk_norm
            qk = (qk * cos).addcmul_(qk.roll(half, -1), sin).to(dtype)
            self._flat[i, 0].index_copy_(0, slot, qk[:, shape.heads :].reshape(-1, shape.head_dim))
            self._flat[i, 1].index_copy_(0, slot, qkv[:, keyed:].reshape(-1, shape.head_dim))
            x += layer.out(attend(i, qk[:, : shape.heads]))
            h = F.rms_norm(x, (shape.hidden,), layer.mlp_norm, shape.eps).to(dtype)
            gate, up = layer.gate_up(h).chunk(2, -1)
            x += layer.down(self._silu(gate).mul_(up))
        return x

    def _silu(self, gate: Tensor) -> Tensor:
        if not self.deterministic:
            return F.silu(gate)
        # Row by row: threads cut the whole in the middle of rows, and what is left of a vector rounds otherwise.
        return torch.stack([F.silu(row) for row in gate])

    def _logits(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (self.shape.hidden,), self.weights.norm, self.shape.eps).to(self.dtype)
        return self.weights.head(h)

    def swap(self, weights: Weights) -> None:
        """Compute with ``weights`` from the next call on."""
        if weights.embedding.shape != self.weights.embedding.shape:
            raise EngineError(
                f"new embedding is {tuple(weights.embedding.shape)}, served is {tuple(self.weights.embedding.shape)}"
            )
        self.weights = weights
