"""The packages that only some settings need, and what to say where one is missing."""

from __future__ import annotations

import importlib.util

from areal_agents.errors import ConfigError

_INSTALL = {
    "ray": "Ray, which is not installed: pip install 'areal-agents[ray]'",
    "vllm": (
        'vLLM, which is not installed: pip install "areal-agents[vllm]" (a GPU), or see docs/engines.md for the build '
        "for processors"
    ),
    "wandb": "the wandb package, which is not installed: pip install 'areal-agents[wandb]'",
    "tensorboard": "the tensorboard package, which is not installed: pip install tensorboard",
    "reasoning_gym": "the reasoning-gym package, which is not installed: pip install 'areal-agents[reasoning-gym]'",
    "textarena": "the textarena package, which is not installed: pip install 'areal-agents[textarena]'",
    "matplotlib": "the matplotlib package, which is not installed: pip install matplotlib",
}


def require_package(name: str, what: str, instead: str = "") -> None:
    """Raise ConfigError, with the command that helps, where the package ``name`` is not installed.

    ``what`` begins the message and says who needs it. ``instead`` is what works without it.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{what} needs {_INSTALL[name]}{f', or {instead}' if instead else ''}")
