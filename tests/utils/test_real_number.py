"""One definition of a number, for every kind of reward."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sympy  # type: ignore[import-untyped]
import torch

from areal_agents.errors import RewardError
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rollout.env_results import read
from areal_agents.types import AssistantMessage, Task, Text
from areal_agents.utils.real_number import finite

NUMBERS: dict[str, tuple[Any, float]] = {
    "bool": (True, 1.0),
    "int": (3, 3.0),
    "float": (-0.5, -0.5),
    "numpy.bool_": (np.all([True, True]), 1.0),
    "numpy.bool_ false": (np.bool_(False), 0.0),
    "numpy.int64": (np.int64(-2), -2.0),
    "numpy.uint8": (np.uint8(2), 2.0),
    "numpy.float16": (np.float16(0.25), 0.25),
    "numpy.longdouble": (np.longdouble(0.5), 0.5),
    "0-d array": (np.array(0.75), 0.75),
    "0-d bool array": (np.array(True), 1.0),
    "0-d array of a Decimal": (np.array(Decimal("0.5")), 0.5),
    "tensor": (torch.tensor(0.5), 0.5),
    "bool tensor": (torch.tensor(True), 1.0),
    "bfloat16 tensor": (torch.tensor(2.0, dtype=torch.bfloat16), 2.0),
    "tensor with a gradient": (torch.tensor(0.5, requires_grad=True), 0.5),
    "Decimal": (Decimal("0.1"), 0.1),
    "Fraction": (Fraction(1, 4), 0.25),
    "sympy.true": (sympy.true, 1.0),
    "sympy.false": (sympy.false, 0.0),
    "sympy equality": (sympy.Eq(sympy.Integer(2), 2), 1.0),
    "sympy.Rational": (sympy.Rational(1, 4), 0.25),
    "sympy.Float": (sympy.Float("0.5"), 0.5),
    "sympy constant": (sympy.sqrt(4) * 2, 4.0),
}

NONE: dict[str, tuple[Any, str]] = {
    "None": (None, "not a number"),
    "text": ("1.0", "not a number"),
    "bytes": (b"1", "not a number"),
    "numpy text": (np.str_("1"), "not a number"),
    "0-d array of a text": (np.array("1.0"), "not a number"),
    "complex": (1 + 0j, "not a number"),
    "numpy complex": (np.complex64(1), "not a number"),
    "complex tensor": (torch.tensor(1 + 0j), "not a number"),
    "a sum of squares that overflows": (1e300, r"too large: 1e\+300, and numbers of up to 1e\+30 in size"),
    "a negative one": (-1.01e30, r"too large: -1.01e\+30, and numbers"),
    "list": ([1.0], "not a number"),
    "dict": ({"score": 1.0}, "not a number"),
    "array of one": (np.array([1.0]), "not a number"),
    "tensor of one": (torch.tensor([1.0]), "not a number"),
    "a day": (np.datetime64("2020-01-01"), "not a number"),
    "a class": (float, "not a number"),
    "sympy symbol": (sympy.Symbol("x"), "not a number"),
    "sympy relation": (sympy.Symbol("x") > 1, "not a number"),
    "sympy i": (sympy.I, "not a number"),
    "nan": (float("nan"), "not finite"),
    "infinity": (float("inf"), "not finite"),
    "numpy nan": (np.float32("nan"), "not finite"),
    "nan tensor": (torch.tensor(float("nan")), "not finite"),
    "Decimal nan": (Decimal("NaN"), "not finite"),
    "sympy oo": (sympy.oo, "not finite"),
    "sympy nan": (sympy.nan, "not finite"),
    "too large": (10**400, "not finite"),
}


def of_function(value: Any) -> float:
    return asyncio.run(judge(lambda episode: value, EPISODE)).score


def of_component(value: Any) -> float:
    return asyncio.run(judge(lambda episode: Verdict(1.0, {"c": value}), EPISODE)).components["c"]


def of_verdict_turn(value: Any) -> float:
    score = next((number for given, number in NUMBERS.values() if given is value), 0.0)  # the sum of the turns
    turns = asyncio.run(judge(lambda episode: Verdict(score, {}, (value,)), EPISODE)).turn_rewards
    assert turns is not None
    return turns[0]


def of_step(value: Any) -> float:
    return read("astep", ((), value, True, False, {}), WHERE, 1).reward


def of_finish(value: Any) -> float:
    return read("afinish", (value, {}), WHERE, 1).reward


def of_info(value: Any) -> float:
    return read("astep", ((), 0.0, True, False, {"components": {"c": value}}), WHERE, 1).components["c"]


def of_turn(value: Any) -> float:
    turns = read("astep", ((), 0.0, True, False, {"turn_rewards": [value]}), WHERE, 1).turn_rewards
    assert turns is not None
    return turns[0]


WHERE = "astep (task t, turn 0)"
TASK = Task.make("t", split="train", seed=0, payload={})
EPISODE = Episode(TASK, (AssistantMessage((Text("x"),)),), "x", (), "answer")
READERS = (of_function, of_component, of_verdict_turn, of_step, of_finish, of_info, of_turn)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_kind_of_number_is_one_everywhere(name: str) -> None:
    value, expected = NUMBERS[name]
    assert finite(value) == pytest.approx(expected, abs=1e-12)
    for reader in READERS:
        got = reader(value)
        assert type(got) is float
        assert got == finite(value), reader.__name__


@pytest.mark.parametrize("name", NONE)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_finite_number_is_refused_everywhere(name: str, reader: Callable[[Any], float]) -> None:
    value, why = NONE[name]
    with pytest.raises(ValueError, match=why):
        finite(value)
    with pytest.raises(RewardError, match=why):
        reader(value)
