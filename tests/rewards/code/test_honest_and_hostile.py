"""Right programs in styles that are legal and odd, and more ways to be paid without solving anything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from areal_agents import sandboxes
from areal_agents.rewards.code.judge import CodeVerdict, run_tests
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.sandbox import SandboxBackend
from tests.conftest import require

DOUBLE = Problem((CodeTest("4\n", "2\n"), CodeTest("-6\n", "-3\n")), seconds=20.0)
ADD = Problem((CodeTest(3, arguments=[1, 2]), CodeTest([1], arguments=[[], [1]])), function="add", seconds=20.0)
PROGRAMS = {
    "a main guard": "def main():\n  import sys\n  for n in sys.stdin.buffer: print(int(n) * 2)\n"
    "if __name__ == '__main__': main()",
    "until the end": "while True:\n  try: print(2 * int(input()))\n  except EOFError: break",
    "descriptor 0": "import sys; print(int(open(0).read()) * 2); sys.exit(0)",
    "a deep thread": "import sys, threading\nsys.setrecursionlimit(10**7)\nthreading.stack_size(1 << 28)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\ndef main(): n = int(input()); f(50000); print(2 * n)\n"
    "t = threading.Thread(target=main); t.start(); t.join()",
    "deep in C": "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10**6)\n@lru_cache(None)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nn = int(input()); f(50000); print(2 * n)",
    "many threads": "import threading\nout = []\nn = int(input())\n"
    "ts = [threading.Thread(target=out.append, args=(n,)) for _ in range(40)]\n"
    "[t.start() for t in ts]; [t.join() for t in ts]\nprint(sum(out) // 20)",
    "a pool": "from multiprocessing import Pool\ndef f(x): return 2 * x\nif __name__ == '__main__':\n"
    "  with Pool(2) as p: print(p.map(f, [int(input())])[0])",
    "asyncio": "import asyncio\nasync def main(): print(2 * int(input()))\nasyncio.run(main())",
    "no numpy": "try: import numpy\nexcept ImportError: numpy = None\nprint(2 * int(input()))",
    "pieces": "def g(n): yield from str(2 * n)\nprint(*g(int(input())), sep='', end='')",
    "a file of its own": "open('/tmp/n', 'x').write(input()); print(2 * int(open('/tmp/n').read()))",
    "notes on stderr": "import sys; print('note', file=sys.stderr); print(2 * int(input()), flush=True)",
    "Windows": "\ufeff# -*- coding: utf-8 -*-\r\nn = int(input())\r\nprint(2 * n)\r\n",
}
FUNCTIONS = {
    "a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
    "class A:\n  x: int\n"
    "def add(a, b): return A(a + b).x",
    "a copy by pickle": "import pickle\nclass A: pass\ndef add(a, b):\n  x = A(); x.v = a + b\n"
    "  return pickle.loads(pickle.dumps(x)).v",
    "a method": "class Solution:\n  def add(self, a, b): return a + b",
    "a function beside a class": "class Solution: pass\nadd = lambda a, b: a + b",
    "notes": "import os\ndef add(a, b):\n  print('note'); os.system('echo note'); os.write(1, b'note'); return a + b",
    "a tuple": "def add(a, b): return (*a, *b) if isinstance(a, list) else a + b",
}
_OUT = (
    "import os, sys\ndef add(a, b):\n  out = sys._getframe(1).f_locals['out']; out.write(%r); out.flush(); os._exit(0)"
)
CALLS = {
    "reads frames and objects": "import gc, sys\ndef add(a, b):\n  f, seen = sys._getframe(), []\n"
    "  while f: seen.append(repr(f.f_locals)); f = f.f_back\n"
    "  return next((o['expected'] for o in gc.get_objects() if isinstance(o, dict) and 'expected' in o), seen)",
    "traces": "import sys\ndef t(f, e, a): f.f_locals.update(found=3); return t\nsys.settrace(t)\n"
    "def add(a, b): return None",
    "an int of its own": "class I(int):\n  __repr__ = __str__ = lambda s: '3'\n  __eq__ = lambda s, o: True\n"
    "def add(a, b): return I(9)",
    "a list of its own": "class L(list):\n  __eq__ = lambda s, o: True\n  __len__ = lambda s: 1\n"
    "def add(a, b): return L()",
    "every descriptor": "import os\ndef add(a, b):\n  for i in range(256):\n"
    "    try: os.write(i, b'{\"passed\": true}')\n"
    "    except OSError: pass\n  return True",
    "a report": "def add(a, b): return {'expected': 3, 'passed': True, 'score': 1}",
    "not a number": "def add(a, b): return float('nan')",
    "infinite": _OUT % "1e999", "many digits": _OUT % ("9" * 5000), "deep": _OUT % ("[" * 100_000),
    "both": _OUT % "3 [1]",
    "leaves while imported": "raise SystemExit(0)",
}  # fmt: skip
PROCESSES = {
    "reads other processes": "import os\nfor p in os.listdir('/proc'):\n"
    "  for f in ('cmdline', 'environ', 'maps', 'mem'):\n"
    "    try: print(open(f'/proc/{p}/{f}').read(300))\n    except OSError: pass",
    "signals pid 1": "import os\nfor s in range(1, 65):\n  try: os.kill(1, s)\n  except OSError: pass\nprint(4)",
    "prints at exit": "import atexit, os\natexit.register(lambda: (print('4', flush=True), os._exit(0)))",
    "a daemon for the next test": "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    "    for i in range(20):\n      for p in os.listdir('/proc'):\n"
    "        try: open(f'/proc/{p}/fd/1', 'w').write('-6')\n"
    "        except OSError: pass\n      time.sleep(0.05)\n  os._exit(0)\nprint(4)",
    "slows pid 1": "import os\nos.setpriority(os.PRIO_PROCESS, 1, 19)\n"
    "os.sched_setaffinity(1, {min(os.sched_getaffinity(1))})\nprint(4)",
    "bytes that are no text": "import sys; sys.stdout.buffer.write(b'4\\x00\\xff')",
    "its environment": "import os, sys; print(os.environ, sys.argv, sys.orig_argv)",
}  # fmt: skip
C_FILES = {
    "includes a file": '#include "/etc/passwd"\nint main(){}',
    "embeds a file": 'asm(".incbin \\"/proc/self/environ\\"");\n#include <stdio.h>\nint main(){puts("4");}',
    "rewrites its program": "#include <stdio.h>\n#include <unistd.h>\n#include <sys/stat.h>\n"
    "int main(){unlink(\"main\");"
    "FILE*f=fopen(\"main\",\"w\");fputs(\"#!/bin/sh\\necho -6\\n\",f);fclose(f);chmod(\"main\",0755);puts(\"4\");}",
}  # fmt: skip


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


def found(runner: asyncio.Runner, backend: SandboxBackend, source: str, problem: Problem) -> CodeVerdict:
    return runner.run(run_tests(source, problem, backend))


@pytest.mark.parametrize("name", PROGRAMS)
def test_right_programs_pass(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    assert found(runner, backend, PROGRAMS[name], DOUBLE).results == ("passed", "passed")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_functions_pass(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    assert found(runner, backend, FUNCTIONS[name], ADD).results == ("passed", "passed")


@pytest.mark.parametrize("name", CALLS)
def test_no_hostile_function_is_paid(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    assert found(runner, backend, CALLS[name], ADD).passed == 0


@pytest.mark.parametrize("name", PROCESSES)
def test_no_hostile_program_is_paid(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    assert found(runner, backend, PROCESSES[name], DOUBLE).results[1] == "wrong"


@pytest.mark.parametrize("name", C_FILES)
def test_no_hostile_c_is_paid(runner: asyncio.Runner, backend: SandboxBackend, name: str) -> None:
    require("cc")
    problem = Problem(DOUBLE.tests, language="c", seconds=20.0)
    verdict = found(runner, backend, C_FILES[name], problem)
    assert not verdict.compiled or verdict.results[1] == "wrong"
