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
from areal_agents.tools.python import MAX_CODE_BYTES, describe, python, shorten_tracebacks
from tests.conftest import require
from tests.sandboxes.test_process_gate import THREADS_32


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


def memory_bound() -> str:
    require("bwrap")

    async def main() -> str:
        from areal_agents import sandboxes

        return (await sandboxes.get("bubblewrap").probe()).memory_bound

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


_HEADER = "Traceback (most recent call last):"


def test_what_was_printed_is_shown_in_order_and_with_what_ended_it() -> None:
    order, partial, killed, status, message, unread, expression = run_python(
        "import sys, warnings\nprint('a'); print('b', file=sys.stderr); print('c'); warnings.warn('old')",
        "print('no newline', end=''); import os; os._exit(7)",
        "print('before'); import ctypes; ctypes.string_at(0)",
        "print('x'); raise SystemExit(1)",
        "import sys; sys.exit('bad input')",
        "print(input('name? '))",
        "1 + 1",
    )
    assert order == ToolResult("a\nb\nc\n<stdin>:2: UserWarning: old")
    assert partial == ToolResult("no newline\nerror: exit code 7", "error")
    assert killed == ToolResult("before\nerror: killed by SIGSEGV", "error")
    assert status == ToolResult("x\nerror: exit code 1", "error")
    assert message == ToolResult("bad input\nerror: exit code 1", "error")
    assert unread.text.startswith("name? Traceback")
    assert unread.text.endswith("EOFError: EOF when reading a line")
    assert expression == ToolResult("(no output; use print)")


def test_what_was_printed_before_memory_ran_out_is_shown() -> None:
    bomb, after = run_python(
        "print('before')\nblock = bytearray(2 << 30)\nfor i in range(0, 2 << 30, 4096): block[i] = 1", "print(1)"
    )
    assert bomb.text.startswith("before\n")
    assert bomb.status == "error"
    assert after == ToolResult("1")


def test_tracebacks_are_short_whole_and_without_folders() -> None:
    recursion, mutual, several, syntax, library, program = run_python(
        "def f(): f()\nf()",
        "def f(): g()\ndef g(): f()\nf()",
        "raise ValueError('a\\nb\\nc\\nd\\ne')",
        "x = 1\nprint(x",
        "import json\njson.loads('{')",
        "def f(): pass\nprint(__name__)\nif __name__ == '__main__': print(__file__)",
    )
    assert "[Previous line repeated 99" in recursion.text
    assert recursion.text.endswith("RecursionError: maximum recursion depth exceeded")
    assert mutual.text.splitlines()[:2] == ["Traceback (most recent call last):", "  ..."]
    assert len(mutual.text.splitlines()) == 5
    assert not mutual.truncated
    assert several.text.endswith("ValueError: a\nb\nc\nd\ne")
    assert syntax.text.splitlines()[0] == '  File "<stdin>", line 2'
    assert syntax.text.splitlines()[-1].startswith("SyntaxError: ")
    assert '  File "json/decoder.py", line ' in library.text
    assert '  File "<stdin>", line 2, in <module>' in library.text
    assert program == ToolResult("__main__\n<stdin>")


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ('  File "/home/me/v/lib/python3.13t/site-packages/p/q.py", line 1', '  File "p/q.py", line 1'),
        ('  File "/usr/lib/python3/dist-packages/p.py", line 1, in f', '  File "p.py", line 1, in f'),
        ('  |   File "/usr/lib/python3.11/asyncio/runners.py", line 1', '  |   File "asyncio/runners.py", line 1'),
        ('  File "/work/own.py", line 1', '  File "/work/own.py", line 1'),
        ('see "/usr/lib/python3.11/os.py"', 'see "/usr/lib/python3.11/os.py"'),
    ],
)
def test_a_frame_names_a_package_and_not_its_folder(printed: str, shown: str) -> None:
    assert shorten_tracebacks(printed) == shown


def test_frames_in_the_middle_are_left_out() -> None:
    frames = [f'  File "<stdin>", line {n}, in f' for n in range(1, 5)]
    library = [f'  File "p.py", line {n}, in g\n    g({n})\n     ^^^' for n in range(5, 9)]
    text = "\n".join(["before", _HEADER, *frames, *library, "Error: x", "  more", "after"])
    assert shorten_tracebacks(text).splitlines() == [
        "before",
        _HEADER,
        "  ...",
        frames[2],
        frames[3],
        "  ...",
        '  File "p.py", line 7, in g',
        "    g(7)",
        '  File "p.py", line 8, in g',
        "    g(8)",
        "Error: x",
        "  more",
        "after",
    ]


def test_any_text_goes_in_and_comes_out() -> None:
    half, printed, binary, encodings, zero = run_python(
        "print(len('\ud83d'), ascii('\ud83d'))",
        "print('\ud83d')",
        "import sys; sys.stdout.buffer.write(b'\\xff|')",
        "import locale, sys; print(sys.stdout.encoding, locale.getpreferredencoding(False), open('f', 'w').encoding)",
        "print(1)\0",
    )
    assert half == ToolResult(r"1 '\ud83d'")
    assert "UnicodeEncodeError" in printed.text
    assert binary == ToolResult("\ufffd|")
    assert {name.lower().replace("-", "") for name in encodings.text.split()} == {"utf8"}
    assert zero == ToolResult("error: the code has a NUL character, which Python does not read", "error")


_PROCESSES = """
import asyncio, multiprocessing, subprocess, sys
def square(x):
    return x * x
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        print(pool.map(square, range(4)))
    with multiprocessing.Manager() as manager:
        shared = manager.dict(a=1)
        print(dict(shared))
    from multiprocessing.shared_memory import SharedMemory
    block = SharedMemory(create=True, size=1000)
    block.close()
    block.unlink()
    async def main():
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "print('child')", stdout=subprocess.PIPE)
        print(await child.communicate(), await asyncio.to_thread(square, 3))
    asyncio.run(main())
"""


def test_threads_and_processes_work() -> None:
    if memory_bound() == "rlimits":
        pytest.skip("memory is bounded by rlimits here, which leaves room for a few processes")
    threads, processes = run_python(THREADS_32, _PROCESSES)
    assert threads == ToolResult("3200000")
    assert processes == ToolResult("[0, 1, 4, 9]\n{'a': 1}\n(b'child\\n', None) 9")


def test_a_program_knows_who_and_where_it_is() -> None:
    user, host, folders = run_python(
        "import getpass, os, pwd; print(getpass.getuser(), pwd.getpwuid(os.getuid()).pw_dir)",
        "import socket, threading\nserver = socket.create_server(('localhost', 0))\n"
        "threading.Thread(target=lambda: server.accept()[0].sendall(b'hello')).start()\n"
        "print(socket.create_connection(('localhost', server.getsockname()[1])).recv(9))",
        "import os, tempfile\nos.makedirs(os.path.expanduser('~/.config'))\nprint(tempfile.gettempdir(), os.getcwd())",
    )
    assert user == ToolResult("sandbox /work")
    assert host == ToolResult("b'hello'")
    assert folders == ToolResult("/tmp /work")


def test_python_keeps_files_between_calls_and_not_processes() -> None:
    _, read, name = run_python("open('f', 'w').write('kept'); x = 1", "print(open('f').read())", "print(x)")
    assert read.text == "kept"
    assert name.text.endswith("NameError: name 'x' is not defined")


def test_a_flood_of_output_is_stopped_and_cut() -> None:
    flood, after = run_python("while True: print('a' * 1000000)", "print(1)")
    assert flood.status == "error"
    assert flood.truncated
    assert len(flood.text) <= python.max_output_chars
    assert "error: stopped after 131072 bytes of output" in flood.text
    assert after == ToolResult("1")


@pytest.mark.slow
def test_code_that_does_not_end_is_stopped() -> None:
    endless, after = run_python("print('first')\nprint('half', end='')\nwhile True: pass", "print(2)")
    assert endless == ToolResult("first\nhalf\nerror: stopped after 5 s", "timeout")
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
        ("ok", b"a\n\n", b"warning", ToolResult("a\nwarning")),
        ("ok", b"  a", b"", ToolResult("  a")),
        ("oom", b"", b"", ToolResult("error: out of memory", "error")),
        ("timeout", b"a\n", b"", ToolResult("a\nerror: stopped at the limit of CPU time", "timeout")),
        ("error", b"", b"1\n2\n", ToolResult("1\n2\nerror: exit code 9", "error")),
        (
            "error",
            b"Traceback (most recent call last):\n   ^",
            b"",
            ToolResult("Traceback (most recent call last):\nerror: exit code 9", "error"),
        ),
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
