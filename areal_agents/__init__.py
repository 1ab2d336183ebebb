"""AReaL Agents: an agentic multi-turn RL gym and trainer for language models.

The names below are the public interface. They are imported at first use, so that ``import areal_agents`` stays light.
The environments that come with the package are registered at once, by name, so that ``gymnasium.make`` knows them:

    import areal_agents, gymnasium
    env = gymnasium.make("areal/Arithmetic-v0")

Training and evaluation are async functions, for ``asyncio.run`` in a script and ``await`` in a notebook:

    config = areal_agents.TrainConfig(steps=20)
    result = asyncio.run(areal_agents.train(config))
    report = asyncio.run(areal_agents.evaluate("areal/Arithmetic-v0", model=result.model, n=64))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from areal_agents.utils.openmp import sleep_at_barriers

sleep_at_barriers()  # before anything can load torch

if TYPE_CHECKING:
    from areal_agents.env import AgentEnv, LazyTasks
    from areal_agents.evaluation.evaluate import evaluate
    from areal_agents.group_reward import GroupReward
    from areal_agents.process_env import TextProcessEnv
    from areal_agents.registry import EnvSpec, make, register, spec, specs
    from areal_agents.reward import (
        Episode,
        Gate,
        Reward,
        Verdict,
        WeightedSum,
        boxed,
        boxed_number,
        number,
        sole_boxed,
    )
    from areal_agents.rewards.plain_function import reward_function
    from areal_agents.sandbox import Sandbox, SandboxBackend, SandboxSpec
    from areal_agents.settings.config import TrainConfig
    from areal_agents.spaces import ChatSpace, TextSpace
    from areal_agents.tool import ToolError, ToolResult, ToolSpec, tool
    from areal_agents.toolenv import ToolEnv
    from areal_agents.trainer.loop import train
    from areal_agents.types import AssistantMessage, Message, Task, ToolCall

_HOMES = {
    "areal_agents.env": ("AgentEnv", "LazyTasks"),
    "areal_agents.evaluation.evaluate": ("evaluate",),
    "areal_agents.group_reward": ("GroupReward",),
    "areal_agents.process_env": ("TextProcessEnv",),
    "areal_agents.registry": ("EnvSpec", "make", "register", "spec", "specs"),
    "areal_agents.reward": (
        "Episode", "Gate", "Reward", "Verdict", "WeightedSum", "boxed", "boxed_number", "number", "sole_boxed",
    ),
    "areal_agents.rewards.plain_function": ("reward_function",),
    "areal_agents.sandbox": ("Sandbox", "SandboxBackend", "SandboxSpec"),
    "areal_agents.settings.config": ("TrainConfig",),
    "areal_agents.spaces": ("ChatSpace", "TextSpace"),
    "areal_agents.toolenv": ("ToolEnv",),
    "areal_agents.trainer.loop": ("train",),
    "areal_agents.types": ("AssistantMessage", "Message", "Task", "ToolCall"),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

# Registers names alone; an environment's module is imported by ``make``. Gymnasium takes 0.05 s beside numpy.
from areal_agents import envs as envs  # noqa: E402

# The decorator shares its name with its module. Importing a submodule binds the module to that name here, after
# which `__getattr__` would no longer be asked: this import is done at once and the name is bound to the decorator.
from areal_agents.tool import ToolError, ToolResult, ToolSpec, tool  # noqa: E402

__all__ = [
    "AgentEnv",
    "AssistantMessage",
    "ChatSpace",
    "EnvSpec",
    "Episode",
    "Gate",
    "GroupReward",
    "LazyTasks",
    "Message",
    "Reward",
    "Sandbox",
    "SandboxBackend",
    "SandboxSpec",
    "Task",
    "TextProcessEnv",
    "TextSpace",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "ToolResult",
    "ToolSpec",
    "TrainConfig",
    "Verdict",
    "WeightedSum",
    "boxed",
    "boxed_number",
    "evaluate",
    "make",
    "number",
    "register",
    "reward_function",
    "sole_boxed",
    "spec",
    "specs",
    "tool",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'areal_agents' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
