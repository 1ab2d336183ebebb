"""Each language in the real sandbox: what is right, what is wrong, and each way to fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.errors import SandboxUnavailable, TaskError
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rewards.code import languages
from areal_agents.rewards.code.judge import run_tests
from areal_agents.rewards.code.languages import LANGUAGES
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.rewards.code.reward import code
from areal_agents.sandbox import SandboxBackend
from areal_agents.types import AssistantMessage, Task, Text, user
from tests.conftest import require

PROGRAMS = {
    "python": {
        "right": "print(2 * int(input()), 'é')",
        "wrong": "print(int(input()) ** 2, 'é')",
        "error": "int(input()); raise ValueError",
        "broken": "print(",
        "loop": "while True: pass",
        "hog": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    },
    "c": {
        "right": '#include <stdio.h>\nint main(){int n;scanf("%d",&n);printf("%d é",2*n);}',
        "wrong": '#include <stdio.h>\nint main(){int n;scanf("%d",&n);printf("%d é\\n",n*n);}',
        "error": "int main(){*(volatile int*)0 = 1;}",
        "broken": "int main({",
        "loop": "int main(){for(volatile int i=0;;i++);}",
        "hog": "#include <stdlib.h>\n#include <string.h>\n"
        "int main(){for(;;){char*p=malloc(1<<24);if(!p)abort();memset(p,1,1<<24);}}",
    },
    "c++": {
        "right": '#include <iostream>\nint main(){int n;std::cin>>n;std::cout<<2*n<<" é\\n";}',
        "wrong": '#include <iostream>\nint main(){int n;std::cin>>n;std::cout<<n*n<<" é\\n";}',
        "error": "int main(){throw 1;}",
        "broken": "int main({",
        "loop": "int main(){for(volatile int i=0;;i++);}",
        "hog": "#include <vector>\nint main(){std::vector<std::vector<char>> v;for(;;)v.emplace_back(1<<24,1);}",
    },
    "javascript": {
        "right": "console.log(2 * Number(require('fs').readFileSync(0, 'utf8')), 'é')",
        "wrong": "console.log(Number(require('fs').readFileSync(0, 'utf8')) ** 2, 'é')",
        "error": "throw new Error()",
        "broken": "console.log(",
        "loop": "while (true);",
        "hog": "const x = []; while (true) x.push(Buffer.alloc(1 << 24, 1))",
    },
}
DOUBLE = (CodeTest("4 é\n", "2"), CodeTest("-6 é\n", "-3\n"))


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language(runner: asyncio.Runner, backend: SandboxBackend, language: str) -> None:
    require(LANGUAGES[language].compile[0])
    programs, problem = PROGRAMS[language], Problem(DOUBLE, language=language, seconds=20.0)
    tight = Problem(DOUBLE[:1], language=language, seconds=1.0, memory=192 << 20)

    def of(kind: str, problem: Problem = problem) -> tuple[str, ...]:
        found = runner.run(run_tests(programs[kind], problem, backend))
        assert found.compiled is (kind != "broken"), found
        return found.results

    assert of("right") == ("passed", "passed")
    assert of("wrong") == ("passed", "wrong")
    assert of("error") == ("error", "error")
    assert of("broken") == ()
    assert of("loop", tight) == ("timeout",)
    assert of("hog", tight)[0] in ("oom", "error", "timeout")  # where rlimits bound it, the program learns of it


def scored(runner: asyncio.Runner, reward: Any, answer: str, **payload: Any) -> Verdict:
    task = Task.make("t", split="train", seed=0, payload=payload)
    return runner.run(
        judge(reward, Episode(task, (user("?"), AssistantMessage((Text(answer),))), answer, (), "answer"))
    )


ONE = [{"output": "42"}]


def test_a_language_that_the_sandbox_does_not_have_is_told(
    runner: asyncio.Runner, backend: SandboxBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so before a submission is judged, and costs no episode its reward."""
    entry = languages.Language("main.x", ("xc", "main.x"), ("./main",), frozenset({"x"}), "42", "apt-get install xc")
    monkeypatch.setitem(LANGUAGES, "x", entry)
    with pytest.raises(SandboxUnavailable, match=r"'bubblewrap' .* cannot build and run x: xc: .*apt-get install xc"):
        scored(runner, code(sandbox=backend, language="x"), "```x\n42\n```", tests=ONE)


def test_only_compiling(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    """It needs no tests, and runs nothing."""
    compiles = code(sandbox=backend, mode="compiles")
    assert scored(runner, compiles, "```py\nwhile True: pass\n```").components == {
        "code(compiles)": 1.0, "answered": 1.0, "compiles": 1.0,
    }  # fmt: skip
    assert scored(runner, compiles, "```py\n1 +\n```").score == 0.0
    assert scored(runner, compiles, "1 + 1").components == {"code(compiles)": 0.0, "answered": 0.0, "compiles": 0.0}
    require("cc")
    assert scored(runner, compiles, "```c\nint main(){}\n```", language="C").score == 1.0
    assert scored(runner, compiles, "```py\nint main(){}\n```", language="C").score == 0.0


def test_tests_stop_at_the_first_failure_where_all_must_pass(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    tests = [
        {"output": "42"},
        {"output": "1", "weight": 0},
        {"output": "42", "weight": 3},
        {"output": "2", "weight": 4},
    ]
    reward = code(sandbox=backend, seconds=20.0)
    found = scored(runner, reward, "```\nprint(42)\n```", tests=tests)
    assert (found.score, found.components["passed"], found.components["wrong"]) == (0.0, 0.25, 0.25)
    scores = {m: code(sandbox=backend, seconds=20.0, mode=m) for m in ("fraction", "weighted")}
    assert scored(runner, scores["fraction"], "```\nprint(42)\n```", tests=tests).score == 0.5
    assert scored(runner, scores["weighted"], "```\nprint(42)\n```", tests=tests).score == 0.5
    assert scored(runner, scores["weighted"], "```\nprint(2)\n```", tests=tests).score == 0.5


def test_a_whole_submission_has_a_bound(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    """The first test takes all the time, so the others are not run."""
    reward = code(sandbox=backend, mode="fraction", seconds=1.0, total_seconds=0.5)
    found = scored(runner, reward, "```\nimport time; time.sleep(60)\n```", tests=ONE * 50)
    assert (found.components["timeout"], found.status) == (1.0, "timeout")


def test_checkers(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    async def even(given: str, expected: str, output: str) -> bool:
        await asyncio.sleep(0)
        return int(output) % 2 == 0

    def blocks(given: str, expected: str, output: str) -> bool:
        asyncio.run(asyncio.sleep(0.2))  # a loop of its own, as blocking code may have
        return output == "8\n"

    def hangs(given: str, expected: str, output: str) -> bool:
        asyncio.run(asyncio.sleep(3600 * (output == "8\n")))
        return True

    eight, word = "```\nprint(8)\n```", "```\nprint('x')\n```"
    for checker in (even, blocks):
        assert scored(runner, code(sandbox=backend, seconds=20.0, checker=checker), eight, tests=ONE).score == 1.0
    odd = scored(runner, code(sandbox=backend, seconds=20.0, checker=even), word, tests=ONE)
    assert (odd.score, odd.status, odd.components["checker_error"]) == (0.0, "unverifiable", 1.0)
    late = code(sandbox=backend, seconds=20.0, checker=hangs, checker_seconds=0.3)
    assert scored(runner, late, eight, tests=ONE).status == "unverifiable"
    unsure = code(sandbox=backend, seconds=20.0, checker=lambda given, expected, output: None if "8" in output else 0)
    assert scored(runner, unsure, eight, tests=ONE).status == "unverifiable"
    broken = code(sandbox=backend, seconds=20.0, checker=lambda given, expected, output: expected[9] in output)
    with pytest.raises(TaskError, match=r"its checker raised IndexError.*, whatever the output is"):
        scored(runner, broken, eight, tests=ONE)


def test_a_checker_of_values(runner: asyncio.Runner, backend: SandboxBackend) -> None:
    def divides(arguments: list[int], expected: int, value: int) -> bool:
        return value > 1 and arguments[0] % value == 0

    reward = code(sandbox=backend, seconds=20.0, checker=divides)
    tests = {"function": "f", "tests": [{"arguments": [15], "expected": 3}]}
    assert scored(runner, reward, "```\ndef f(n): return 5\n```", **tests).score == 1.0
    assert scored(runner, reward, "```\ndef f(n): return 4\n```", **tests).score == 0.0
    assert (
        scored(runner, reward, "```\nprint('no value'); raise SystemExit\ndef f(n): return 5\n```", **tests).score
        == 0.0
    )


@pytest.mark.parametrize(
    ("expected", "program", "rules"),
    [
        ("x" * 3_000_000, "print('x' * 3_000_000)", {}),  # more than what a test may print beside it
        ("žluť 😀\r\n2", "print('žluť 😀'); print(2, end='')", {}),
        ("nan inf -inf 0.3333", "print(float('nan'), float('inf'), -float('inf'), 1/3)", {"float_tolerance": 1e-3}),
        ("", "pass", {}),
    ],
)  # fmt: skip
def test_outputs_of_programs(
    runner: asyncio.Runner, backend: SandboxBackend, expected: str, program: str, rules: dict[str, Any]
) -> None:
    reward = code(sandbox=backend, seconds=20.0, **rules)
    assert scored(runner, reward, f"```py\n{program}\n```", tests=[{"output": expected}]).score == 1.0
    assert scored(runner, reward, f"```py\nprint(7)\n{program}\n```", tests=[{"output": expected}]).score == 0.0
