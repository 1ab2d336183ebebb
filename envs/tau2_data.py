"""The tasks of tau2-bench: rows and the package's own splits, and how the end of a talk is graded."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from areal_agents.envs.tau2_world import PACKAGE, World
from areal_agents.errors import ConfigError
from areal_agents.types import Task

SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "airline": ("train", "test"),
    "retail": ("train", "test"),
    "telecom": ("train", "small", "test"),
}
"""The package's splits that share no task. It has others, which are made of these."""
BASIS: Final = ("DB", "COMMUNICATE")
"""What a task is graded by where its row does not say."""
Parts = dict[str, float]


@functools.cache
def domain_tasks(domain: str, split: str) -> tuple[Task, ...]:
    """Return the tasks of a split.

    Raises ConfigError where there is no such split, and where the package is missing.
    """
    if split not in SPLITS[domain]:
        also = "; base, full and the like share tasks with them" if split in ("base", "full") else ""
        raise ConfigError(f"tau2's {domain} has no split {split!r} here: there are {', '.join(SPLITS[domain])}{also}")
    rows, splits = _read(domain)
    wanted = set(splits[split])
    return tuple(
        Task.make(f"{domain}-{row['id']}", split=split, seed=number, payload={"domain": domain, "row": row})
        for number, row in enumerate(rows)
        if row["id"] in wanted
    )


@functools.cache
def _read(domain: str) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, Sequence[str]]]:
    PACKAGE.require(f"tau2's {domain}")
    folder = importlib.resources.files("tau2") / "data" / "tau2" / "domains" / domain
    rows = json.loads((folder / "tasks.json").read_text("utf-8"))
    splits = json.loads((folder / "split_tasks.json").read_text("utf-8"))
    used = {id for name in SPLITS[domain] for id in splits[name]}
    return [row for row in (rows["tasks"] if isinstance(rows, dict) else rows) if row["id"] in used], splits


def gold_actions(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return row["evaluation_criteria"].get("actions") or ()


def graded(row: Mapping[str, Any], world: World, said: Sequence[str]) -> Parts:
    """Grade a talk by what its task is graded by, as tau2 does (``evaluator/evaluator_*.py``).

    Args:
        row: the task as the package has it.
        world: as the talk left it.
        said: what the agent said to the user.

    Returns:
        1 or 0 by name, of ``db``, ``env_assertion``, ``action`` and ``communicate``; the reward is their product.
    """
    criteria = row["evaluation_criteria"]
    parts: Parts = {}
    for basis in criteria.get("reward_basis") or BASIS:
        if basis == "DB":
            parts["db"] = float(world.same(gold_world(world.domain, row)))
        elif basis == "ENV_ASSERTION":
            parts["env_assertion"] = float(all(world.holds(a) for a in criteria.get("env_assertions") or ()))
        elif basis == "ACTION":
            parts["action"] = float(all(_done(action, world) for action in gold_actions(row)))
        elif basis == "COMMUNICATE":
            texts = [text.lower().replace(",", "") for text in said]
            told = criteria.get("communicate_info") or ()
            parts["communicate"] = float(all(any(info.lower() in text for text in texts) for info in told))
        else:
            raise ConfigError(f"tau2 task {row['id']!r} is graded by {basis}, which needs a judge")
    return parts


def gold_world(domain: str, row: Mapping[str, Any]) -> World:
    """Return the world as the gold actions leave it. What fails among them changes nothing, as in tau2."""
    world = World(domain, row)
    for action in gold_actions(row):
        world.call(action.get("requestor", "assistant"), action["name"], action["arguments"], sync=False)
    return world


def _done(action: Mapping[str, Any], world: World) -> bool:
    """Say whether a gold action was called: with the arguments that are compared, or else those of the call."""
    for call in world.calls:
        if call.name == action["name"]:
            keys = action.get("compare_args")
            keys = call.arguments.keys() if keys is None else keys
            if {k: v for k, v in call.arguments.items() if k in keys} == {
                k: v for k, v in action["arguments"].items() if k in keys
            }:
                return True
    return False
