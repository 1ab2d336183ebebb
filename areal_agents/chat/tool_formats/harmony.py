"""gpt-oss's harmony, which is recognised and refused.

A harmony turn is several messages on channels (analysis, commentary, final). A call is one of them, addressed to a
tool, and ends with ``<|call|>``. Here a turn is one message of one text.
"""

from __future__ import annotations

MARKS = ("<|channel|>", "<|message|>")
REFUSAL = (
    "the template writes gpt-oss's harmony, whose turn is several messages on channels: this gym keeps one message a "
    "turn, so such a model cannot be trained here. Evaluate it behind a server that reads harmony "
    "(--model openai:NAME --url URL), or train a model of another family"
)


def is_harmony(template: str) -> bool:
    """Say whether a template's source writes harmony."""
    return all(mark in template for mark in MARKS)
