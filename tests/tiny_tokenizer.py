"""A byte-level BPE tokenizer made in memory, and the chat templates that the token rules are tested on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SMOLLM2 = Path.home() / ".cache" / "areal-agents" / "models" / "smollm2"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # as Qwen3: thinking is dropped from the turns before the last user message
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_TOOL_ROLE = (  # as Llama 2 and Mistral: roles alternate, and `tool` is unknown
    "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('unknown role tool') }}{% endif %}{% if m.role == ns.last %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.last = m.role %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + (
    NO_TOOL_ROLE  # as Gemma
)
DROPS_SYSTEM = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")  # as Mistral
SWITCH = CHATML.replace(  # as Qwen3
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}",
)
WRITES_CALLS = (  # as Hermes
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTOOLS ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + WRITES_CALLS
)
NO_TURN_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
)
OPENS_THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")

CORPUS = ('the quick brown fox jumps over the lazy dog\n\n <tool_call> {"name": "calc", "arguments": {}} \n',) * 40


@cache
def _backend(special: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        token = AddedToken(text, special=special, normalized=False)
        _ = tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
    return str(tokenizer.to_str())


def tiny(template: str = CHATML, *, special: bool = True, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of about 400 tokens. ``special=False``: its control tokens are ordinary added tokens."""
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if special else {}
    out = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_backend(special)), **names, **kwargs)
    out.chat_template = template
    return out
