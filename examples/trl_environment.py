"""Train on one of our environments with TRL's GRPOTrainer, which makes it by ``environment_factory`` (TRL 1.16).

    python examples/trl_environment.py areal/Nim-v0 --model ~/.cache/areal-agents/models/smollm2 --steps 2

TRL calls ``reset(**row)``, offers every other public method to the model as a tool by its type hints and docstring, and
runs each call of a message by itself: each is a turn here. It never shows the environment what a model says without
calls. So ``score``, a reward function, gives the last message to the environment as its final answer.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from areal_agents import registry
from areal_agents.chat.message_json import messages_to_json
from areal_agents.env import AgentEnv
from areal_agents.tool import ToolSpec, call_text
from areal_agents.types import Task
from areal_agents.utils.sync import run_sync

TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
OVER = "The episode is over."


def trl_environment(env_id: str, *, split: str = "train", difficulty: float | None = None, **kwargs: Any) -> type[Any]:
    """Make a class for ``environment_factory``, with a method for each of the environment's tools.

    Args:
        env_id: of an environment whose tasks are done by tools, an answer at the end or both.
        split: whose tasks the rows of ``rows`` name.
        difficulty: of the tasks.
        kwargs: arguments of the environment.

    Raises:
        ValueError: the environment has no tools, so that TRL would play one turn, whatever the environment
            wants, or other ones for each task, or tools whose names TRL takes for something else.
    """
    spec = registry.spec(env_id).with_kwargs(kwargs)
    tasks = spec.tasks(split, difficulty=difficulty)
    made = spec.make()
    tools = list(made.tools)
    if not tools and type(made).tools_of is not AgentEnv.tools_of:
        raise ValueError(f"{env_id} has other tools for each task, and TRL asks for them before there is a task")
    if not tools:
        raise ValueError(f"{env_id} has no tools: TRL's environments are played by tools alone")
    taken = [t.name for t in tools if t.name in ("reset", "get_reward") or t.name.startswith("_")]
    if taken:
        raise ValueError(f"{env_id}: TRL takes the tools {', '.join(taken)} for something else: rename them")

    class Environment:
        """One rollout at a time of an environment."""

        def __init__(self) -> None:
            self._env = spec.make()
            self._total, self._over = 0.0, True

        def reset(self, task: int, **_: Any) -> None:
            """Begin the task of a row, whose prompt shows it already."""
            self._env.reset(seed=0, options={"task": tasks[task]})
            self._total, self._over = 0.0, False

        def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
            return OVER if self._over else self._step(call_text(name, **arguments))

        def _step(self, text: str) -> str:
            observation, reward, terminated, truncated, _ = self._env.step(text)
            self._total += float(reward)
            self._over = terminated or truncated
            return "\n".join(m.text for m in observation) or OVER

        def _finish(self, answer: str) -> float:
            """Give the last message, and return what the episode has earned."""
            if not self._over:
                self._step(answer)
            if not self._over:  # the message had a call that TRL did not see
                self._total += run_sync(self._env.afinish("max_turns"))[0]
                self._over = True
            return self._total

    for tool in tools:
        setattr(Environment, tool.name, _method(tool))
    Environment.__name__ = Environment.__qualname__ = type(made).__name__
    return Environment


def rows(env_id: str, count: int, *, split: str = "train", difficulty: float | None = None, **kwargs: Any) -> list[Any]:
    """Return the first tasks as rows of TRL's dataset: what the environment shows first, and the task's number."""
    spec = registry.spec(env_id).with_kwargs(kwargs)
    tasks: Sequence[Task] = spec.tasks(split, difficulty=difficulty)
    env = spec.make()
    found = []
    for i in range(min(count, len(tasks))):
        shown, _ = env.reset(seed=0, options={"task": tasks[i]})
        found.append({"prompt": messages_to_json(shown), "task": i})
    env.close()
    return found


def score(completions: Sequence[Any], environments: Sequence[Any], **_: Any) -> list[float]:
    """Return what the episodes earned: TRL's reward function for ``trl_environment``."""
    return [
        env._finish(str(said[-1].get("content") or "") if said and said[-1]["role"] == "assistant" else "")
        for said, env in zip(completions, environments, strict=True)
    ]


def _method(tool: ToolSpec) -> Any:
    """Write a tool as a method with the type hints and the docstring that TRL reads."""
    properties: Mapping[str, Any] = tool.parameters.get("properties", {})
    required = tool.parameters.get("required", [])
    hints = {name: _hint(schema) for name, schema in properties.items()}

    def method(self: Any, **arguments: Any) -> str:
        return str(self._call(tool.name, arguments))

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hint,
            default=inspect.Parameter.empty if name in required else properties[name].get("default"),
        )
        for name, hint in hints.items()
    ]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    told = {name: " ".join(str(properties[name].get("description", f"the {name}")).split()) for name in hints}
    lines = [f"    {name}: {text}" for name, text in told.items()]
    method.__name__ = method.__qualname__ = tool.name
    method.__signature__ = inspect.Signature([itself, *parameters], return_annotation=str)  # type: ignore[attr-defined]
    method.__annotations__ = {**hints, "return": str}
    method.__doc__ = "\n".join(
        [tool.description, "", *(["Args:", *lines, ""] if lines else []), "Returns:", "    what it says"]
    )
    return method


def _hint(schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    return TYPES.get(str(schema.get("type")), Any)


def main() -> None:
    """Train for a few steps."""
    import datasets
    import trl  # pip install trl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("env", nargs="?", default="areal/Nim-v0")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    config = trl.GRPOConfig(
        output_dir="trl-run", max_steps=given.steps, per_device_train_batch_size=4, num_generations=4, use_cpu=True,
        max_completion_length=256, max_tool_calling_iterations=8, report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=given.model,
        reward_funcs=score,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows(given.env, 64)),
        environment_factory=trl_environment(given.env),
    )
    trainer.train()


if __name__ == "__main__":
    main()
