"""What a user may choose about a model's chat format, as plain data that travels to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ToolFormatName = Literal[
    "auto", "hermes", "qwen_xml", "glm", "mistral", "mistral_args", "deepseek", "deepseek_v31", "llama_json",
    "pythonic", "gemma",
]  # fmt: skip
"""The formats of ``tool_formats``, and ``auto``."""
History = Literal["append", "template"]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The choices of ``[model]`` that shape prompts. The defaults leave everything to the chat template."""

    history: Literal["auto", "append", "template"] = "auto"
    """``auto`` asks the template whether it rewrites its past."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, ``enable_thinking`` for example."""
    merge_system: bool = False
    """Put a system message into the first user message where the template knows no system role."""
    tool_format: ToolFormatName = "auto"
    """How the model writes its tool calls. ``auto`` asks the template."""
