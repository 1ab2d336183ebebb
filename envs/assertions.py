"""The assertions of unit tests, read as calls with what they must return.

    assert candidate([3, 1]) == [1, 3]      ─▶ input "sort_list([3, 1])", output "[1, 3]"
    assert abs(candidate(3.5) - 0.5) < 1e-6 ─▶ input "sort_list(3.5)", output "0.5", within 1e-6

A test runs the call inside the sandbox, behind the submission, and prints its value. What is expected stays outside.
So a test that computes what it expects (a loop, another program) cannot be read, and its row is left out.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from areal_agents.envs.canonical_inside import canonical
from areal_agents.envs.questions import LeftOut

_MAKERS: dict[str, Callable[..., Any]] = {
    "set": set, "tuple": tuple, "list": list, "sorted": sorted, "frozenset": frozenset,
}  # fmt: skip
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
_BEFORE = """\
import builtins as _b, os as _o, sys as _s
__name__ = "submission"
_areal = (_b, _o.fdopen(_o.dup(1), "w"), _s.stdin.buffer.read().decode()); _o.dup2(2, 1)
"""
_AFTER = """
out.write(canonical(eval(asked, space)))
out.flush()
"""


def program(source: str, setup: str) -> str:
    """Return a submission that evaluates the expression of a test, after ``setup`` and itself."""
    future = "\n".join(_FUTURE.findall(f"{setup}\n{source}"))
    driver = f"_areal[0].exec({_driver()!r}, dict(space=_areal[0].globals(), out=_areal[1], asked=_areal[2]))"
    return "\n".join([future, _BEFORE, _FUTURE.sub("", setup), _FUTURE.sub("", source), driver, ""])


@cache
def _driver() -> str:
    return Path(__file__).with_name("canonical_inside.py").read_text() + _AFTER


def read_assertions(source: str, function: str) -> list[dict[str, Any]]:
    """Read assertions on ``function``, also where they call it ``candidate``, within ``check`` or not.

    Each has ``input``, an expression, and ``output``, the canonical text of its value; and ``within``, where that is a
    number that may be off by so much. Raises LeftOut where one of them cannot be read.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LeftOut(f"its tests are no Python: {type(error).__name__}") from error
    checks = [s for s in body if isinstance(s, ast.FunctionDef) and s.name == "check"]
    statements = checks[0].body if checks else body
    tests: list[dict[str, Any]] = []
    for statement in statements:
        if isinstance(statement, ast.Assert):
            if not (isinstance(statement.test, ast.Constant) and statement.test.value):
                call, expected, off = _read(statement.test, function)
                text = ast.unparse(_Named(function).visit(call))
                near = {"within": off} if off else {}
                tests.append({"input": text, "output": _written(expected), **near})
        elif not _says_nothing(statement):
            raise LeftOut(f"its tests have a statement that is no assertion ({type(statement).__name__})")
    if not tests:
        raise LeftOut("it has no test")
    return tests


def _says_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _read(test: ast.expr, function: str) -> tuple[ast.expr, Any, float]:
    """Return the expression with the call, what it must be, and how far off it may be."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, op, right = test.left, test.ops[0], test.comparators[0]
        if isinstance(op, ast.Lt | ast.LtE) and (near := _difference(left)):
            call, value, off = _sides(*near, function, _number(right))
            _finite(value)
            return call, value, off
        if isinstance(op, ast.Eq | ast.Is):
            return _sides(left, right, function, 0.0)
    elif isinstance(test, ast.Call) and ast.unparse(test.func) in ("math.isclose", "isclose") and len(test.args) == 2:
        named = {str(k.arg): _number(k.value) for k in test.keywords}
        call, value, _ = _sides(test.args[0], test.args[1], function, 0.0)
        return call, value, max(named.get("rel_tol", 1e-9) * abs(_finite(value)), named.get("abs_tol", 0.0))
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _calls(test.operand, function):
        return _bool(test.operand), False, 0.0
    elif isinstance(test, ast.Call) and _calls(test, function):
        return _bool(test), True, 0.0
    raise LeftOut(f"a test is no comparison with a value: {ast.unparse(test)[:80]}")


def _bool(expression: ast.expr) -> ast.expr:
    return ast.Call(ast.Name("bool"), [expression], [])


def _difference(left: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """Return a and b of ``abs(a - b)``."""
    if isinstance(left, ast.Call) and ast.unparse(left.func) in ("abs", "math.fabs") and len(left.args) == 1:
        inner = left.args[0]
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub):
            return inner.left, inner.right
    return None


def _sides(left: ast.expr, right: ast.expr, function: str, off: float) -> tuple[ast.expr, Any, float]:
    for call, value in ((left, right), (right, left)):
        if _calls(call, function) and not _calls(value, function):
            return call, _value(value), off
    raise LeftOut(f"a test does not compare a call of {function} with a value")


def _calls(expression: ast.expr, function: str) -> bool:
    names = {function, "candidate"}
    calls = (n.func for n in ast.walk(expression) if isinstance(n, ast.Call))
    return any(isinstance(f, ast.Name) and f.id in names for f in calls)


def _value(expression: ast.expr) -> Any:
    """Return what a literal means, or a list of one made another kind of collection."""
    try:
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and not expression.keywords:
            maker = _MAKERS.get(expression.func.id)
            if maker is not None and len(expression.args) < 2:
                return maker(*map(ast.literal_eval, expression.args))
        return ast.literal_eval(_Folded().visit(expression))
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise LeftOut(f"a test computes what it expects: {ast.unparse(expression)[:80]}") from error


def _written(value: Any) -> str:
    """Write a value as text. One that says no more than its type would be like every other of that type."""
    text = canonical(value)
    if _says_a_type(value):
        raise LeftOut(f"a test expects a value that cannot be compared: {text[:80]}")
    return text


def _says_a_type(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_says_a_type, [*value, *value.values()]))
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_says_a_type, value))
    return value is not None and not isinstance(value, int | float | complex | str | bytes)


def _finite(value: Any) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise LeftOut(f"a test says how far {value!r:.40} may be off")


def _number(expression: ast.expr) -> float:
    value = _value(expression)
    if isinstance(value, int | float) and 0 <= value < 1:
        return float(value)
    raise LeftOut(f"a test's tolerance is {value!r:.40}")


class _Folded(ast.NodeTransformer):
    """Works out sums, products and quotients of numbers."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        a, b = node.left, node.right
        if not (isinstance(a, ast.Constant) and isinstance(b, ast.Constant)):
            return node
        if type(a.value) not in (int, float) or type(b.value) not in (int, float):
            return node
        work = _OPERATIONS.get(type(node.op))
        return node if work is None else ast.Constant(work(a.value, b.value))


class _Named(ast.NodeTransformer):
    """Calls ``candidate`` by the function's name."""

    def __init__(self, function: str) -> None:
        self._function = function

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._function) if node.id == "candidate" else node
