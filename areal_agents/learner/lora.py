"""LoRA: low-rank adapters that train beside frozen weights (2106.09685, on peft's layers).

An adapted linear layer computes W·x + (alpha/rank)·B·(A·x). W [out, in] is frozen. A [rank, in] starts at random and
B [out, rank] at 0, so the first policy is the base model to the bit.

The adapters stand in the model's own modules, so the names of its weights stay, and so do its base model and its head.
Nothing but A and B gets a gradient or moments of AdamW.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from areal_agents.engine import WeightsKind
from areal_agents.errors import ModelError
from areal_agents.learner.checkpoint import write_model
from areal_agents.learner.other_weights import NONE, Merges
from areal_agents.settings.lora import LoraConfig
from areal_agents.weights.publisher import master_weights

ADAPTER = "adapter"
"""The folder in an exported model's."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The two files of a peft folder."""
_NAME = "default"


class Lora:
    """The adapters of one model.

    Raises ModelError where ``config`` asks for what the model does not have.
    """

    def __init__(
        self, model: nn.Module, base: nn.Module, config: LoraConfig, *, seed: int, publish_adapters: bool = False
    ) -> None:
        """Put adapters into ``model`` and freeze everything else.

        Args:
            model: a causal language model.
            base: the decoder in it, without the head.
            config: rank, alpha and targets.
            seed: of A. The same seed gives the same A.
            publish_adapters: whether engines get the adapters alone.
        """
        from peft import LoraConfig as PeftConfig  # two seconds that other runs do without
        from peft import inject_adapter_in_model

        targets = _targets(model, base, config)
        alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha
        self._peft = PeftConfig(
            r=config.rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.kind: WeightsKind = "lora" if publish_adapters else "full"
        self._model, self._config, self._base_sum = model, config, ""
        device = next(iter(targets.values())).weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            inject_adapter_in_model(self._peft, model)
        model.eval()
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
        """The adapted layers, peft's, by the name of the linear layer in the model."""
        for layer in self.layers.values():
            layer.cast_input_dtype_enabled = False  # a copy in fp32, which autocast would cast back
            for part in (layer.lora_A, layer.lora_B):
                part[_NAME].float()  # peft takes the format of the frozen weight
        names = _leaves(targets)
        self._peft.target_modules = names if _named(model, names) == set(targets) else sorted(targets)

    @property
    def scaling(self) -> float:
        """alpha/rank."""
        return self._config.alpha / self._config.rank

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model be the frozen base while the context is open: the reference policy that costs no memory.

        Take no gradient in it.
        """
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    @contextmanager
    def as_published(self) -> Iterator[Merges]:
        if self.kind == "lora":
            yield NONE
            return
        with self.disabled():
            yield {layer.get_base_layer(): partial(self._merge, layer) for layer in self.layers.values()}

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights by state-dict name, W + (alpha/rank)·B·A in fp32 for adapted ones.

        One is computed when it is asked for, so that no second model exists.
        """
        return Merged(self._frozen(), {f"{name}.weight": partial(self._merge, la) for name, la in self.layers.items()})

    def adapters(self) -> dict[str, Tensor]:
        """Return A and B by the name that they have in a peft folder without its prefix, not copied."""
        out: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            out[f"{name}.lora_A.weight"] = layer.lora_A[_NAME].weight.detach()
            out[f"{name}.lora_B.weight"] = layer.lora_B[_NAME].weight.detach()
        return out

    def published(self) -> Mapping[str, Tensor]:
        """Return the merged weights, or A and (alpha/rank)·B, which is all that an engine needs to know."""
        if self.kind == "full":
            return self.tensors()
        return {n: t if n.endswith("lora_A.weight") else t * self.scaling for n, t in self.adapters().items()}

    def export(self, folder: Path, *, source: Path, dtype: torch.dtype) -> None:
        """Write a transformers folder of the merged weights, and in it the folder ``adapter``, as ``write`` does."""
        write_model(folder, self.tensors(), source=source, dtype=dtype)
        self.write(folder / ADAPTER, source=source)

    def write(self, folder: Path, *, source: Path) -> None:
        """Write a peft folder, which ``PeftModel.from_pretrained`` and vLLM load, in fp32.

        ``source`` is the base model's folder, whose path it names.
        """
        folder.mkdir(exist_ok=True)
        self._peft.base_model_name_or_path = str(source.absolute())
        self._peft.inference_mode = True
        self._peft.save_pretrained(str(folder))
        tensors = {f"base_model.model.{n}": t.to("cpu").contiguous() for n, t in self.adapters().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # as open as the folder's other files

    def read(self, folder: Path) -> None:
        """Copy the adapters that ``write`` wrote into the model's.

        Raises ModelError unless they are of the same rank, alpha and layers.
        """
        if not (folder / WEIGHTS).is_file():
            raise ModelError(f"{folder} holds no {WEIGHTS}: every weight trained there (learner.lora.rank = 0)")
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = {n.removeprefix("base_model.model."): t for n, t in load_file(folder / WEIGHTS).items()}
        into = self.adapters()
        wrong = sorted(set(found) ^ set(into)) + sorted(
            n for n in found.keys() & into.keys() if found[n].shape != into[n].shape
        )
        if wrong or (said["r"], said["lora_alpha"]) != (self._config.rank, self._config.alpha):
            raise ModelError(
                f"{folder} holds adapters of rank {said['r']} and alpha {said['lora_alpha']:g}, and learner.lora has "
                f"rank {self._config.rank} and alpha {self._config.alpha:g}"
                + (f"; {len(wrong)} tensors differ, first {wrong[0]!r}" if wrong else "")
            )
        with torch.no_grad():
            for name, target in into.items():
                target.copy_(found[name])

    def base(self) -> str:
        """Return the Adler-32 of the frozen weights as fp32 numbers, by which a checkpoint knows its base."""
        if not self._base_sum:
            value = 1
            for tensor in self._frozen().values():
                numbers = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
                value = zlib.adler32(numbers.view(torch.uint8).numpy().data, value)
            self._base_sum = f"adler32:{value:08x}"
        return self._base_sum

    def _frozen(self) -> dict[str, Tensor]:
        """Return the frozen weights by the names that they have without adapters."""
        found = master_weights(self._model)
        return {n.replace(".base_layer.", "."): t for n, t in found.items() if ".lora_" not in n}

    @torch.no_grad()
    def _merge(self, layer: Any) -> Tensor:
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        weight: Tensor = layer.get_base_layer().weight.float()
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, b, a, alpha=self.scaling)


class Merged(Mapping[str, Tensor]):
    """Weights by name, of which some are computed when they are asked for."""

    def __init__(self, weights: Mapping[str, Tensor], computed: Mapping[str, Any]) -> None:
        self._weights, self._computed = weights, computed

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._computed[name]() if name in self._computed else self._weights[name]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _targets(model: nn.Module, base: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """Return the linear layers that get an adapter, by their names in ``model``."""
    inside = set(base.modules())
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers = {n: m for n, m in linear.items() if m in inside}
    known = ", ".join(_leaves(layers)) or "none"
    for target in config.targets:
        if target.rpartition(".")[2] and any(_ends(n, target) for n in linear.keys() - layers.keys()):
            raise ModelError(
                f"learner.lora.targets: {target!r} is the output head, which gets no adapter: name layers of the "
                f"decoder ({known})"
            )
    missing = [t for t in config.targets if not any(_ends(name, t) for name in layers)]
    if missing:
        raise ModelError(
            f"learner.lora.targets: {', '.join(map(repr, missing))} "
            f"{'names' if len(missing) == 1 else 'name'} no linear layer of {type(model).__name__}: it has {known}"
        )
    found = {n: m for n, m in layers.items() if not config.targets or any(_ends(n, t) for t in config.targets)}
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layer in its decoder for an adapter: train all weights")
    small = {n: min(m.weight.shape) for n, m in found.items() if min(m.weight.shape) < config.rank}
    if small:
        name = min(small, key=lambda n: small[n])
        larger = ", ".join(n for n in _leaves(found) if n not in _leaves(small))
        instead = f"name larger layers in learner.lora.targets ({larger})" if larger else "train all weights"
        raise ModelError(
            f"learner.lora.rank = {config.rank} is more than {name} can have, which is "
            f"{' x '.join(map(str, found[name].weight.shape))} ({len(small)} layers are too small): lower it to "
            f"{small[name]}, or {instead}"
        )
    return found


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _leaves(names: Mapping[str, object]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _named(model: nn.Module, leaves: list[str]) -> set[str]:
    """Return the modules that these last parts of a name stand for, as peft and vLLM read them."""
    return {n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves}
