"""The way from packed tokens to log-probabilities.

It never holds a whole [tokens × vocabulary], and computes no shared prefix twice.

    Pack ─▶ decoder (tree attention or padded) ─▶ hidden states ─▶ Scores, a chunk of positions at a time

Not covered: models that normalise over experts or time across rows, image inputs, KV caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from areal_agents.errors import ModelError
from areal_agents.learner.other_weights import in_fp32
from areal_agents.learner.packing import Ints, Pack, pack_rows
from areal_agents.learner.tree_attention import TREE, Tree
from areal_agents.utils.memory import trim


def load_model(source: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a local transformers folder as a model on ``device``, with its matrices in ``dtype`` and the rest in fp32.

    Raises ModelError where the folder is no such model.
    """
    if not (source / "config.json").is_file():
        raise ModelError(f"{source} is no model folder (no config.json): pull or name a local transformers model")
    logging.disable_progress_bar()  # a second's loading; the bar would stand in the middle of the run's own output
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} cannot be loaded as a causal language model: {error}") from error
    if dtype != torch.float32:
        for parameter in model.parameters():
            if parameter.ndim < 2:  # norms and biases: few, and they are computed in fp32
                parameter.data = parameter.data.float()
        # The states between layers are fp32 then, as those of an fp32 embedding.
        model.get_input_embeddings().register_forward_hook(_widen)
    model.eval()  # no dropout: π must be the policy that sampled
    loaded: PreTrainedModel = model if device is None else model.to(device)
    return loaded


class Decoder:
    """A causal language model that runs over packs.

    ``shared`` says whether it takes the tree layout. Raises ModelError where the model's logits are not
    hidden · Wᵀ (+ b) of its base model, or no finite numbers.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.device: torch.device = model.device
        self.base: nn.Module = model.base_model
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(model).__name__} has no linear output head: only causal language models are trained"
            )
        self.head = head
        self.shared = False
        # Three projections read what a norm wrote; autocast alone would cast it to bf16 for each of them.
        for module in self.base.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.register_forward_hook(_cast_under_autocast)
        with in_fp32(model):
            self._probe()
        trim()  # the fp32 copies of bf16 weights: the allocator keeps more of them than LoRA needs in a step

    def checkpoint_layers(self) -> None:
        """Keep no layer's activations from now on, so that the backward pass computes them again.

        transformers does so in training mode only, which would also switch dropout on. So the layers alone, not what
        is inside them, are set to it. Raises ModelError where the model cannot do so.
        """
        model, name = self.model, type(self.model).__name__
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"{name} has no gradient checkpointing: set learner.gradient_checkpointing = false")
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in self.base.modules():
            if getattr(module, "gradient_checkpointing", False):
                if any("dropout" in key and isinstance(p, float) and p > 0 for key, p in vars(module).items()):
                    raise ModelError(f"{name}'s layers drop out themselves: set learner.gradient_checkpointing = false")
                module.training = True

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Return bf16 autocast, or one that does nothing in fp32.

        Its cache of cast weights lives until the outermost one exits.
        """
        enabled = enabled and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def hidden(self, pack: Pack) -> Tensor:
        """Return the hidden states [N, D] of the base model's last layer, normalised."""
        ids, positions = self._put(pack.ids).view(pack.shape), self._put(pack.positions).view(pack.shape)
        if pack.segments:
            out = self.base(input_ids=ids, position_ids=positions, use_cache=False, tree=Tree(pack, self.device))
        else:
            lengths = torch.tensor([len(a) for a in pack.at], device=self.device)
            mask = positions < lengths[:, None]
            out = self.base(input_ids=ids, position_ids=positions, attention_mask=mask.long(), use_cache=False)
        states: Tensor = out.last_hidden_state
        return states.reshape(pack.tokens, -1)

    def _put(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    def _probe(self) -> None:
        """Choose the layout, after a proof on a few tokens that it gives the model's own log-probabilities.

        Raises ModelError where not even the padded layout gives them, or they are no finite numbers.
        """
        vocab = int(self.model.config.vocab_size)
        rows: list[Ints] = [np.asarray(r, np.int64) % vocab for r in ([5, 6, 7, 8, 9], [5, 6, 7, 11, 3, 2], [5, 6, 7])]
        expected = []
        with torch.no_grad():
            for row in rows:
                logits = self.model(self._put(row)[None], use_cache=False).logits[0].float()
                expected.append(torch.log_softmax(logits, -1)[:-1].gather(1, self._put(row[1:, None]))[:, 0])
        if not all(bool(torch.isfinite(e).all()) for e in expected):
            raise ModelError(_not_finite(self.model))
        if not self._agrees(rows, expected):
            raise ModelError(
                f"{type(self.model).__name__} computes its logits in a way this learner does not know (scaling, "
                "soft-capping or a second head): use a plain causal decoder such as Llama, Qwen or SmolLM"
            )
        kinds = set(getattr(self.model.config, "layer_types", None) or ["full_attention"])
        plain = self.model.config._attn_implementation
        if kinds != {"full_attention"} or not self.model._can_set_attn_implementation():
            return
        self.model.set_attn_implementation(TREE)
        self.shared = True
        try:
            self.shared = self._agrees(rows, expected)
        except (ModelError, TypeError, RuntimeError):  # sliding windows, unknown arguments, other shapes
            self.shared = False
        if not self.shared:
            self.model.set_attn_implementation(plain)

    def _agrees(self, rows: Sequence[Ints], expected: Sequence[Tensor]) -> bool:
        dtype, self.dtype = self.dtype, torch.float32
        try:
            for pack in pack_rows(rows, token_budget=64, shared=self.shared, min_shared=2):
                hidden = self.hidden(pack)
                for i, at in zip(pack.rows, pack.at, strict=True):
                    scores = Scores(hidden[at[:-1]], self.head, self._put(rows[i][1:]), 1.0, self.dtype)
                    if not torch.allclose(scores.logprobs_T, expected[i], atol=1e-3):
                        return False
        finally:
            self.dtype = dtype
        return True


def _not_finite(model: PreTrainedModel) -> str:
    """Say what is wrong with a model whose log-probabilities are no finite numbers."""
    where = model.name_or_path or type(model).__name__
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if not bad:
        return (
            f"{where} computes log-probabilities that are no finite numbers, from weights that are: its config.json "
            "does not fit them, or they are too large for fp32"
        )
    return (
        f"{where} has weights that are no finite numbers (NaN or infinite) in {len(bad)} tensors, first {bad[0]!r}: "
        "its training broke down, or the file is damaged; give an earlier checkpoint, or fetch it again"
    )


def _widen(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def _cast_under_autocast(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    kind = output.device.type
    return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output


class Scores:
    """The log-probabilities of one chunk of positions, with their backward pass.

    log π(target) = log softmax(h · Wᵀ / temperature)[target]. The softmax is kept until ``backward``, so that the
    logits are computed once. Drop the object before making the next chunk's. All of it is outside autograd, and the
    head's gradient is added to fp32 ``weight.grad`` straight from the product.
    """

    @torch.no_grad()
    def __init__(
        self, hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float, dtype: torch.dtype,
        weight: Tensor | None = None, *, entropy: bool = False,
    ) -> None:  # fmt: skip
        """Compute the log-probabilities ``logprobs_T`` [T].

        Args:
            hidden: hidden states h, [T, D].
            head: the output head, with weight W and perhaps a bias.
            targets: token ids, int [T].
            temperature: that logits are divided by.
            dtype: what the product h · Wᵀ is computed in.
            weight: the head's weight already cast to ``dtype``. None casts it here.
            entropy: compute ``entropy_T`` [T] too, −Σ_j p_j log p_j. Else it is None.
        """
        self.hidden = hidden.detach().to(dtype)
        self.head, self.targets, self.temperature = head, targets[:, None], temperature
        self.weight = head.weight.detach().to(dtype) if weight is None else weight
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = nn.functional.linear(self.hidden, self.weight, bias).float()
            if dtype != torch.float32:
                # A bf16 product rounds each logit to 8 bits. The target's own logit decides log π, so it is computed
                # again in fp32: that removes a third of the mean error of log π for the price of one row a position.
                exact = (self.hidden.float() * self.weight[targets].float()).sum(-1, keepdim=True)
                logits.scatter_(1, self.targets, exact if bias is None else exact + bias[self.targets].float())
        if temperature != 1.0:
            logits.div_(temperature)
        self.normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
        self.logits = logits
        self.logprobs_T = (logits.gather(1, self.targets) - self.normaliser)[:, 0]
        self.entropy_T: Tensor | None = None
        if entropy:
            shifted = logits - self.normaliser
            self.entropy_T = -(shifted.exp() * shifted).sum(-1)

    @torch.no_grad()
    def backward(self, grad_T: Tensor, entropy_grad_T: Tensor | None = None) -> Tensor:
        """Add to the head's gradients, and return the gradient of ``hidden``, [T, D].

        ``grad_T`` is the gradient of ``logprobs_T``, ``entropy_grad_T`` that of ``entropy_T`` H, both [T]. Uses up the
        object. dL/dlogit_j = g/temperature · (1[j = target] − p_j) − e/temperature · p_j · (log p_j + H).
        """
        g = (grad_T / self.temperature)[:, None]
        logs = self.logits.sub_(self.normaliser)
        if entropy_grad_T is None:
            grad = logs.exp_().mul_(-g)
        else:
            assert self.entropy_T is not None
            e = (entropy_grad_T / self.temperature)[:, None]
            grad = logs.exp().mul_(-g - e * (logs + self.entropy_T[:, None]))
        grad.scatter_add_(1, self.targets, g)
        if self.head.bias is not None and self.head.bias.requires_grad:
            _accumulate(self.head.bias, grad.sum(0))
        grad = grad.to(self.weight.dtype)
        if self.head.weight.requires_grad:  # a frozen one costs neither the product nor its memory
            _accumulate(self.head.weight, grad.t() @ self.hidden)
        return grad @ self.weight


def _accumulate(parameter: Tensor, grad: Tensor) -> None:
    """Add ``grad``, which nobody else holds, to the gradient."""
    if parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        parameter.grad.add_(grad)
