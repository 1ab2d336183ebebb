"""Tiny random models of the supported families, saved as transformers folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tiny_tokenizer import CHATML, tiny

VOCABULARY = 96
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def tiny_config(kind: str = "llama", **changes: Any) -> Any:
    """A config of about 0.1M parameters; ``initializer_range`` is large so that distributions are peaked."""
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    size = _SIZE | ({"sliding_window": None} if kind == "mistral" else {})
    if kind == "qwen2":
        size = {name: value for name, value in size.items() if name != "head_dim"} | {"hidden_size": 96}
    return classes[kind](**(size | {"tie_word_embeddings": False} | changes))


def tiny_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model in eval mode, biases and norms included."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def vllm_model(kind: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A ``tiny_model`` that vLLM can serve: its attention needs heads of at least 32.

    It has layers enough to take a while: a turn of 200 tokens can be met in its middle.
    """
    size = {
        "max_position_embeddings": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    return tiny_model(kind, seed=seed, **(size | {"initializer_range": 0.12} | changes))


def save_tiny(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def settled(compute: Callable[[], Tensor]) -> Tensor:
    """What two passes in a row agree on, to the bit.

    torch's very first pass in a process is now and then off by 1e-3 in fp32 (in 7 of 46 runs of pytest on two cores,
    and no later pass): a reference must not be the one that errs.
    """
    result = compute()
    for _ in range(5):
        before, result = result, compute()
        if torch.equal(before, result):
            return result
    raise AssertionError("torch computes something else each time")


@torch.no_grad()
def forward_logits(model: Any, ids: tuple[int, ...]) -> Tensor:
    """[len(ids), vocabulary]: from one full forward pass of transformers."""
    return settled(lambda: model(torch.tensor([ids])).logits[0].float())


@torch.no_grad()
def forward_logprobs(model: Any, ids: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """[len(ids) - 1]: log-probability of each id after the first, from one full forward pass of transformers."""
    logits = forward_logits(model, ids)[:-1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@torch.no_grad()
def segmented_logits(segments: Iterable[tuple[Any, Sequence[int]]]) -> Tensor:
    """[ids of all segments, vocabulary]: each segment's model continues on the KV that those before it wrote.

    The cache is the fourth positional argument: its keyword differs between releases of transformers.
    """
    parts = [(model, torch.tensor([ids])) for model, ids in segments if ids]

    def passes() -> Tensor:
        cache = transformers.DynamicCache()
        return torch.cat([model(ids, None, None, cache, use_cache=True).logits[0].float() for model, ids in parts])

    return settled(passes)


def segmented_logprobs(segments: Sequence[tuple[Any, tuple[int, ...]]]) -> Tensor:
    """``forward_logprobs`` of all segments' ids from ``segmented_logits``."""
    logits = segmented_logits(segments)[:-1]
    ids = torch.tensor([i for _, part in segments for i in part])
    return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[:, 0]


def tiny_chat_model(folder: Path, *, seed: int = 0) -> Path:
    """A folder that can be trained: near-uniform random Llama weights and the in-memory tokenizer."""
    torch.manual_seed(seed)
    tokenizer = tiny(CHATML)
    end = tokenizer.eos_token_id
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    save_tiny(folder, transformers.LlamaForCausalLM(config))
    tokenizer.save_pretrained(folder)
    return folder
