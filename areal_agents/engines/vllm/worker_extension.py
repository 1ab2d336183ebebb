"""The part that runs inside vLLM's worker processes, where it reads weights, loads them and repacks the tied head.

vLLM mixes ``WorkerExtension`` into its worker class (``worker_extension_cls``) and calls its methods by name
(``collective_rpc``), between two steps. Reading and verifying happen in a thread beside the steps. The load does not.

* The load goes through vLLM's layerwise reload, because the packed (oneDNN) weights of a CPU worker cannot be written
  in place.
* After it the packed copy of a tied ``lm_head`` is still the old one (vLLM 0.32.0). Greedy tokens mostly stay right.
  Log-probabilities are off by up to 0.28. It is packed again here.
"""

from __future__ import annotations

import pickle
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from areal_agents.engines.vllm.adapters import (
    Shapes,
    adaptable,
    adapter_misfit,
    begin_with_zero,
    replace_adapter,
)
from areal_agents.errors import ArealError

if TYPE_CHECKING:
    from collections.abc import Callable

    from areal_agents.engine import WeightsRef
    from areal_agents.weights.base import OpenWeights


class WorkerExtension:
    """The methods that are mixed into vLLM's worker.

    Their results are plain values, because they travel through msgpack.
    """

    if TYPE_CHECKING:
        vllm_config: Any
        model_runner: Any
        device: Any

        def reload_weights(self, weights_iterator: Any) -> None: ...

    def areal_prepare(self, lora_rank: int = 0) -> int:
        """Work out what a checkpoint of the served model holds, and return the number of its tensors.

        Where updates bring adapters of ``lora_rank``, the first one is zero. Call it once.
        """
        shapes, groups = expected(self.vllm_config.model_config.hf_config)
        if lora_rank:
            begin_with_zero(self.model_runner.lora_manager)
            self._areal_misfit = partial(
                adapter_misfit, shapes=shapes, rank=lora_rank, known=adaptable(self.model_runner.lora_manager)
            )
        else:
            self._areal_misfit = partial(misfit, shapes=shapes, groups=groups)
        self._areal_opening: Opening | None = None
        return len(shapes)

    def areal_open(self, ref: bytes) -> None:
        """Begin to read the pickled ``WeightsRef``, in a thread."""
        self._areal_opening = Opening(pickle.loads(ref), self._areal_misfit, self.device)
        self._areal_opening.start()

    def areal_opened(self) -> str | None:
        """Return None while the weights are being read, and then why they are refused, or an empty text."""
        opening = self._areal_opening
        assert opening is not None
        if opening.is_alive():
            return None
        return opening.error  # kept until ``areal_forget``: other ranks may still read, and all are asked again

    def areal_forget(self) -> None:
        """Give up weights that were opened, or are still being read, and will not be loaded."""
        self._areal_opening = None

    def areal_load(self) -> None:
        """Load what was opened.

        An exception leaves the model half loaded.
        """
        import torch

        opening, self._areal_opening = self._areal_opening, None
        assert opening is not None
        assert opening.opened is not None
        with opening.opened as opened, torch.no_grad():
            if opening.ref.kind == "lora":
                replace_adapter(self.model_runner.lora_manager, opened.tensors)
                return
            self.reload_weights(weights_iterator=iter(opened.tensors.items()))
            repack_head(self.model_runner.get_model())


class Opening(threading.Thread):
    """The thread that reads and verifies weights.

    ``opened`` and ``error`` are valid once it has ended.
    """

    def __init__(self, ref: WeightsRef, misfit: Callable[[WeightsRef], str], device: Any) -> None:
        super().__init__(name="weights", daemon=True)
        self.ref = ref
        self.opened: OpenWeights | None = None
        self.error = ""
        self._misfit, self._device = misfit, device

    def run(self) -> None:
        import torch

        from areal_agents.weights.transports import open_weights

        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread begins with the first one
            self.error = self._misfit(self.ref)
            if not self.error:
                self.opened = open_weights(self.ref, verify=True)
        except ArealError as error:
            self.error = str(error)
        except Exception as error:  # noqa: BLE001  boundary: the failure is the update's reply, the worker goes on
            traceback.print_exc()
            self.error = f"{type(error).__name__}: {error}"


def expected(config: Any) -> tuple[Shapes, list[set[str]]]:
    """Return the shapes of a checkpoint's tensors by name, and the sets of names that stand for one tensor each.

    A set of several names is a tied tensor's.
    """
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    shapes: Shapes = {}
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        groups.setdefault(id(parameter), set()).add(name)
    return shapes, list(groups.values())


def misfit(ref: WeightsRef, shapes: Shapes, groups: list[set[str]]) -> str:
    """Return why ``ref`` is no checkpoint of the model, or an empty text where it is one."""
    if ref.kind != "full":
        return "they are adapters, and this engine was started for whole weights"
    given = {entry.name: entry.shape for entry in ref.manifest}
    unknown = sorted(given.keys() - shapes.keys())
    missing = sorted(min(names) for names in groups if names.isdisjoint(given))
    wrong = sorted(f"{n} {given[n]} for {shapes[n]}" for n in given.keys() & shapes.keys() if given[n] != shapes[n])
    parts = [("unknown", unknown), ("missing", missing), ("of another shape", wrong)]
    found = [f"{len(names)} {what}, first {names[0]}" for what, names in parts if names]
    return "they do not fit the served model: " + "; ".join(found) if found else ""


def repack_head(model: Any) -> None:
    """Pack a CPU model's tied output head again, from the embedding that was just loaded."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head = getattr(model, "lm_head", None)
    weight = getattr(head, "weight", None)
    if weight is not None and weight.ndim == 2 and weight.numel():
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
