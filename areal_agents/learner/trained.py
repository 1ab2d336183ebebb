"""What of a model trains: all weights here, or adapters (``lora.py``). It decides what is published and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from areal_agents.engine import WeightsKind
from areal_agents.errors import CheckpointError, ConfigError, ModelError
from areal_agents.learner.checkpoint import is_bf16, read_weights, write_model, write_state
from areal_agents.learner.forward import load_model
from areal_agents.learner.lora import Lora
from areal_agents.learner.other_weights import NONE, Merges
from areal_agents.settings.lora import LoraConfig
from areal_agents.utils.files import atomic_folder, unwritable
from areal_agents.weights.publisher import master_weights

STATE = "learner.pt"


class Trained(Protocol):
    """The weights of one model, of which some or all train."""

    kind: WeightsKind
    """What ``published`` is."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return all weights by state-dict name, tied tensors under their first name alone."""
        ...

    def published(self) -> Mapping[str, Tensor]:
        """Return what engines get."""
        ...

    def as_published(self) -> AbstractContextManager[Merges]:
        """Let the model compute as an engine does that got ``published``, if it also uses the layers' merged weights.

        It is for ``probe``, which gets what the context yields.
        """
        ...

    def base(self) -> str:
        """Return a checksum of the weights that do not train, empty where all do."""
        ...

    def export(self, folder: Path, *, source: Path, dtype: torch.dtype) -> None:
        """Write a transformers folder."""
        ...

    def write(self, folder: Path, *, source: Path) -> None:
        """Write what trains, for ``read``."""
        ...

    def read(self, folder: Path) -> None:
        """Go on with what ``write`` wrote.

        Raises ModelError where it is of another model.
        """
        ...


class AllWeights:
    """A model of which every weight trains."""

    kind: WeightsKind = "full"

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def tensors(self) -> Mapping[str, Tensor]:
        return master_weights(self._model)

    def published(self) -> Mapping[str, Tensor]:
        return self.tensors()

    def as_published(self) -> AbstractContextManager[Merges]:
        return nullcontext(NONE)

    def base(self) -> str:
        return ""

    def export(self, folder: Path, *, source: Path, dtype: torch.dtype) -> None:
        write_model(folder, self.tensors(), source=source, dtype=dtype)

    def write(self, folder: Path, *, source: Path) -> None:
        self.export(folder, source=source, dtype=torch.float32)

    def read(self, folder: Path) -> None:
        read_weights(folder, self.tensors())


def load_trained(
    source: Path, device: torch.device, dtype: torch.dtype, lora: LoraConfig, seed: int, publish_adapters: bool
) -> tuple[PreTrainedModel, Trained]:
    """Load a model folder, and put adapters into it where ``lora`` has a rank.

    Weights that train are fp32. Frozen matrices that the file has in bf16 stay so where the learner computes in bf16:
    they lose nothing by it, and are half as large.

    Args:
        source: the model's folder.
        device: where it is loaded to.
        dtype: the format of the learner's products.
        lora: the adapters.
        seed: of the adapters.
        publish_adapters: whether engines get the adapters alone.

    Raises:
        ModelError: the folder is no causal language model, or has no such layers.
        ConfigError: adapters are to be published, and there are none.
    """
    if not lora.rank:
        if publish_adapters:
            raise ConfigError("publish_adapters needs learner.lora.rank, which is 0: every weight trains")
        model = load_model(source, device)
        return model, AllWeights(model)
    kept = dtype if dtype == torch.bfloat16 and is_bf16(source) else torch.float32
    model = load_model(source, device, kept)
    return model, Lora(model, model.base_model, lora, seed=seed, publish_adapters=publish_adapters)


def export_model(path: Path, trained: Trained, source: Path, dtype: torch.dtype) -> None:
    """Write a transformers folder atomically.

    Raises CheckpointError where the disk refuses.
    """
    with _written(path) as folder:
        trained.export(folder, source=source, dtype=dtype)


def save_checkpoint(
    path: Path, trained: Trained, state: Mapping[str, object], *, source: Path, also: Sequence[Callable[[Path], None]]
) -> None:
    """Write what trains and ``state``, atomically.

    Args:
        path: the checkpoint's folder.
        trained: the weights.
        state: what else there is, as ``torch.save`` takes it.
        source: the model's folder.
        also: each writes more into the folder.

    Raises:
        CheckpointError: the disk refuses.
    """
    with _written(path) as folder:
        trained.write(folder, source=source)
        for write in also:
            write(folder)
        write_state(folder / STATE, {**state, "base": trained.base()})


def read_checkpoint(
    path: Path, trained: Trained, *, first: Sequence[Callable[[Path, Mapping[str, Any]], None]]
) -> dict[str, Any]:
    """Go on with what ``save_checkpoint`` wrote, and return its state.

    Args:
        path: the checkpoint's folder.
        trained: the weights that are read into.
        first: each is called with folder and state before the weights change.

    Raises:
        ModelError: the checkpoint is absent, or of another model.
    """
    if not (path / STATE).is_file():
        raise ModelError(f"{path} holds no {STATE}: it is no checkpoint of this learner")
    state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    if trained.base() and state.get("base") and state["base"] != trained.base():
        raise ModelError(f"{path} holds adapters of another base model: the weights in model.path have changed")
    for read in first:
        read(path, state)
    trained.read(path)
    return state


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        with atomic_folder(path) as folder:
            yield folder
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(str(unwritable(path, error))) from error
