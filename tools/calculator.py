"""The ``calculator`` tool, exact arithmetic on a parsed expression, without ``eval`` and within fixed bounds."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from areal_agents.tool import ToolError, tool

MAX_CHARS = 512
MAX_NODES = 200
MAX_BITS = 8192
"""Numerators and denominators stay below 2**8192, about 2466 digits; a larger result is refused before it is made."""

_TOKENS = re.compile(r"(?:[0-9][0-9_]*|[.]|[eE](?=[-+0-9])|sqrt|abs|[-+*/%(),\s])*")
"""All that may stand in an expression. Quotes and other words never reach the parser."""

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


@tool(timeout=5, parallel=True, max_output_chars=4000)
async def calculator(expression: str) -> str:
    """Evaluate arithmetic exactly: + - * / // % ** ( ) sqrt abs."""
    return show(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """Compute the exact value of an expression.

    Raises ToolError, with a text for the model, for anything but bounded arithmetic.
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"error: the expression has {len(expression)} characters, more than {MAX_CHARS}")
    try:
        if _TOKENS.fullmatch(expression) is None:
            raise SyntaxError
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError("error: this is no arithmetic expression") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ToolError(f"error: the expression has more than {MAX_NODES} parts")
    return _value(tree.body, expression.strip())


def show(value: Fraction) -> str:
    """Write a value as the model sees it, such as ``7`` or ``1/3 (about 0.333333333333)``."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        about = f" (about {float(value):.12g})"
    except OverflowError:
        about = ""
    return f"{value}{about}"


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as constant) if not isinstance(constant, bool):
            return _literal(node, constant, source)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, source)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, source)
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left, source), _value(node.right, source))
        case ast.BinOp() if type(node.op) in _BINARY:
            return _binary(type(node.op), _value(node.left, source), _value(node.right, source))
        case ast.Call(func=ast.Name(id="sqrt"), args=[argument], keywords=[]):
            return _square_root(_value(argument, source))
        case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
            return abs(_value(argument, source))
    raise ToolError("error: only numbers, + - * / // % ** ( ), sqrt and abs are allowed")


def _literal(node: ast.expr, constant: int | float, source: str) -> Fraction:
    """Read a number as it is written: 0.1 is one tenth, not the nearest float."""
    text = (ast.get_source_segment(source, node) or "").replace("_", "")
    exponent = text.lower().partition("e")[2]
    if exponent and abs(int(exponent)) > MAX_BITS // 4:  # Fraction("1e999999999") would build the integer
        raise ToolError("error: the result is too large")
    return _bounded(Fraction(text) if isinstance(constant, float) else Fraction(constant))


def _binary(kind: type[ast.operator], left: Fraction, right: Fraction) -> Fraction:
    try:
        return _bounded(_BINARY[kind](left, right))
    except ZeroDivisionError:
        raise ToolError("error: division by zero") from None


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent == Fraction(1, 2):
        return _square_root(base)
    if exponent.denominator != 1:
        raise ToolError("error: the exponent must be an integer or 1/2")
    if base == 0 and exponent < 0:
        raise ToolError("error: division by zero")
    if base not in (-1, 0, 1) and _bits(base) * abs(exponent) > MAX_BITS:
        raise ToolError("error: the result is too large")
    # For -1, 0 and 1 only the exponent's parity matters: a huge one must not cost anything.
    n = int(exponent) if base not in (-1, 0, 1) else (int(exponent) % 2 or (2 if exponent else 0))
    return base**n


def _square_root(value: Fraction) -> Fraction:
    if value < 0:
        raise ToolError("error: the square root of a negative number")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise ToolError("error: this square root is not rational")
    return root


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ToolError("error: the result is too large")
    return value
