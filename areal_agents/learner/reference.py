"""The reference policy that a KL term compares with: a frozen copy of the policy, taken when training begins.

It is the policy after the warm start, if there was one. ``algorithm.kl.refresh`` takes a new copy now and then. A
checkpoint holds the copy where it is not simply the model that the learner was made of.

Where adapters train, nothing is copied as long as the reference is the model that training began with: it is the frozen
weights, which are there. A reference that a warm start or ``refresh`` moved is a copy of the adapters alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.algorithms.regularizers import adapted, kl_estimate
from areal_agents.errors import ConfigError, ModelError
from areal_agents.learner.forward import Decoder
from areal_agents.learner.lora import Lora
from areal_agents.learner.passes import Logprobs, Passes
from areal_agents.learner.weight_copy import WeightCopy
from areal_agents.settings.kl import KlConfig

COLUMN = "reference"
"""The name of log π of the reference policy among a row's columns."""
REFERENCE = "reference.safetensors"


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the memory of a pass."""

    token_budget: int
    """Most tokens of a pack, padding included."""
    logprob_chunk: int
    """Sampled positions whose logits exist at once."""

    def passes(self, decoder: Decoder) -> Passes:
        return Passes(decoder, token_budget=self.token_budget, chunk=self.logprob_chunk)


class Reference:
    """A frozen copy of a decoder's policy.

    The weights of matrix products are kept in the format that they are computed in, so that the copy gives the very
    log-probabilities that the policy gave when it was taken.
    """

    def __init__(self, policy: Decoder, limits: Limits) -> None:
        """Take the copy of ``policy`` as it is now."""
        self._decoder = copy.copy(policy)
        self._decoder.model = copy.deepcopy(policy.model).requires_grad_(False)
        self._decoder.base = self._decoder.model.base_model
        head = self._decoder.model.get_output_embeddings()
        assert isinstance(head, nn.Linear), "as the policy's"
        self._decoder.head = head
        tied = self._decoder.model.get_input_embeddings().weight
        for module in self._decoder.model.modules():
            if isinstance(module, nn.Linear) and module.weight is not tied:
                module.to(policy.dtype)
        self._passes = limits.passes(self._decoder)

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Logprobs, int]:
        """Compute log ref of the rows' sampled tokens, and count the tokens that went through the model."""
        return self._passes.logprobs(rows, temperature)

    @torch.no_grad()
    def refresh(self, policy: Decoder) -> None:
        """Take the policy's weights as they are now."""
        self._copy(dict(policy.model.named_parameters()))

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._decoder.model.named_parameters():
            parameter.copy_(tensors[name])

    def save(self, folder: Path) -> None:
        """Write the weights into a checkpoint's folder."""
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self._decoder.model.named_parameters()}, folder / REFERENCE
        )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read the weights of ``save``. Raises ModelError where they are of another model."""
        found = load_file(folder / REFERENCE)
        own = dict(self._decoder.model.named_parameters())
        if {n: t.shape for n, t in found.items()} != {n: p.shape for n, p in own.items()}:
            raise ModelError(f"{folder / REFERENCE} is of another model")
        self._copy(found)


class AdapterReference:
    """A copy of the adapters alone, where only they train: the frozen weights below them are the policy's own.

    While it computes, the model has the copy in the place of its adapters.
    """

    def __init__(self, policy: Decoder, limits: Limits) -> None:
        """Take the copy of ``policy`` as it is now."""
        self._copied, self._passes = WeightCopy(policy.model), limits.passes(policy)

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Logprobs, int]:
        """Compute log ref of the rows' sampled tokens, and count the tokens that went through the model."""
        with self._copied.in_place():
            return self._passes.logprobs(rows, temperature)

    def refresh(self, policy: Decoder) -> None:
        """Take the adapters as they are now."""
        self._copied.move()

    def save(self, folder: Path) -> None:
        """Write the copy into a checkpoint's folder."""
        self._copied.save(folder / REFERENCE)

    def load(self, folder: Path) -> None:
        """Read the copy of ``save``. Raises ModelError where it is of other adapters."""
        self._copied.load(folder / REFERENCE)


class BaseReference:
    """The frozen weights below adapters, as long as the reference is the model that training began with.

    It holds nothing of its own.
    """

    def __init__(self, policy: Decoder, lora: Lora, limits: Limits) -> None:
        self._lora, self._passes = lora, limits.passes(policy)

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Logprobs, int]:
        """Compute log ref of the rows' sampled tokens, and count the tokens that went through the model."""
        with self._lora.disabled():
            return self._passes.logprobs(rows, temperature)


class KlToReference:
    """The divergence to a reference policy: its coefficient as it is now, and the policy, once it is needed."""

    def __init__(self, config: KlConfig, policy: Decoder, limits: Limits, *, lora: Lora | None = None) -> None:
        """Take the settings. The policy is copied at the first use, since nothing has changed it until then.

        Args:
            config: the settings.
            policy: the learner's decoder.
            limits: on memory.
            lora: the policy's adapters, where only they train.
        """
        self.coef = config.coef
        self._config, self._policy, self._limits, self._lora = config, policy, limits, lora
        self._made: Reference | AdapterReference | BaseReference | None = None
        self.moved = False
        """Whether the reference has other weights than the model that the learner was made of."""

    @property
    def in_loss(self) -> float:
        """The coefficient of the term in the loss, 0 where the rewards pay for the divergence."""
        return self.coef if self._config.place == "loss" else 0.0

    def begin_here(self) -> None:
        """Note that training begins with other weights than those that the learner was made of."""
        self.moved = self.moved or self._made is None

    @property
    def _reference(self) -> Reference | AdapterReference | BaseReference:
        self._take()
        assert self._made is not None
        return self._made

    def _take(self) -> None:
        if self._made is not None:
            return
        if self._lora is not None and not self.moved:
            self._made = BaseReference(self._policy, self._lora, self._limits)
        else:
            self._made = self._copy()

    def _copy(self) -> Reference | AdapterReference:
        return (Reference if self._lora is None else AdapterReference)(self._policy, self._limits)

    def _copied(self) -> Reference | AdapterReference:
        """Return the reference as one that has weights of its own, the policy's where it had none."""
        if self._made is None or isinstance(self._made, BaseReference):
            self._made = self._copy()
        return self._made

    def logprobs(self, batch: Batch) -> tuple[Logprobs, int]:
        """Compute log ref of every sampled token, and count the tokens that went through the model.

        Raises ConfigError where no KL term is set, so that there is no reference.
        """
        if not self._config.coef:
            raise ConfigError("there is no reference policy to ask: set algorithm.kl.coef, such as 0.001")
        return self._reference.logprobs(batch.rows, batch.temperature)

    def with_column(self, batch: Batch, live: Sequence[int]) -> tuple[Batch, int]:
        """Give the rows ``live`` their column of log ref, where there is a KL term in the loss, and count its tokens.

        Raises ValueError where the rewards should have paid for the divergence, and the reference was not asked.
        """
        if self._config.place == "reward" and self.coef and any(COLUMN not in row.columns for row in batch.rows):
            raise ValueError("the batch has no log π of the reference policy: ask ``reference`` for it first")
        if not self.in_loss:
            return batch, 0
        found, forwarded = self.logprobs(replace(batch, rows=tuple(batch.rows[i] for i in live)))
        rows = list(batch.rows)
        for i, logprobs in zip(live, found, strict=True):
            rows[i] = replace(rows[i], columns={**rows[i].columns, COLUMN: logprobs})
        return replace(batch, rows=tuple(rows)), forwarded

    def end_step(self, version: int, kl: float | None, batch: Batch, *, moved: bool) -> dict[str, float]:
        """Adapt the coefficient, take a new reference where it is due, and return the metrics.

        Args:
            version: the learner's, after the step.
            kl: the mean divergence that the term in the loss saw, nats a token. None where it saw no token.
            batch: of the step.
            moved: whether the policy was to move in it: else nothing is adapted.
        """
        c = self._config
        if not self.coef:
            return {}
        metrics = {"kl_coef": self.coef}
        if c.place == "reward" and any(row.mask.any() for row in batch.rows):
            kl = _mean(batch.rows, "k1")
            metrics |= {"kl_reference": kl, "kl_reference_k3": _mean(batch.rows, "k3")}
        if c.target is not None and kl is not None and moved:
            self.coef = adapted(self.coef, kl, target=c.target, episodes=batch.episodes, horizon=c.horizon)
        if c.refresh and version % c.refresh == 0:
            self._copied().refresh(self._policy)
            self.moved = True
        return metrics

    def save(self, folder: Path) -> None:
        """Write the reference into a checkpoint's folder, where it cannot be had from the model's own folder."""
        if self.coef and self.moved:
            self._take()
            self._copied().save(folder)

    def state(self) -> dict[str, float | bool]:
        """Return what a checkpoint holds beside the weights."""
        return {"kl_coef": self.coef, "reference_moved": self.moved}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, before the policy's own weights are read.

        Where the reference never moved it is the model that the learner was made of. Raises ConfigError where it moved
        and was not kept, because the run had no KL term then.
        """
        self.moved = bool(state.get("reference_moved", False))
        if not self.coef:
            return
        if not self.moved:
            self._take()
        elif (folder / REFERENCE).is_file():
            self._copied().load(folder)
        else:
            raise ConfigError(
                f"algorithm.kl.coef = {self.coef:g}: the run had no KL term when {folder} was written, so the policy "
                "that its training began with, after the warm start, was not kept: leave coef at 0, or begin a new run"
            )
        if self._config.target is not None and (coef := float(state.get("kl_coef", 0.0))):
            self.coef = coef


def _mean(rows: Sequence[Row], kind: Literal["k1", "k3"]) -> float:
    """Return the mean of an estimator of KL(μ‖ref) over the sampled tokens."""
    mu_T = torch.from_numpy(np.concatenate([r.logprobs[r.mask] for r in rows]))
    reference_T = torch.from_numpy(np.concatenate([r.columns[COLUMN][r.mask] for r in rows]))
    return float(kl_estimate(kind, mu_T, reference_T, mu_T).double().mean())
