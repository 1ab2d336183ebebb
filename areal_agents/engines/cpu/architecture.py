"""The model families that the decoder computes, with their shape, parameter names and rotary tables.

All of it is read from transformers. A ``Shape`` is a plain value: a process that has transformers reads it, and the
engine's worker starts without transformers, three times sooner.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal_agents.engines.positions import positions_of
from areal_agents.errors import EngineError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED = {
    "llama": ("transformers.models.llama.modeling_llama", "LlamaRotaryEmbedding"),
    "mistral": ("transformers.models.mistral.modeling_mistral", "MistralRotaryEmbedding"),
    "qwen2": ("transformers.models.qwen2.modeling_qwen2", "Qwen2RotaryEmbedding"),
    "qwen3": ("transformers.models.qwen3.modeling_qwen3", "Qwen3RotaryEmbedding"),
}
_LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one model.

    ``parameters`` maps every parameter's name to its shape.
    """

    family: str
    """transformers' ``model_type``."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    eps: float
    tied: bool
    qk_norm: bool
    parameters: Mapping[str, tuple[int, ...]]
    frequencies: tuple[float, ...]
    """[head_dim / 2]: the rotary embedding's, in radians a position."""
    rotary_scale: float
    """The factor of its cos and sin."""

    @classmethod
    def read(cls, model: str | Path, max_context: int) -> Shape:
        """Read the shape of the model in a folder or of a hub id.

        Raises ModelError where there is no model, or none that the decoder computes.
        """
        import transformers  # seconds: only who reads a shape pays for it

        try:
            config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
            return cls.of(config, max_context)
        except ModelError:
            raise
        except Exception as error:  # boundary: transformers raises errors of any type for a broken configuration
            raise ModelError(f"{model} cannot be read as a model: {type(error).__name__}: {error}") from error

    @classmethod
    def of(cls, config: Any, max_context: int) -> Shape:
        """Read the shape from a transformers config.

        Raises ModelError where the decoder would compute something else.
        """
        _refuse_unsupported(config, max_context)
        module, name = SUPPORTED[config.model_type]
        rotary = getattr(importlib.import_module(module), name)(config=config)
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            family=config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=config.vocab_size,
            positions=_positions(config),
            eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qk_norm=config.model_type == "qwen3",
            parameters=_parameters(config, heads, kv_heads, head_dim),
            frequencies=tuple(rotary.inv_freq.tolist()),
            rotary_scale=float(rotary.attention_scaling),
        )

    def complete(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``tensors`` with both names of tied embeddings.

        Raises EngineError where names or shapes do not fit.
        """
        out = dict(tensors)
        if self.tied:
            shared = out.get("model.embed_tokens.weight", out.get("lm_head.weight"))
            if shared is not None:
                out["model.embed_tokens.weight"] = out["lm_head.weight"] = shared
        missing = sorted(self.parameters.keys() - out.keys())
        unknown = sorted(out.keys() - self.parameters.keys())
        if missing or unknown:
            raise EngineError(
                f"weights do not fit the served {self.family} model: "
                f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
            )
        for name, shape in self.parameters.items():
            if tuple(out[name].shape) != shape:
                raise EngineError(f"weights do not fit: {name} is {tuple(out[name].shape)}, expected {shape}")
        return out

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin for positions 0..length-1, each [length, heads + kv heads, head_dim], float32.

        The entries of query heads carry the attention scale. sin carries the sign of rotate-half, so that rotating is
        x·cos + roll(x, head_dim/2)·sin.
        """
        import numpy as np
        import torch

        # The angles as transformers rounds them. Not torch's cos: on processors, a thread's first call of it is now and
        # then off by 1e-4 (seen where two threads share it), and these tables are used for as long as the engine lives.
        angles = np.arange(length, dtype=np.float32)[:, None] * np.array(self.frequencies, np.float32)
        angles = np.concatenate([angles, angles], -1).astype(np.float64)
        cos, sin = (torch.from_numpy((f(angles) * self.rotary_scale).astype(np.float32)) for f in (np.cos, np.sin))
        half = self.head_dim // 2
        sin = torch.cat([-sin[:, :half], sin[:, half:]], -1)
        scale = torch.ones(self.heads + self.kv_heads, 1)
        scale[: self.heads] = self.head_dim**-0.5
        return cos[:, None] * scale, sin[:, None] * scale


def _positions(config: Any) -> int:
    return positions_of(config.to_dict()) or int(config.max_position_embeddings)


def _parameters(config: Any, heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters' names and shapes as transformers has them."""
    qk_norm = config.model_type == "qwen3"
    attention_bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, out in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            names[f"{layer}.self_attn.{name}.weight"] = (out * head_dim, hidden)
            if attention_bias:
                names[f"{layer}.self_attn.{name}.bias"] = (out * head_dim,)
        names[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        if attention_bias and config.model_type != "qwen2":
            names[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        if qk_norm:
            names[f"{layer}.self_attn.q_norm.weight"] = (head_dim,)
            names[f"{layer}.self_attn.k_norm.weight"] = (head_dim,)
        for name, size in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            names[f"{layer}.mlp.{name}.weight"] = size
            if getattr(config, "mlp_bias", False):
                names[f"{layer}.mlp.{name}.bias"] = size[:1]
        names[f"{layer}.input_layernorm.weight"] = (hidden,)
        names[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    names["model.norm.weight"] = (hidden,)
    names["lm_head.weight"] = (vocabulary, hidden)
    return names


def _refuse_unsupported(config: Any, max_context: int) -> None:
    kind = config.model_type
    if kind not in SUPPORTED:
        raise ModelError(
            f"the transformers engine computes {', '.join(SUPPORTED)} models, not {kind!r}: use another model or engine"
        )
    if config.hidden_act != "silu":
        raise ModelError(
            f"the transformers engine computes silu activations, this {kind} model has {config.hidden_act}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"the transformers engine does not compute rotary embeddings of this kind: {rope}")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or kind == "mistral"
    if sliding and window is not None and window < min(max_context, _positions(config)):
        raise ModelError(
            f"the model attends to a sliding window of {window} tokens, which the engine does not compute: "
            f"set max_context (now {max_context}) to {window} or less"
        )
