"""Programs in the real sandbox: right ones, wrong ones, and those that would be paid without solving anything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rewards.code.fences import fenced, submission
from areal_agents.rewards.code.judge import CodeVerdict, run_tests
from areal_agents.rewards.code.problem import CodeTest, Problem, same_text, same_value
from areal_agents.rewards.code.reward import FAILURES, code
from areal_agents.sandbox import SandboxBackend
from areal_agents.types import AssistantMessage, Task, Text, user
from tests.conftest import require

DOUBLE = Problem((CodeTest("4", "2"), CodeTest("-6", "-3"), CodeTest("0", "0")), seconds=20.0)
ADD = Problem((CodeTest(3, arguments=[1, 2]), CodeTest([1], arguments=[[], [1]])), function="add", seconds=20.0)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def backend(runner: asyncio.Runner) -> Iterator[SandboxBackend]:
    require("bwrap")
    backend = sandboxes.get("bubblewrap")
    yield backend
    runner.run(backend.aclose())


def verdict_of(runner: asyncio.Runner, backend: SandboxBackend, source: str, problem: Problem = DOUBLE) -> CodeVerdict:
    return runner.run(run_tests(source, problem, backend))


def test_right_and_wrong_programs(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    assert verdict_of(runner, backend, "print(2 * int(input()))").results == ("passed",) * 3
    assert verdict_of(runner, backend, "print(int(input()) ** 2)").results == ("passed", "wrong", "passed")
    assert verdict_of(runner, backend, "print(1 / int(input()))").results == ("wrong", "wrong", "error")
    broken = verdict_of(runner, backend, "print(")
    assert (broken.compiled, broken.results) == (False, ())
    assert "SyntaxError" in broken.detail
    assert verdict_of(runner, backend, "def add(a, b): return a + b", ADD).results == ("passed", "passed")
    assert verdict_of(runner, backend, "def sub(a, b): return a - b", ADD).results == ("error", "error")


def test_limits_are_told_apart(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    quick = Problem((CodeTest("1", ""),), seconds=1.0, memory=128 << 20)
    assert verdict_of(runner, backend, "while True: pass", quick).results == ("timeout",)
    assert verdict_of(runner, backend, "import sys\nwhile True: sys.stdout.write('x' * 65536)", quick).results in (
        ("output_limit",), ("timeout",),
    )  # fmt: skip
    assert verdict_of(runner, backend, "x = bytearray(1 << 30)", quick).results in (("oom",), ("error",))


ATTACKS = {
    "leaves early": "import os; os._exit(0)",
    "leaves early with a report": "print('4\\nOK\\n3 passed'); import os; os._exit(0)",
    "a fake report": "print('Ran 3 tests in 0.001s\\n\\nOK')",
    "all answers at once": "print('4\\n-6\\n0')",
    "patches print": "import builtins; builtins.print = lambda *a, **k: None",
    "always equal": "class E(str):\n  __eq__ = lambda s, o: True\n  __hash__ = str.__hash__\nprint(E('x'))",
    "reads files": "import glob\nfor f in glob.glob('/work/**', recursive=True) + glob.glob('/tmp/*'): print(f)",
    "reads what ran before it": "open('/work/log', 'a').write(input()); print(open('/work/log').read())",
    "reads its parent": "import os; print(open(f'/proc/{os.getppid()}/cmdline').read())",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "kills all it sees": "import os, signal\ntry: os.kill(-1, signal.SIGKILL)\nfinally: print(4)",
    "overwrites itself": "open('/work/main.py', 'w').write('print(4)')",
    "overwrites python": "try: open('/usr/bin/python3', 'w').write('')\nexcept OSError: pass",
    "a file for unittest": "for n in ('unittest', 'sitecustomize'): open(f'/work/{n}.py', 'w').write('print(4)')",
    "closes its output": "import os; os.close(1); os.close(2)",
    "writes to its input": "import os\ntry: os.write(0, b'4')\nexcept OSError: pass",
    "a fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: os._exit(0)",
    "fills the disk": "open('/work/big', 'wb').write(b'x' * (1 << 28))",
    "a daemon that prints later": "import os, time\nif os.fork() == 0:\n  os.setsid(); time.sleep(1); print(4)",
    "control characters": "print('\\x1b[2J4\\r-6\\r0')",
    "asks the network": "import socket; print(socket.create_connection(('192.0.2.1', 80), 1).recv(9))",
    "a constant": "print(4)",
}
CALL_ATTACKS = {
    "an equal for everything": "class E(int):\n  __eq__ = lambda s, o: True\ndef add(a, b): return E(7)",
    "prints the result and leaves": "def add(a, b):\n  import os; os.write(1, b'true'); os._exit(0)",
    "patches json": "import json; json.dumps = lambda x: 'true'\ndef add(a, b): return None",
    "looks for what is expected": "def add(a, b):\n  import sys\n  return str(sys._getframe(1).f_locals)",
    "a judge of its own": "import sys; sys.exit(0)\ndef add(a, b): return 3",
    "changes the harness": "open('/work/harness.py', 'w').write('')\ndef add(a, b): return {'passed': True}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_on_the_judge_is_paid(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    problem = Problem(DOUBLE.tests, seconds=3.0, memory=128 << 20)
    found = verdict_of(runner, backend, ATTACKS[name], problem)
    assert found.passed <= 1, found  # a constant is right once
    assert found.passed < len(problem.tests)
    assert verdict_of(runner, backend, "print(2 * int(input()))").passed == 3  # nothing is left of it


@pytest.mark.parametrize("name", CALL_ATTACKS)
def test_no_attack_on_a_call_is_paid(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    assert verdict_of(runner, backend, CALL_ATTACKS[name], ADD).passed == 0


@pytest.mark.parametrize(
    ("expected", "output", "whitespace", "tolerance", "same"),
    [
        ("1 2\n3\n", "1 2 \n3", "trailing", 0, True), ("1 2", "1  2", "trailing", 0, False),
        ("1 2", "1\n2", "all", 0, True), ("1\n", "1", "exact", 0, False), ("1", "1.1", "trailing", 1e-3, False),
        ("0.3", "0.30000000000000004", "trailing", 1e-9, True), ("nan", "nan", "trailing", 1e-9, True),
        ("inf", "1e999", "trailing", 1e-9, False), ("a 1", "b 1", "all", 0.1, False),
        ("", "", "trailing", 0, True), ("1", "", "trailing", 0, False), ("a\nb", "a\r\nb\r\n", "trailing", 0, True),
        ("a\nb", "a\r\nb", "exact", 0, False),
        ("a\nb", "a\u2028b", "trailing", 0, False), ("a", "\n a", "trailing", 0, False),
        ("a\nb", "a\n\nb", "trailing", 0, False), ("a\nb", "a\n\nb", "all", 0, True),
        ("1", "1.0", "trailing", 0, False),
        ("NaN", "-nan", "trailing", 1e-9, True), ("NaN", "-nan", "trailing", 0, False), ("nan", "0", "all", 0.5, False),
        ("inf", "Infinity", "trailing", 1e-9, True), ("inf", "-inf", "trailing", 0.9, False),
        ("10", "1_0", "all", 0.1, False),
        ("1000", "1000.9", "all", 1e-3, True), ("1000", "1001.1", "all", 1e-3, False),
        ("1", "\uff11", "all", 0.1, False),
        ("0.0001", "0", "all", 1e-3, True), ("1", "9e999", "all", 0.9, False), (".5", "5e-1", "all", 1e-9, True),
    ],
)  # fmt: skip
def test_outputs(expected: str, output: str, whitespace: Any, tolerance: float, same: bool) -> None:
    assert same_text(expected, output, whitespace, tolerance) is same


def test_values() -> None:
    assert same_value([1, {"a": 0.3}], [1.0, {"a": 0.1 + 0.2}], 1e-9)
    assert not same_value(1, True, 0.0)
    assert not same_value("1", 1, 0.0)
    assert not same_value([1], [1, 2], 0.0)
    assert not same_value({"a": 1}, {"b": 1}, 0.0)
    assert same_value(None, None, 0.0)
    assert same_value(float("nan"), float("nan"), 1e-9)
    assert not same_value(float("inf"), 10**400, 0.5)
    assert not same_value(1, 10**400, 0.5)  # no float holds it
    assert same_value("é", "é", 0.0)


NONE_FAILED = dict.fromkeys(FAILURES, 0.0)


def scored(runner: asyncio.Runner, reward: Any, answer: str, payload: dict[str, Any]) -> Verdict:
    task = Task.make("t", split="train", seed=0, payload=payload)
    episode = Episode(task, (user("?"), AssistantMessage((Text(answer),))), answer, (), "answer")
    return runner.run(judge(reward, episode))


def test_the_reward(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    tests = [{"input": "2", "output": "4"}, {"input": "3", "output": "6", "weight": 3}]
    answer = "First:\n```python\nprint(0)\n```\nBetter:\n```py\nprint(2 * int(input()))\n```\n```text\nno code\n```"
    right = scored(runner, code(sandbox=backend, seconds=20.0), answer, {"tests": tests})
    assert right == Verdict(1.0, {"code(all)": 1.0, "answered": 1.0, "compiles": 1.0, "passed": 1.0} | NONE_FAILED)
    half = "```\nprint(4)\n```"
    assert scored(runner, code(sandbox=backend, mode="fraction", seconds=20.0), half, {"tests": tests}).score == 0.5
    assert scored(runner, code(sandbox=backend, mode="weighted", seconds=20.0), half, {"tests": tests}).score == 0.25
    assert scored(runner, code(sandbox=backend, seconds=20.0), half, {"tests": tests}).score == 0.0
    assert scored(runner, code(sandbox=backend, mode="compiles"), "```\nprint(\n```", {"tests": tests}).score == 0.0
    assert scored(runner, code(sandbox=backend), "no block", {"tests": tests}).score == 0.0
    even = code(sandbox=backend, seconds=20.0, checker=lambda given, expected, said: int(said) % 2 == 0)
    assert scored(runner, even, "```\nprint(8)\n```", {"tests": tests}).score == 1.0


@pytest.mark.parametrize(
    ("payload", "message"),
    [({}, "tests"), ({"tests": []}, "there is no test"), ({"tests": [{"input": "1"}]}, "neither an input"),
     ({"tests": [{"arguments": [1], "expected": 1}]}, "is no name"),
     ({"tests": [{"input": "1", "output": "1", "weight": -1}]}, "the weight -1"),
     ({"tests": [{"input": "", "output": "1"}], "language": "cobol"}, "unknown language")],
)  # fmt: skip
def test_a_task_without_tests_is_an_error(runner: asyncio.Runner, payload: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=f"task 't' has no tests that can be run: .*{message}"):
        scored(runner, code(), "```\n1\n```", payload)


def test_fenced_blocks() -> None:
    assert fenced("a\n```Py x\n1\n```\n```\n2\n```  \n```c\nunclosed") == [("py", "1\n"), ("", "2\n")]
    assert fenced("~~~ c++\n```\n~~~\n") == [("c++", "```\n")]
    assert fenced("````{.python}\n```\n1\n```\n````") == [("python", "```\n1\n```\n")]
    assert fenced("1. so:\n   ```py\n   if 1:\n       2\n   ```\n") == [("py", "if 1:\n    2\n")]
    assert fenced("```js\r\nf()\r\n```\r\n") == [("js", "f()\n")]
    assert fenced("```a\n" * 200_000) == []  # none of them closes: each line is looked at once


@pytest.mark.parametrize(
    ("text", "program"),
    [("```py\n1\n```\n```py\n2\n```", "2\n"), ("```py\n1\n```\nIt prints:\n```\n4\n```", "1\n"), ("```\n1\n```", "1\n"),
     ("```java\n1\n```", None), ("print(1)", None), ("```py\n\n```", None), ("```py\n1", None),
     ("```java\n1\n```\n```\n2\n```", "2\n"), ("```PYTHON\nprint('é')\n```\n```js\n1\n```", "print('é')\n")],
)  # fmt: skip
def test_which_block_is_the_submission(text: str, program: str | None) -> None:
    assert submission(text, {"python", "py"}) == program


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown mode 'some'"):
        code(mode="some")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown rule 'second'"):
        code(second=1)
    for rules, message in (
        ({"seconds": 0}, "seconds = 0"), ({"memory": 1 << 20}, "python needs at least"), ({"language": "ada"}, "'ada'"),
        ({"memory": 64 << 20, "language": "c++"}, r"c\+\+ needs at least"), ({"whitespace": "some"}, "'some'"),
        ({"float_tolerance": 1}, "float_tolerance = 1"), ({"checker": 1}, "cannot be called"),
        ({"seconds": "1"}, "'1'"),
        ({"float_tolerance": 0.1, "whitespace": "exact"}, "compares the whole text"), ({"total_seconds": -1}, "-1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            code(**rules)
    for row, message in (
        ({"output": "a", "within": 0.1}, "goes with an output that is a number"),
        ({"arguments": [1], "expected": 2, "within": 0.1}, "goes with an output that is a number"),
        ({"output": "1", "within": -1}, "within = -1"), ({"output": "1", "within": "1"}, "within = '1' is no number"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Problem.of({"function": "f", "tests": [row]})
    with pytest.raises(ConfigError, match="problem= makes whole problems"):
        code(problem=lambda episode: DOUBLE, seconds=1.0)
