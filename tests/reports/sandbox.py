"""The python tool as people use it, and as hostile code does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.chat_server import Json, Step, call, chat_server, completion
from tests.processes import descendants, until, wait_gone
from tests.reports.envs import Coder
from tests.reports.place import Place, call_text, case, play, run


def printed(*codes: str, sandbox: str = "bubblewrap") -> Sequence[str]:
    """What the model sees of each of its runs, in one episode."""
    said = [call_text("python", json.dumps({"code": code})) for code in codes]
    _, *after = play(Coder(sandbox=sandbox, max_turns=20), Coder.tasks("test")[0], said)
    return ["\n".join(m.text for m in messages) for messages in after]


@case("H1-60")
def threads(place: Place) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import threading
together = threading.Barrier(32)
with ThreadPoolExecutor(32) as pool:
    print(sum(pool.map(lambda i: (together.wait(4), i)[1], range(32))))
"""
    assert printed(code, code, code) == ["496"] * 3


@case("H1-61")
def what_was_printed_before_the_limit(place: Place) -> None:
    (seen,) = printed("import time\nfor i in range(9):\n    print('step', i)\nwhile True: time.sleep(0.1)")
    assert seen.startswith("step 0\nstep 1\n")
    assert "step 8" in seen
    assert "stopped after" in seen


HOSTILE = (
    "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        time.sleep(600)",  # orphans
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('left')",  # holds stdout
    "import os\nfor _ in range(9):\n    if os.fork() == 0:\n        os._exit(0)\nprint('zombies')",
    "import os\nfor _ in range(400):\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "import os\nos.kill(-1, 9)",
    "with open('/work/full', 'wb') as f:\n    while True:\n        f.write(bytes(1 << 20))",
)


@case("H1-63")
def nothing_survives(place: Place) -> None:
    """The sandbox lives on after each, and no process of it after the trainer's SIGKILL."""
    look = "import os; os.system('rm -f /work/full'); print(6 * 7, sum(n.isdigit() for n in os.listdir('/proc')))"
    *seen, last = printed(*(code for hostile in HOSTILE for code in (hostile, look)))
    assert [*seen[1::2], last] == ["42 2"] * len(HOSTILE)  # the first process, and the one that looks
    with subprocess.Popen([sys.executable, "-c", TRAINER], env=os.environ | {"PYTHONPATH": ROOT}) as trainer:
        try:
            run(until(lambda: len(descendants(trainer.pid)) >= 6))  # bubblewrap's, and four of the code's
            below = descendants(trainer.pid)
        finally:
            trainer.send_signal(signal.SIGKILL)
    assert not wait_gone(below, 60)


ROOT = str(Path(__file__).parents[2])
TRAINER = """
import asyncio
from areal_agents import sandboxes
from areal_agents.sandbox import SandboxSpec

async def main():
    async with sandboxes.get("bubblewrap").session(SandboxSpec()) as sandbox:
        code = "import os, time; os.fork(); os.fork(); time.sleep(600)"
        await sandbox.exec(["/usr/bin/python3", "-c", code], timeout=600)

asyncio.run(main())
"""


@case("H1-65")
def packages_inside(place: Place) -> None:
    """By a Python with packages, which a page says how to set; the default has none."""
    folder = Path(tempfile.mkdtemp())  # not pytest's own, which nobody else may enter
    try:
        folder.chmod(0o755)
        with_packages(place, f"bubblewrap?python={environment(folder)}")
    finally:
        shutil.rmtree(folder)
    assert "ModuleNotFoundError: No module named 'sympy'" in printed("import sympy")[0]
    pages = Path(ROOT, "docs").glob("*.md")
    assert any("bubblewrap?python=" in page.read_text() for page in pages)


def with_packages(place: Place, setting: str) -> None:
    """The tool's code imports them, in an environment and by a command's setting."""
    code = "import numpy, sympy\nprint(sympy.factor('x**2 - 1'), numpy.arange(3).sum())"
    assert printed(code, sandbox=setting) == ["(x - 1)*(x + 1) 3"]
    with chat_server(solves) as server:
        place.eval("Coder", {"model": "openai:m", "url": server.url, "n": 1, "env.sandbox": setting})
    (episode,) = place.episodes("eval")
    assert episode.turns[1].observation[0].text == "1007"


def environment(folder: Path) -> Path:
    """A virtual environment with this one's numpy and sympy, as pip would install them."""
    venv.create(folder, symlinks=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for name in ("numpy", "numpy.libs", "sympy", "mpmath"):
        here = Path(sysconfig.get_path("purelib")) / name
        if here.is_dir():
            shutil.copytree(here, there / name, ignore=shutil.ignore_patterns("tests"))
    return folder


def solves(body: Json) -> Step:
    if body["messages"][-1]["role"] == "tool":
        return completion("done")
    code = json.dumps({"code": "import sympy\nprint(sympy.Integer(1000) + 7)"})
    return completion(None, finish="tool_calls", tool_calls=[call("python", code)])
