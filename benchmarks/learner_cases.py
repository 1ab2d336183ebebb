"""The episodes that the sides of ``benchmarks/learner.py`` are given, and the small models that some parts use.

Tokens are pieces of the project's own pages: what a step costs depends on how many there are, and not on which, but a
language model's bf16 gradient at tokens drawn at random is mostly rounding. All prompts of a case have one length and
all completions another, so that nobody pads. Advantages are those of GRPO for rewards 0 and 1 in turns, ±1 where a
group is even, so every row has a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST = 100
"""Smaller ids may be control tokens."""


@dataclass(frozen=True)
class Case:
    prompt: int
    completion: int
    group: int
    rows: int = 16

    @property
    def name(self) -> str:
        return f"{self.prompt} + {self.completion}, G = {self.group}"


LENGTHS = ((64, 64), (160, 40), (320, 80))
CASES = tuple(Case(*length, group) for group in (4, 8) for length in LENGTHS)
LONG = CASES[-1]
QUICK = Case(160, 40, 8, rows=8)
VOCABULARIES = (8192, 32_768, 131_072)


def advantages(group: int) -> list[float]:
    return [1.0 if i % 2 else -1.0 for i in range(group)]


def text_tokens(model: str | Path) -> list[int]:
    """Return the tokens of the pages in docs/, in the order of their names."""
    from transformers import AutoTokenizer

    pages = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
    # a page each: some tokenizers warn of texts longer than a model's positions
    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=10**9)
    return [token for page in pages for token in tokenizer.encode(page.read_text(), add_special_tokens=False)]


def random_tokens(vocabulary: int) -> list[int]:
    """Return tokens for a model that has no language."""
    draw = random.Random(vocabulary)
    return [draw.randrange(FIRST, vocabulary) for _ in range(10_000)]


def episodes(case: Case, tokens: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Return the groups of a case, each a prompt and its completions with an advantage each, pieces of ``tokens``."""
    draw = random.Random(f"{case.name}/{seed}")

    def ids(n: int) -> list[int]:
        start = draw.randrange(len(tokens) - n)
        return list(tokens[start : start + n])

    def group() -> dict[str, Any]:
        completions = [ids(case.completion) for _ in range(case.group)]
        return {"prompt": ids(case.prompt), "completions": completions, "advantages": advantages(case.group)}

    return [group() for _ in range(case.rows // case.group)]


def ragged(vocabulary: int) -> list[dict[str, Any]]:
    """Return two groups of four of several lengths, for the comparison of gradients."""
    draw = random.Random("ragged")
    return [
        {
            "prompt": [draw.randrange(FIRST, vocabulary) for _ in range(prompt)],
            "completions": [[draw.randrange(FIRST, vocabulary) for _ in range(n)] for n in lengths],
            "advantages": [-1.5, 0.5, 0.25, 0.75],
        }
        for prompt, lengths in ((40, (3, 20, 31, 12)), (25, (32, 7, 18, 5)))
    ]


def tiny_model(folder: Path, vocabulary: int) -> Path:
    """Write a random Llama of four small layers, the same for the same vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    path = folder / f"vocabulary-{vocabulary}"
    LlamaForCausalLM(config).save_pretrained(path)
    return path
