"""A GPU that is not there: tensors on it have a device, a shape and a format, and no numbers.

What runs on them shows formats, kernels' arguments, gradients' formats, and tensors of two devices in one operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.overrides import TorchFunctionMode

from areal_agents.learner import forward, tree_attention

CUDA = torch.device("cuda", 0)
_INDEX_OF_CUDA, _INDEX_OF_META = 1, 14


class AttentionCalls(TorchFunctionMode):
    """Records the arguments of every call of scaled_dot_product_attention, and answers with its first.

    What the function does with fake tensors depends on how PyTorch was built.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        query, key, value = args
        self.calls.append({"query": query, "key": key, "value": value} | given)
        return query.clone()


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (7, 5)) -> Iterator[AttentionCalls]:
    """Make every tensor inside a fake one, and let autocast believe in a GPU that computes in bf16.

    From ``capability`` (8, 0) on, all segments would go to flash attention in one call.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(tree_attention, "_flash", tree_attention._flash.__wrapped__)  # its cache outlives the card
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(tree_attention, "causal_lower_right", _causal_lower_right)
    with _device_guard(), FakeTensorMode(), AttentionCalls() as calls:
        yield calls


def _causal_lower_right(*sizes: int) -> CausalBias:
    """A bias is a subclass of tensors, which a fake one cannot become."""
    with unset_fake_temporarily():
        return causal_lower_right(*sizes)


@contextmanager
def _device_guard() -> Iterator[None]:
    """Let PyTorch's CPU build name CUDA devices.

    Its CUDA build does the same where it finds no GPU: it registers a guard that does nothing. The CPU build has such
    a guard for meta tensors.
    """
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_INDEX_OF_META + 1)).in_dll(libc10, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[_INDEX_OF_CUDA]
    if before is None:
        guards[_INDEX_OF_CUDA] = guards[_INDEX_OF_META]
    try:
        yield
    finally:
        guards[_INDEX_OF_CUDA] = before


def move(decoder: forward.Decoder) -> None:
    """Put fake weights on the fake GPU in the place of the real ones. Call it inside ``fake_cuda``.

    The decoder was made outside: its layout is chosen by comparing numbers.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in decoder.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
                    )
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    decoder.device = CUDA


def is_dense(mask: Tensor | None) -> bool:
    """Whether ``mask`` holds a number for every pair of tokens."""
    return mask is not None and not isinstance(mask, CausalBias)
