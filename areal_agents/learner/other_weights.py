"""A model whose modules compute with other weights for a while: rounded, merged, or in another format.

Each module's weights are changed while it computes, so only one module is copied at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

Merges = Mapping[nn.Module, Callable[[], Tensor]]
"""By linear layer, what computes the weight that it has instead."""
NONE: Merges = MappingProxyType({})


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor`` as fp32 numbers that ``dtype`` can hold."""
    return tensor.detach().to(dtype).to(torch.float32)


@contextmanager
def in_fp32(model: nn.Module, dtype: torch.dtype = torch.float32, merges: Merges = NONE) -> Iterator[None]:
    """Let every module compute in fp32 with its own parameters rounded to ``dtype`` while the context is open.

    A layer of ``merges`` has the weight computed there, rounded as well.
    """
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def before(module: nn.Module, args: Any) -> None:
        own = {name: p for name, p in module._parameters.items() if p is not None}
        kept[module] = [(p, p.data) for p in own.values()]
        for name, parameter in own.items():
            merge = merges.get(module) if name == "weight" else None
            parameter.data = rounded(parameter.data if merge is None else merge(), dtype)

    def after(module: nn.Module, *args: Any) -> None:
        for parameter, data in kept.pop(module, []):
            parameter.data = data

    def changes(module: nn.Module) -> bool:
        formats = {p.dtype for p in module._parameters.values() if p is not None}
        return bool(formats) and (module in merges or dtype != torch.float32 or formats != {torch.float32})

    owners = [m for m in model.modules() if changes(m)]
    hooks = [m.register_forward_pre_hook(before) for m in owners] + [m.register_forward_hook(after) for m in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(kept):  # where a forward raised: its weights must not stay as they are
            after(module)
