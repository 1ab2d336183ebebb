"""What one test of a submission leaves behind: the next finds the built program alone, and nobody is charged for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.errors import SandboxError, TaskError
from areal_agents.reward import Episode
from areal_agents.rewards.code.judge import run_tests
from areal_agents.rewards.code.languages import LANGUAGES
from areal_agents.rewards.code.problem import CodeTest, Problem, same_value
from areal_agents.rewards.code.reward import code
from areal_agents.rewards.code.toolchain import require_language
from areal_agents.sandbox import SandboxBackend, SandboxSpec
from areal_agents.types import Task
from tests.conftest import require

DOUBLE = Problem((CodeTest("4", "2"), CodeTest("-6", "-3"), CodeTest("0", "0")), seconds=20.0)
RIGHT = "\nprint(2 * int(input()))"
COUNTER = """
import os
n = int(open(0).read())
ran = int(open(PATH).read()) if os.path.exists(PATH) else 0
open(PATH, "w").write(str(ran + 1))
print(["4", "-6", "0"][ran])
"""
DAMAGE = {
    "a folder in its place": "import os; os.remove('main.py'); os.mkdir('main.py')",
    "a link in its place": "import os; os.remove('main.py'); os.symlink('/dev/null', 'main.py')",
    "a pipe in its place": "import os; os.remove('main.py'); os.mkfifo('main.py')",
    "its file closed": "import os; os.chmod('main.py', 0)",
    "its folder closed": "import os; os.makedirs('a/b'); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0)",
    "the other folders closed": "import os; os.chmod('/tmp', 0); os.chmod('/dev/shm', 0)",
    "a full disk": "import os\nos.remove('main.py')\nfor i in range(20):\n  try: open(f'{i}', 'wb').write(b'x' << 20)\n"
    "  except Exception: open(f'{i}', 'wb').write(b'x' * 1000000) if i < 15 else None",
    "folders in folders": "import os\nfor i in range(3000): os.mkdir('.moved0'); os.chdir('.moved0')",
    "many files": "for i in range(3000): open(f'{i}', 'w')",
}


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


@pytest.mark.parametrize("path", ["/work/ran", "/tmp/ran", "/dev/shm/ran"])
def test_no_test_knows_of_the_one_before(runner: asyncio.Runner, backend: SandboxBackend, path: str) -> None:
    source = COUNTER.replace("PATH", repr(path))
    assert runner.run(run_tests(source, DOUBLE, backend)).results == ("passed", "wrong", "wrong")


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_gone_before_the_next_test(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    assert runner.run(run_tests(DAMAGE[name] + RIGHT, DOUBLE, backend)).results == ("passed",) * 3


def test_a_built_program_is_put_back_too(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    require("cc")
    source = (
        "#include <stdio.h>\n#include <unistd.h>\n"
        'int main(){int n;scanf("%d",&n);printf("%d\\n",2*n);unlink("main");unlink("main.c");return 0;}'
    )
    problem = Problem(DOUBLE.tests, language="c", seconds=20.0, memory=96 << 20)  # less than a compiler may need
    assert runner.run(run_tests(source, problem, backend)).results == ("passed",) * 3


def test_tests_behind_a_failed_one_are_skipped(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    found = runner.run(run_tests("print(4)", DOUBLE, backend, stop_early=True))
    assert found.results == ("passed", "wrong", "skipped")


def test_a_compiler_has_time_and_memory_of_its_own(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    require("c++")
    source = "#include <bits/stdc++.h>\nint main(){int n;std::cin>>n;std::cout<<2*n;}"
    problem = Problem(DOUBLE.tests, language="c++", seconds=0.9, memory=96 << 20)
    found = runner.run(run_tests(source, problem, backend))
    assert found.compiled, found


def test_a_long_answer_fits(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    problem = Problem((CodeTest("x" * 3_000_000, ""),), seconds=20.0)
    assert runner.run(run_tests("print('x' * 3_000_000)", problem, backend)).results == ("passed",)


def test_time_that_right_tests_take_is_not_counted(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    problem = Problem(DOUBLE.tests, seconds=20.0, total_seconds=0.1)
    source = "import time\ntime.sleep(0.2)"
    assert runner.run(run_tests(source + RIGHT, problem, backend)).results == ("passed",) * 3
    assert runner.run(run_tests(source, problem, backend)).results == ("wrong", "timeout", "timeout")


@pytest.mark.parametrize(
    ("payload", "made", "message"),
    [({"function": "f", "tests": [{"arguments": None, "expected": "1"}]}, None, "test 0 is neither"),
     ({"tests": [{"input": "", "output": ""}]}, lambda episode: "a text", "made 'a text', which is no Problem")],
)  # fmt: skip
def test_what_is_no_problem_is_the_task_s_fault(payload: dict[str, Any], made: Any, message: str) -> None:
    episode = Episode(Task.make("t", split="train", seed=0, payload=payload), (), None, (), "answer")
    with pytest.raises(TaskError, match=message):
        code(problem=made).problem(episode)


def test_numbers_that_only_look_equal() -> None:
    assert not same_value(2**53 + 1, 2**53, 0.0)  # as floats they are
    assert not same_value(1, 10**400, 1e-6)  # no float holds it
    assert same_value(float("nan"), float("nan"), 0.0)
    assert not same_value(float("nan"), 1, 0.5)


def test_native_recursion_may_be_deep(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    require("cc")
    source = (
        "#include <stdio.h>\nint f(volatile int n){char b[64];b[0]=n;return n==0?0:f(n-1)+1+(b[0]-b[0]);}\n"
        'int main(){int n;scanf("%d",&n);f(500000);printf("%d\\n",2*n);}'
    )
    assert runner.run(run_tests(source, Problem(DOUBLE.tests, language="c", seconds=20.0), backend)).passed == 3


def test_a_busy_host_is_no_missing_compiler(
    runner: asyncio.Runner, backend: SandboxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = replace(LANGUAGES["python"], compile_seconds=0.001)
    monkeypatch.setitem(LANGUAGES, "python", language)
    with pytest.raises(SandboxError, match="python could not be tried: timeout"):
        runner.run(require_language("python", backend))
    found = runner.run(run_tests("print()", DOUBLE, backend))
    assert (found.compiled, found.build, found.detail) == (False, "timeout", "timeout")


@pytest.mark.parametrize("name", DAMAGE)
def test_a_session_is_restored_whatever_was_done_to_it(
    runner: asyncio.Runner, backend: SandboxBackend, name: str
) -> None:
    async def left() -> bytes:
        async with backend.session(SandboxSpec()) as sandbox:
            await sandbox.write_file("main.py", b"print(1)")
            kept = await sandbox.snapshot()
            await sandbox.exec(["python3", "-c", DAMAGE[name]], timeout=30)
            await sandbox.restore(kept)
            listed = "import os; print([os.listdir(d) for d in ('/work', '/tmp', '/dev/shm')])"
            return (await sandbox.exec(["python3", "-c", listed], timeout=30)).stdout

    assert runner.run(left()) == b"[['main.py'], [], []]\n"


def test_a_test_has_the_memory_of_its_problem(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    problem = Problem(DOUBLE.tests[:1], seconds=20.0, memory=96 << 20)
    source = "x = bytearray(400 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1"
    assert runner.run(run_tests(source + RIGHT, problem, backend)).results in (("oom",), ("error",))
    assert runner.run(run_tests(source + RIGHT, Problem(DOUBLE.tests[:1], seconds=20.0), backend)).passed == 1
