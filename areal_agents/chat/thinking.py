"""The thoughts in a model's text: what stands between ``<think>`` and ``</think>``."""

from __future__ import annotations

THINK, UNTHINK = "<think>", "</think>"


def thought_is_open(text: str, *, opened: bool = False) -> bool:
    """Say whether ``text`` ends inside a thought.

    ``opened`` says that the thought had begun before the text, in the prompt.
    """
    begun, ended = text.rfind(THINK), text.rfind(UNTHINK)
    return begun > ended or (opened and begun == ended == -1)
