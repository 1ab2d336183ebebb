"""The critic: V of everything before a sampled token, read off the hidden state that predicts the token.

    kind = "trunk"    the policy's decoder ─▶ hidden state h ─▶ V = h·w + b, one more linear head
    kind = "own"      a decoder of its own, which starts as the policy does (behind the warm start, if there is one),
                      with such a head in place of its logits

The head starts at 0, so V = 0 at first. V is computed in fp32 whatever the trunk computes in, and without logits.
A ``trunk`` critic learns inside the policy's own pass. It goes through the model by itself only where the policy does
not learn. The value loss reaches the policy's layers where ``algorithm.critic.coefficient`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.algorithms.critic_targets import explained_variance, value_loss
from areal_agents.algorithms.objective import Tokens
from areal_agents.errors import ModelError
from areal_agents.learner.forward import Decoder, load_model
from areal_agents.learner.optim import adamw
from areal_agents.learner.passes import Passes
from areal_agents.settings.config import LearnerConfig
from areal_agents.settings.critic import CriticConfig

Values = list[NDArray[np.float32]]
"""For each row, [T]: V before the token where the row's mask is True, else 0."""
COLUMNS = ("values", "returns", "fitted")
"""What a critic learns from, of ``Row.columns`` (``critic_targets.target_columns``)."""


@dataclass
class _Seen:
    """The figures of one step."""

    loss: float = 0.0
    minibatches: int = 0
    clipped: float = 0.0
    fitted: float = 0.0
    norms: list[float] = field(default_factory=list)
    skipped: int = 0


class Critic:
    """A critic with its optimizer. All its work is done in the learner's thread."""

    def __init__(
        self, config: CriticConfig, learner: LearnerConfig, policy: Decoder, source: Path, *,
        before_pack: Callable[[], None],
    ) -> None:  # fmt: skip
        """Make the head, and for ``own`` load the second model.

        Args:
            config: the settings, whose kind is not ``none``.
            learner: the settings of the learner, whose limits on memory and whose AdamW are this one's too.
            policy: the policy's model.
            source: the folder that it was loaded from.
            before_pack: called before each pass.
        """
        self.config = config
        self.shares = config.kind == "trunk"
        """Whether it learns inside the policy's pass."""
        self._decoder = policy if self.shares else _decoder_like(policy, source, learner)
        self.head = nn.Linear(policy.head.in_features, 1, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.shares:
            self.module: nn.Module = self.head
            """What belongs to it alone."""
        else:
            self._decoder.model.set_output_embeddings(self.head)  # the logits' own weights are freed
            self._decoder.head = self.head
            self.module = self._decoder.model
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._passes = Passes(
            self._decoder, token_budget=learner.token_budget, chunk=learner.logprob_chunk, before_pack=before_pack
        )
        self._optimizer = adamw(
            self.module, lr=config.rate, weight_decay=learner.weight_decay, betas=learner.betas, eps=learner.eps
        )
        self._seen, self._count = _Seen(), 0
        self._targets: dict[str, Tensor] = {}

    @classmethod
    def of(
        cls, config: CriticConfig, learner: LearnerConfig, policy: Decoder, source: Path, *,
        before_pack: Callable[[], None],
    ) -> Self | None:  # fmt: skip
        """Make what ``config`` asks for, with the arguments of ``__init__``: None of kind ``none``."""
        return None if config.kind == "none" else cls(config, learner, policy, source, before_pack=before_pack)

    @torch.no_grad()
    def begin_as(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the policy's weights by state-dict name for the layers of one's own, before anything was learned."""
        if self.shares:
            return
        head = {id(p) for p in self.head.parameters()}
        for name, parameter in self.module.named_parameters():
            if id(parameter) not in head:
                parameter.copy_(tensors[name])

    def alone(self, version: int) -> bool:
        """Say whether only the critic learns at ``version``."""
        return version < self.config.warmup_steps

    @torch.no_grad()
    def values(self, rows: Sequence[Row]) -> Values:
        """Compute V before each sampled token of ``rows``."""
        out: Values = [np.zeros(len(r), np.float32) for r in rows]
        with self._decoder.autocast():  # its own context: weights cast without a graph must not serve a later backward
            for pack, states in self._passes.states(rows):
                found = self._of(states).cpu().numpy()
                start = 0
                for i in pack.rows:
                    stop = start + int(rows[i].mask.sum())
                    out[i][rows[i].mask] = found[start:stop]
                    start = stop
        return out

    def start(self, batch: Batch) -> None:
        """Begin a step. Raises ValueError for a batch that was made without values."""
        if missing := sorted({name for name in COLUMNS for row in batch.rows if name not in row.columns}):
            raise ValueError(f"the critic has nothing to learn from: the batch's rows lack {', '.join(missing)}")
        self._seen = _Seen()
        masks = [r.mask & (r.columns["fitted"] > 0) for r in batch.rows]
        for name in ("values", "returns"):
            parts = [r.columns[name][fitted] for r, fitted in zip(batch.rows, masks, strict=True)]
            self._targets[name] = torch.from_numpy(np.concatenate([*parts, np.zeros(0, np.float32)]))

    def minibatch(self, rows: Sequence[Row], *, inside: bool) -> int:
        """Begin a minibatch, and learn from it unless that comes ``inside`` the policy's pass, by ``beside``.

        Returns the tokens that went through the model.
        """
        self._count = sum(int((r.columns["fitted"][r.mask] > 0).sum()) for r in rows)
        if inside or not self._count:
            return 0
        forwarded, d = 0, self._decoder
        with d.autocast(), torch.set_grad_enabled(not self.shares):
            for pack, states in self._passes.states(rows):
                grad = self.beside(states.detach(), Tokens.of([rows[i] for i in pack.rows], None))
                if not self.shares and grad is not None:
                    with d.autocast(False):
                        states.backward(grad)  # type: ignore[no-untyped-call]
                forwarded += pack.tokens
        self.apply()
        return forwarded

    def beside(self, states: Tensor, tokens: Tokens) -> Tensor | None:
        """Add the value loss's gradient to the head, and return what it adds to that of ``states``, [T, D].

        ``states`` are the hidden states before ``tokens``, detached. None is nothing.
        """
        passes_on = not self.shares or self.config.coefficient > 0
        leaf = states.float().requires_grad_(passes_on)
        to = {name: tokens.columns[name].to(states.device) for name in COLUMNS}
        with torch.enable_grad():
            terms = value_loss(self._of(leaf), to["values"], to["returns"], clip=self.config.value_clip)
            loss = (terms.loss_T * to["fitted"]).sum() / max(self._count, 1)
            loss.backward()  # type: ignore[no-untyped-call]
        self._seen.loss += float(loss.detach())
        self._seen.clipped += float((terms.clipped_T * to["fitted"]).sum())
        self._seen.fitted += float(to["fitted"].sum())
        if leaf.grad is None:
            return None
        return (leaf.grad * (self.config.coefficient if self.shares else 1.0)).to(states.dtype)

    def apply(self) -> None:
        """End a minibatch: clip the gradient, and take a step unless it is 0 or not finite."""
        if not self._count:
            return
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip))
        if math.isfinite(norm) and norm > 0.0:
            self._optimizer.step()
        self.zero_grad()
        self._seen.minibatches += 1
        self._seen.skipped += not math.isfinite(norm)
        self._seen.norms += [norm] if math.isfinite(norm) else []

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def metrics(self) -> dict[str, float]:
        """Return the figures of the step."""
        seen, values_T, returns_T = self._seen, self._targets["values"], self._targets["returns"]
        found = {
            "loss": seen.loss / max(seen.minibatches, 1),
            "clip_fraction": seen.clipped / max(seen.fitted, 1.0),
            "lr": self.config.rate,
            "grad_norm": float(np.mean(seen.norms)) if seen.norms else 0.0,
            "skipped": float(seen.skipped),
            "fitted": float(len(values_T)),
        }
        if len(values_T):
            found |= {"value": float(values_T.mean()), "return": float(returns_T.mean())}
        explained = explained_variance(values_T, returns_T)
        if explained is not None:
            found["explained_variance"] = explained
        return {f"critic/{name}": value for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "kind": self.config.kind, "model": self.module.state_dict(), "optimizer": self._optimizer.state_dict(),
        }  # fmt: skip

    def load(self, state: Mapping[str, Any] | None, *, version: int) -> None:
        """Go on from ``state`` of a checkpoint at ``version``.

        At version 0 no critic has learned anything, so one of another kind is left out. Else that is a ModelError.
        """
        kind = None if state is None else state["kind"]
        if state is not None and kind == self.config.kind:
            self.module.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
        elif version:
            held = f"a critic of kind {kind!r}" if kind else "no critic"
            raise ModelError(
                f"the checkpoint of version {version} holds {held}, but algorithm.critic.kind = {self.config.kind!r}: "
                "go on with the settings that it was made with"
            )

    def _of(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.head(states.float())[:, 0]
        return values


def _decoder_like(policy: Decoder, source: Path, learner: LearnerConfig) -> Decoder:
    decoder = Decoder(load_model(source, policy.device), policy.dtype)
    if learner.gradient_checkpointing:
        decoder.checkpoint_layers()
    return decoder
