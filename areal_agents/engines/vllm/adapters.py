"""LoRA adapters inside vLLM: one adapter for all requests, replaced in its place.

vLLM knows an adapter by a number that requests carry. Here it is one number for all versions. So a request that runs
through an update goes on with the new adapter, and none can ask for an old one. vLLM's own loading (a folder, under a
new number each time) would leave running requests on the old adapter, under the label of the new one.

vLLM hashes the adapter's name into the KV cache, the same for all versions here. What keeps versions apart is the
request's cache salt, as with whole weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from areal_agents.engine import WeightsRef

    LoRARequest = Any

Shapes = dict[str, tuple[int, ...]]
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ``max_lora_rank`` that vLLM takes."""
_ID = 1
_PREFIX = "base_model.model."


def lora_arguments(rank: int, targets: tuple[str, ...], config: Any) -> dict[str, Any]:
    """Return the arguments of ``AsyncEngineArgs`` for one adapter, in the model's own format.

    The layers are named, so that vLLM puts none on the output head. There it costs time, and on CPUs vLLM 0.32 fails
    on the log-probabilities of a prompt, which the probe asks for.

    Args:
        rank: of the adapter.
        targets: the ends of the names of adapted layers. None: every linear layer of the decoder.
        config: the model's, of transformers.
    """
    room = next(r for r in _RANKS if r >= rank)
    layers = {target.rpartition(".")[2] for target in targets} or linear_layers(config)
    return {
        "enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room,
        "lora_target_modules": sorted(layers),
    }  # fmt: skip


def linear_layers(config: Any) -> set[str]:
    """Return the last part of the names of the decoder's linear layers."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    names = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name.rpartition(".")[2] for name in names}


def policy_adapter() -> LoRARequest:
    """Return what each request carries."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", _ID, "(brought by updates)")


def begin_with_zero(manager: Any) -> None:
    """Register an adapter that adds nothing, so that the first requests compute what the model does.

    ``manager`` is the worker's LRUCacheWorkerLoRAManager.
    """
    manager.add_dummy_lora(policy_adapter(), 1)
    manager._adapter_manager.activate_adapter(_ID)


def replace_adapter(manager: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put the adapter of ``tensors`` in the place of the one before."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    inner = manager._adapter_manager
    rank = next(t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight"))
    mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
    made = LoRAModel.from_lora_tensors(
        _ID,
        # Copies: vLLM keeps them, and the memory that they lie in is written again.
        {_PREFIX + name: t.clone() for name, t in tensors.items()},
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # B holds the factor already
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    inner.remove_adapter(_ID)
    inner.add_adapter(made)
    inner.activate_adapter(_ID)


def adaptable(manager: Any) -> frozenset[str]:
    """Return the last part of the names of layers that vLLM has adapters for, as checkpoints call them."""
    inner = manager._adapter_manager
    packed = inner.packed_modules_mapping
    return frozenset(part for name in inner.supported_lora_modules for part in packed.get(name, [name]))


def adapter_misfit(ref: WeightsRef, shapes: Shapes, rank: int, known: frozenset[str]) -> str:
    """Return why ``ref`` holds no adapters of the model, or an empty text where it does.

    Args:
        ref: what is to be loaded.
        shapes: of the model's weights by name.
        rank: of the adapters.
        known: see ``adaptable``.
    """
    if ref.kind != "lora":
        return "they are whole weights, and this engine was started for adapters"
    given = {entry.name: entry.shape for entry in ref.manifest}
    for name, shape in given.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        weight = shapes.get(f"{layer}.weight", ())
        wanted = {"lora_A": (rank, *weight[1:]), "lora_B": (*weight[:1], rank)}
        if len(weight) != 2 or part not in wanted:
            return f"they do not fit the served model: it has no layer of {name}"
        if layer.rpartition(".")[2] not in known:
            return f"vLLM has no adapter for {layer}: leave it out of learner.lora.targets, or publish merged weights"
        if shape != wanted[part]:
            return f"they do not fit the served model: {name} is {shape}, and must be {wanted[part]}"
        other = "lora_B" if part == "lora_A" else "lora_A"
        if f"{layer}.{other}.weight" not in given:
            return f"they do not fit the served model: {layer} has no {other}"
    return "" if given else "they hold no adapter"
