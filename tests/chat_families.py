"""The chat templates of model families, with tokenizers made from the embedded model's.

A family's control tokens are added to the tokenizer, and ``../shared/data/chat_templates/`` has its template.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
)  # fmt: skip
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    *(f"<｜tool▁{part}▁{side}｜>" for part in ("calls", "call", "outputs", "output") for side in ("begin", "end")),
    "<｜tool▁sep｜>",
)
MISTRAL = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
COHERE = (
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The control tokens of a family: special ones, tags that its tokenizer does not call special, and three roles."""

    special: tuple[str, ...]
    bos: str | None
    eos: str
    tags: tuple[str, ...] = ()


_QWEN = Family(CHATML, None, "<|im_end|>", QWEN_TAGS)
_LLAMA = Family(LLAMA, "<|begin_of_text|>", "<|eot_id|>")
_GEMMA = Family(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>")
FAMILIES = {
    "cohere2": Family(COHERE, "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseekv3": Family(DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], ("<think>", "</think>")),
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "llama3": _LLAMA,
    "llama3_1": _LLAMA,
    "mistral_tools": Family(MISTRAL, "<s>", "</s>"),
    "phi3": Family(PHI, "<s>", "<|endoftext|>"),
    "qwen2_5": Family(CHATML, None, "<|im_end|>", QWEN_TAGS[:2]),
    "qwen2_5_vl": Family(CHATML, None, "<|im_end|>", QWEN_TAGS[:2]),
    "qwen3": _QWEN,
    "qwen3_5_nothink": _QWEN,
    "qwen3_5_think": _QWEN,
    "qwen3_instruct_2507": _QWEN,
}
"""By the name of the template's file."""
VOCABULARY = 49_280
"""Room for the embedded tokenizer and the control tokens of any family."""


@cache
def _plain(smollm2: Path) -> str:
    return str(Tokenizer.from_file(str(smollm2 / "tokenizer.json")).to_str())


def family_tokenizer(smollm2: Path, templates: Path, name: str) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a family, with its chat template."""
    family = FAMILIES[name]
    backend = Tokenizer.from_str(_plain(smollm2))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.tags])
    out = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.eos, bos_token=family.bos)
    out.chat_template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    return out


def family_model(folder: Path) -> Any:
    """Save a tiny random model that any family's tokenizer fits, and return it."""
    torch.manual_seed(5)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=4096, sliding_window=None, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
