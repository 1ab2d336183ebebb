from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.sandbox import ExecResult, ExecStatus, SandboxSpec
from areal_agents.tool import ToolError, ToolResult
from areal_agents.tools.calculator import calculator, evaluate, show
from areal_agents.tools.python import MAX_CODE_BYTES, describe, python
from tests.conftest import require


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        (" 10 - 2 - 3 ", 5),
        ("-2**2", -4),
        ("(-2)**3", -8),
        ("2**-2", Fraction(1, 4)),
        ("1/3+1/6", Fraction(1, 2)),
        ("0.1+0.2", Fraction(3, 10)),
        ("1.5e3", 1500),
        ("7//2", 3),
        ("-7//2", -4),
        ("-7%3", 2),
        ("1_000*2", 2000),
        ("sqrt(16/9)", Fraction(4, 3)),
        ("4**0.5", 2),
        ("abs(-5)", 5),
        ("+-+3", -3),
        ("0**0", 1),
        ("1**10**9", 1),
        ("(-1)**999999999999", -1),
    ],
)
def test_calculator_is_exact(expression: str, value: int | Fraction) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "no arithmetic expression"),
        ("1+", "no arithmetic expression"),
        ("(" * 250 + "1" + ")" * 250, "no arithmetic expression"),
        ("__import__('os')", "no arithmetic expression"),
        ("lambda: 1", "no arithmetic expression"),
        ("0x10", "no arithmetic expression"),
        ("x+1", "no arithmetic expression"),
        ("1+1 # a", "no arithmetic expression"),
        ("1if 1else 2", "no arithmetic expression"),
        ("1j", "no arithmetic expression"),
        ("1,2", "only numbers"),
        ("sqrt", "only numbers"),
        ("sqrt(1,2)", "only numbers"),
        ("abs(*(1,))", "only numbers"),
        ("sqrt(sqrt)", "only numbers"),
        ("1/0", "division by zero"),
        ("1//0", "division by zero"),
        ("1%0", "division by zero"),
        ("0**-1", "division by zero"),
        ("sqrt(2)", "not rational"),
        ("sqrt(-4)", "negative"),
        ("2**(1/3)", "the exponent must be an integer or 1/2"),
        ("2**100000", "too large"),
        ("9**9**9**9", "too large"),
        ("(1/3)**100000", "too large"),
        ("2**4096*2**4096*2**4096", "too large"),
        ("1e999999999", "too large"),
        ("1e-999999999", "too large"),
        ("1" * 600, "600 characters, more than 512"),
        ("1+" * 250 + "1", "more than 200 parts"),
    ],
)
def test_calculator_refuses_with_a_text(expression: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        evaluate(expression)
    result = asyncio.run(calculator.invoke({"expression": expression}))
    assert result.status == "error"
    assert says in result.text


def test_calculator_shows_fractions_with_a_decimal() -> None:
    assert asyncio.run(calculator.invoke({"expression": "2/6"})) == ToolResult("1/3 (about 0.333333333333)")
    assert asyncio.run(calculator.invoke({"expression": "4/2"})) == ToolResult("2")
    assert show(Fraction(10**400, 3)).endswith("/3")


operand = st.integers(-999, 999).map(lambda n: f"({n})")
expressions = st.recursive(
    operand,
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({''.join(t)})"),
    max_leaves=8,
)


@given(expressions)
def test_calculator_agrees_with_python_on_integers(expression: str) -> None:
    assert evaluate(expression) == eval(expression)  # the expression is this test's own


@given(st.text(max_size=60) | st.text(alphabet="0123456789.e+-*/%() \tsqrtab_,", max_size=60))
def test_calculator_never_fails_otherwise(text: str) -> None:
    with contextlib.suppress(ToolError):
        show(evaluate(text))


def run_python(*codes: str) -> list[ToolResult]:
    require("bwrap")

    async def main() -> list[ToolResult]:
        from areal_agents import sandboxes

        backend = sandboxes.get("bubblewrap")
        try:
            async with backend.session(SandboxSpec()) as sandbox:
                return [await python.invoke({"code": code}, {"sandbox": sandbox}) for code in codes]
        finally:
            await backend.aclose()

    return asyncio.run(main())


def test_python_runs_in_the_sandbox() -> None:
    printed, silent, unicode, divided, exited = run_python(
        "print(347*58+129*46)", "x = 1", "print('é漢🙂')", "print('half')\n1/0", "import sys; sys.exit(3)"
    )
    assert printed == ToolResult("26060")
    assert silent == ToolResult("(no output; use print)")
    assert unicode == ToolResult("é漢🙂")
    assert divided.status == "error"
    assert divided.text.startswith("half\n")
    assert divided.text.endswith("ZeroDivisionError: division by zero")
    assert 'File "<stdin>", line 2' in divided.text
    assert exited == ToolResult("error: exit code 3", "error")


def test_python_keeps_files_between_calls_and_not_processes() -> None:
    _, read, name = run_python("open('f', 'w').write('kept'); x = 1", "print(open('f').read())", "print(x)")
    assert read.text == "kept"
    assert name.text.endswith("NameError: name 'x' is not defined")


def test_a_flood_of_output_is_stopped_and_cut() -> None:
    flood, after = run_python("while True: print('a' * 1000000)", "print(1)")
    assert flood.status == "error"
    assert flood.truncated
    assert len(flood.text) <= python.max_output_chars
    assert "error: stopped after 65536 bytes of output" in flood.text
    assert after == ToolResult("1")


@pytest.mark.slow
def test_code_that_does_not_end_is_stopped() -> None:
    endless, after = run_python("print('first', flush=True)\nwhile True: pass", "print(2)")
    assert endless == ToolResult("first\nerror: stopped after 5 s", "timeout")
    assert after == ToolResult("2")


def test_python_cannot_reach_the_host() -> None:
    user, network = run_python(
        "import os; print(os.path.exists('/root/.ssh'), os.path.exists('/work/main'))",
        "import socket; socket.create_connection(('1.1.1.1', 53), 1)",
    )
    assert user.text == "False False"
    assert network.status == "error"


def test_code_that_is_too_long_never_reaches_the_sandbox() -> None:
    result = asyncio.run(python.invoke({"code": "#" * (MAX_CODE_BYTES + 1)}, {"sandbox": None}))
    assert result == ToolResult("error: the code has 65537 bytes, more than 65536", "error")


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        ("ok", b"a\n\n", b"warning", ToolResult("a")),
        ("ok", b"  a", b"", ToolResult("  a")),
        ("oom", b"", b"", ToolResult("error: out of memory", "error")),
        ("timeout", b"a\n", b"", ToolResult("a\nerror: stopped after 5 s", "timeout")),
        ("error", b"", b"1\n2\n3\n4\n", ToolResult("2\n3\n4", "error")),
        ("error", b"\xff", b"", ToolResult("\ufffd\nerror: exit code 9", "error")),
    ],
)
def test_what_a_model_is_told(status: ExecStatus, out: bytes, err: bytes, expected: ToolResult) -> None:
    assert describe(ExecResult(status, 9, out, err, 0.0)) == expected


def test_schemas_are_short() -> None:
    tools: Sequence[tuple[object, str]] = ((python, "code"), (calculator, "expression"))
    for spec, name in tools:
        assert getattr(spec, "parameters") == {  # noqa: B009
            "type": "object",
            "properties": {name: {"type": "string"}},
            "required": [name],
        }
