"""Attention over a pack whose rows share prefixes: each segment looks at its path and causally at itself.

    CPU             one call a segment, in fp32
    GPU, bf16       one flash-attention call for all segments (``varlen_attn``, PyTorch >= 2.11), once it has given
                    the same as one call a segment on a few tokens. **Not run on a GPU yet**
    GPU otherwise   one call a segment: fp32, an older PyTorch, or heads or a card that flash attention does not take

One call a segment leaves a GPU idle where packs are small: 8 rows of 4,096 tokens in all took a model of 0.5B twice
the time of one row of that length (benchmarks/results/gpu.json).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, cached_property, partial
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from areal_agents.errors import ModelError
from areal_agents.learner.packing import Pack, Segment

TREE = "areal_tree"
"""The name under which ``tree_attention`` is known to transformers."""
_GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Not MATH, which stores every score (12.9 GB for 16k tokens and 12 heads), and would be taken in silence; not cuDNN,
which plans for every new length, and here nearly all of them are new."""


_TRUSTED = 2e-2
"""The relative error up to which two bf16 kernels agree. A mask that is off by one key errs by some tenths."""


class Tree:
    """The segments of one pack, and what attention needs of them.

    It is made once and read by every layer.
    """

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self.device = device
        self.segments = pack.segments
        self.sizes = [s.stop - s.start for s in pack.segments]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """The mask of each segment; None for one without a path, which is causal."""
        return [self._mask(i) if s.path else None for i, s in enumerate(self.segments)]

    @cached_property
    def visible(self) -> list[int]:
        """The segments that each segment looks at, its path and then itself, one after the other."""
        return [p for i, s in enumerate(self.segments) for p in (*s.path, i)]

    @cached_property
    def seen(self) -> list[int]:
        """The tokens that each segment's last token looks at."""
        return [sum(self.sizes[p] for p in (*s.path, i)) for i, s in enumerate(self.segments)]

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where the queries of each segment begin, and the keys that they look at, int32 [segments + 1] each."""
        return tuple(
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.device)
            for lengths in (self.sizes, self.seen)
        )  # type: ignore[return-value]  # two lengths, two tensors

    def _mask(self, i: int) -> Tensor:
        """Return the mask that lets a token of segment ``i`` look at its whole path and causally at its segment.

        On CPUs it is numbers [n, tokens before + n], 0 or -inf, since a ``CausalBias`` would be turned into them in
        every layer. On GPUs it is a ``CausalBias``, for which the kernels know the rule and read no numbers.
        """
        n, before = self.sizes[i], self.seen[i] - self.sizes[i]
        if self.device.type == "cpu":
            return torch.full((n, before + n), float("-inf")).triu_(before + 1)
        # PyTorch allocates 2 · n · (before + n) numbers of host memory for the sizes given here, and reads none.
        bias = causal_lower_right(1, 1)
        bias.seq_len_q, bias.seq_len_kv = n, before + n
        return bias


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    tree: Tree | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from each segment to its path and causally to itself.

    The arguments are those of transformers' attention interface, and the ones not named below are not used.

    On CPUs it is computed in fp32. There scaled_dot_product_attention is faster than in bf16 (its backward most), and
    its scores keep their precision. On GPUs it is computed in ``value``'s format, bf16 under autocast. The rotary
    tables are fp32, so ``query`` and ``key`` come in fp32, for which flash attention has no kernel.

    Args:
        query: [1, H, N, D].
        key: [1, K, N, D] with H a multiple of K.
        value: [1, K, N, D].
        scaling: what scores are multiplied by before the softmax.
        tree: the pack's segments, with N tokens in all.
        sliding_window: must be None, as in plain causal attention.
        softcap: must be None too.

    Returns:
        The output [1, N, H, D] in ``value``'s format, and no attention weights.

    Raises:
        ModelError: the layer is not plain causal attention.
        RuntimeError: a GPU has no kernel for it.
    """
    if tree is None or sliding_window is not None or softcap is not None:
        raise ModelError("tree attention computes plain causal attention only")
    on_cpu = query.device.type == "cpu"
    dtype = torch.float32 if on_cpu else value.dtype
    flash = None if on_cpu else _flash(query.device, dtype, query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype), key.to(dtype)
        if flash is not None:
            return _in_one_call(flash, query, key, value, scaling, tree), None
        return _in_calls(query, key, value.to(dtype), scaling, tree).to(value.dtype), None


def _in_calls(query: Tensor, key: Tensor, value: Tensor, scaling: float, tree: Tree) -> Tensor:
    """Attend from one segment after the other, [1, N, H, D]."""
    on_cpu = query.device.type == "cpu"
    grouped = on_cpu or query.dtype != torch.float32
    if not grouped:  # flash alone knows grouped heads, and fp32 is left to the memory-efficient kernel
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    # split has one backward for all its pieces. Slices would each fill a tensor of the whole length.
    queries, keys, values = (torch.split(x, tree.sizes, dim=2) for x in (query, key, value))
    out: list[Tensor] = []
    with nullcontext() if on_cpu else sdpa_kernel(_GPU_KERNELS):
        for i, (segment, mask) in enumerate(zip(tree.segments, tree.masks, strict=True)):
            path = (*segment.path, i)
            k = torch.cat([keys[p] for p in path], dim=2) if segment.path else keys[i]
            v = torch.cat([values[p] for p in path], dim=2) if segment.path else values[i]
            out.append(
                nn.functional.scaled_dot_product_attention(
                    queries[i], k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
                )
            )
    return torch.cat(out, dim=2).transpose(1, 2)


def _in_one_call(
    flash: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, scaling: float, tree: Tree
) -> Tensor:
    """Attend from all segments at once, [1, N, H, D].

    The causal rule of ``flash`` puts the last query beside the last key, as a segment behind its path needs it.
    """
    # Pieces joined, and not an index: the gradient of a shared segment is then a sum in a fixed order.
    keys, values = (torch.split(x[0].transpose(0, 1), tree.sizes) for x in (key, value))
    k, v = (torch.cat([pieces[p] for p in tree.visible]) for pieces in (keys, values))
    q = query[0].transpose(0, 1).contiguous()
    return flash(q, k, v, *tree.bounds, max(tree.sizes), max(tree.seen), scale=scaling)[None]


@cache
def _flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor] | None:
    """Return causal flash attention over sequences of any lengths, None where it is not to be had.

    Warns where it is there and does not agree with one call a segment.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn  # PyTorch >= 2.10
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    if not fits or "window_size" not in known or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}  # before that argument it was always on
    options: dict[str, Any] = {"window_size": (-1, 0), **grouped}
    found = cast(Callable[..., Tensor], partial(varlen_attn, **options))  # a tuple only where one asks for it
    if doubt := _doubt(found, device, dtype, head_dim):
        warnings.warn(
            f"PyTorch {torch.__version__}'s varlen_attn is not used on {torch.cuda.get_device_name(device)}: {doubt}. "
            "Attention goes one segment at a time, which is right, and slow where packs are small",
            stacklevel=2,
        )
        return None
    return found


def _doubt(flash: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return why ``flash`` is not to be trusted, empty where outputs and gradients are those of one call a segment."""
    segments = (Segment(0, 37, ()), Segment(37, 40, (0,)), Segment(40, 41, (0, 1)), Segment(41, 60, (0,)))
    nothing = np.zeros(0, np.int64)
    tree = Tree(Pack((0,), (1, 60), nothing, nothing, (nothing,), segments), device)
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, 60, head_dim, generator=numbers) for heads in (4, 2, 2)]
    weight = torch.randn(1, 60, 4, head_dim, generator=numbers).to(device)
    found: list[list[Tensor]] = []
    # A layer that is computed again counts what it saved: its hooks must not see this.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        for one in (False, True):
            inputs = [x.to(device, dtype).requires_grad_() for x in drawn]
            query, key, value = inputs
            try:
                out = (
                    _in_one_call(flash, query, key, value, head_dim**-0.5, tree)
                    if one else _in_calls(query, key, value, head_dim**-0.5, tree)
                )  # fmt: skip
                found.append([out.detach(), *torch.autograd.grad((out.float() * weight).sum(), inputs)])
            except (RuntimeError, ValueError, TypeError) as error:
                return f"{'it' if one else 'one call a segment'} raises {str(error).splitlines()[0]}"
    for ours, theirs in zip(*found, strict=True):
        off = float((ours - theirs).float().norm() / theirs.float().norm())
        if not off <= _TRUSTED:
            return f"it is {off:.2g} off, relatively, from one call a segment"
    return ""


AttentionInterface.register(TREE, tree_attention)
