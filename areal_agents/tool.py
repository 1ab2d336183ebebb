"""The tool contract: a typed function becomes a JSON schema, and only checked arguments reach it.

    @tool(timeout=5)
    async def python(code: str, *, sandbox: Sandbox) -> str:
        \"\"\"Run Python code and return what it prints.\"\"\"
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolSpec:
    """placeholder signature: replaced by the env/tool author"""
    name: str
    description: str
    parameters: Mapping[str, Any]
