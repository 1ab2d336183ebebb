"""The process in which reasoning-gym runs: it makes tasks, and scores answers that it never evaluates.

    {"do": "make", generator, difficulty, config, salt, split} ─▶ {seed, question, answer}
    {"do": "score", generator, difficulty, config, seed, question, said} ─▶ {score}

Its generators use global generators of random numbers, print, and take their time, and some scorers let an answer
decide how long they run. So they have processes with bounded memory, which a deadline ends (``worker_pool.py``). The
pool sets PYTHONHASHSEED: several generators draw from sets, and would make other tasks in each process.

A task is its seed: to score an answer, the entry is made again, and must ask the same question.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import hashlib
import io
import json
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from areal_agents.envs.reasoning_gym_lists import COUNTED, EXACT, GOLDS, LEVELLESS, NOT_A_NUMBER, SUMS
from areal_agents.rewards.mathematics.worker import serve
from areal_agents.utils.short_text import described

MEMORY = 2 << 30
"""Bytes of address space."""
BUCKETS = 4
"""One is the test split, one is the validation split."""
_TRIES = 4000


class Refused(Exception):
    """A request that cannot be met, whatever is tried: the settings are wrong."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Reply to one request: with ``refused`` or ``failed`` and a text where there is no result."""
    kind = {"make": _made, "score": _scored}[request["do"]]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return kind(request)
        except Refused as wrong:
            return {"refused": str(wrong)}
        except Exception as error:  # noqa: BLE001  the boundary: the host says what it is
            return {"failed": described(error)}


def split_of(question: str) -> str:
    """Return the split that a question belongs to, whatever its generator and difficulty: case and spaces aside."""
    words = " ".join(question.casefold().split())
    bucket = hashlib.sha256(words.encode()).digest()[0] % BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _made(request: Mapping[str, Any]) -> dict[str, Any]:
    """Draw until a question belongs to the split."""
    for i in range(_TRIES):
        seed = int.from_bytes(hashlib.sha256(f"{request['salt']} {i}".encode()).digest()[:4], "big")
        entry = _entry(request["generator"], request["difficulty"], request["config"], seed)[1]
        if split_of(entry["question"]) == request["split"]:
            return {"seed": seed, "question": entry["question"], "answer": _gold(request["generator"], entry)}
    raise Refused(f"none of {_TRIES} draws of {request['generator']!r} belongs to the split {request['split']!r}")


def _gold(name: str, entry: Mapping[str, Any]) -> str | None:
    """Return a right answer, or None where the generator has none."""
    found = entry["metadata"][GOLDS[name]] if name in GOLDS else entry["answer"]
    return json.dumps(found) if isinstance(found, dict) else None if found is None else str(found)


def _scored(request: Mapping[str, Any]) -> dict[str, Any]:
    name, said = request["generator"], request["said"]
    dataset, entry = _entry(name, request["difficulty"], request["config"], request["seed"])
    if entry["question"] != request["question"]:
        raise Refused(
            f"seed {request['seed']} of {name!r} asks another question than the task does: another version of "
            "reasoning-gym made it"
        )
    if name in EXACT:
        right = entry["metadata"][EXACT[name]] if EXACT[name] else [entry["answer"]]
        return {"score": float(said in right)}
    if name in SUMS:
        metadata, wanted = entry["metadata"], SUMS[name]
        target = metadata[wanted] if isinstance(wanted, str) else wanted
        return {"score": float(is_sum(said, metadata["numbers"], target))}
    if name in NOT_A_NUMBER and "nan" in said.lower().replace(" ", ""):
        return {"score": 0.0}
    try:
        return {"score": float(dataset.score_answer(said, copy.deepcopy(entry)))}
    except Exception as error:  # noqa: BLE001  the boundary: scorers raise on texts that they cannot read
        return {"unreadable": described(error)}


def is_sum(text: str, numbers: Sequence[int], target: int) -> bool:
    """Say whether a text is a sum of just these numbers, with + - * / and brackets, that makes the target.

    Nothing of it is evaluated: its syntax tree is read, and anything else in it makes it none.
    """
    try:
        used: list[int] = []
        return _value(ast.parse(text.strip(), mode="eval").body, used) == target and sorted(used) == sorted(numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, used)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("no sum")


_OPERATORS: Final[Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


@functools.lru_cache(maxsize=256)  # the episodes of a group are scored one after the other
def _entry(name: str, difficulty: float | None, config: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return a dataset, and its entry of a seed."""
    random.seed(seed)
    import numpy as np

    np.random.seed(seed)  # what some generators draw from
    if name in COUNTED:
        dataset = _dataset(name, difficulty, config, seed, 1)
        return dataset, dataset[0]
    dataset = _dataset(name, difficulty, config, 0, 1 << 32)
    return dataset, dataset[seed]  # drawn from Random(0 + seed), as entry 0 of a dataset of that seed


@functools.lru_cache(maxsize=128)
def _dataset(name: str, difficulty: float | None, config: str, seed: int, size: int) -> Any:
    from reasoning_gym import factory

    if name not in factory.DATASETS:
        raise Refused(f"the installed reasoning-gym has no generator {name!r}")
    make, settings = factory.DATASETS[name]
    given = {**json.loads(config), "seed": seed, "size": size}
    try:
        levels = difficulty is not None and name not in LEVELLESS and factory.has_curriculum(name)
        return make(config=_at(name, float(difficulty or 0), given) if levels else settings(**given))
    except (TypeError, AssertionError, ValueError) as error:
        raise Refused(f"{name!r} does not take config = {config} at difficulty {difficulty}: {error}") from error


def _at(name: str, difficulty: float, given: dict[str, Any]) -> Any:
    """Return the settings at a difficulty: each attribute of the generator's curriculum at this part of its levels."""
    from reasoning_gym import factory

    curriculum = factory.create_curriculum(name)
    for attribute in curriculum.attributes.values():
        curriculum.set_attr_level(attribute.name, round(difficulty * (len(attribute.levels) - 1)))
    return curriculum.generate_configuration(given)


def _prepare() -> None:
    import reasoning_gym  # noqa: F401


if __name__ == "__main__":
    serve(_prepare, answer, MEMORY)
