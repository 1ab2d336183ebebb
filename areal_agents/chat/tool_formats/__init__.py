"""The tool-call formats of the model families, one file each.

``detection.py`` finds the one that a chat template writes.
"""

from __future__ import annotations

from areal_agents.chat.tool_formats.base import Block, ToolFormat
from areal_agents.chat.tool_formats.deepseek import DeepSeek, DeepSeekV31
from areal_agents.chat.tool_formats.gemma import Gemma
from areal_agents.chat.tool_formats.glm import Glm
from areal_agents.chat.tool_formats.hermes import Api, Hermes
from areal_agents.chat.tool_formats.json_calls import Schemas
from areal_agents.chat.tool_formats.llama_json import LlamaJson
from areal_agents.chat.tool_formats.mistral import Mistral, MistralArgs
from areal_agents.chat.tool_formats.pythonic import Pythonic
from areal_agents.chat.tool_formats.qwen_xml import QwenXml
from areal_agents.errors import TemplateError

__all__ = ["AUTO", "DEFAULT", "FORMATS", "Block", "Schemas", "ToolFormat", "named_format", "tool_format"]

AUTO = "auto"
"""The name that leaves the choice to the template."""

FORMATS: dict[str, ToolFormat] = {
    f.name: f
    for f in (
        Hermes(),
        QwenXml(),
        Glm(),
        Mistral(),
        MistralArgs(),
        DeepSeek(),
        DeepSeekV31(),
        LlamaJson(),
        Pythonic(),
        Gemma(),
    )
}
"""By name, in the order in which a template's rendering is tried."""
DEFAULT = FORMATS["hermes"]
"""The format where a template writes none, and the notation of experts and scripts."""
_API = Api()


def tool_format(name: str) -> ToolFormat:
    """Return the format ``name``, or the one of calls that a server read itself (``api``). Raises KeyError."""
    return _API if name == _API.name else FORMATS[name]


def named_format(name: str) -> ToolFormat:
    """Return the format that a user named; ``auto`` is the default.

    Raises TemplateError for an unknown name.
    """
    if name == AUTO:
        return DEFAULT
    if name not in FORMATS:
        raise TemplateError(f"tool_format {name!r} is unknown: use {AUTO!r} or one of {', '.join(FORMATS)}")
    return FORMATS[name]
