"""The python tool as people use it, and as hostile code does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
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
    _, *after = play(Coder(sandbox=sandbox), Coder.tasks("test")[0], said)
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
    pids = "import os; print(sum(n.isdigit() for n in os.listdir('/proc')))"
    for code in HOSTILE:
        *_, alive, processes = printed(code, "import os; os.system('rm -f /work/full'); print(6 * 7)", pids)
        assert (alive, int(processes)) == ("42", 2), code  # the first process, and the one that looks
    program = (
        "from tests.reports.sandbox import printed\n"
        "printed('import os, time\\nfor _ in range(2): os.fork()\\ntime.sleep(600)')"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], env=env) as trainer:
        try:
            run(until(lambda: len(descendants(trainer.pid)) >= 6))  # bubblewrap's, and four of the code's
            below = descendants(trainer.pid)
        finally:
            trainer.send_signal(signal.SIGKILL)
    assert not wait_gone(below, 60)


@case("H1-65")
def packages_inside(place: Place) -> None:
    """By a Python with packages, which a page says how to set; the default has none."""
    setting = f"bubblewrap?python={environment(place.folder / 'python')}"
    code = "import numpy, sympy\nprint(sympy.factor('x**2 - 1'), numpy.arange(3).sum())"
    assert printed(code, sandbox=setting) == ["(x - 1)*(x + 1) 3"]
    assert "ModuleNotFoundError: No module named 'sympy'" in printed("import sympy")[0]
    with chat_server(solves) as server:  # and as a setting of a command
        place.eval("Coder", {"model": "openai:m", "url": server.url, "n": 1, "env.sandbox": setting})
    (episode,) = place.episodes("eval")
    assert episode.turns[1].observation[0].text == "1007"
    pages = (Path(__file__).parents[2] / "docs").glob("*.md")
    assert any("bubblewrap?python=" in page.read_text() for page in pages)


def environment(folder: Path) -> Path:
    """A virtual environment with this one's numpy and sympy, as pip would install them."""
    venv.create(folder, symlinks=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for name in ("numpy", "numpy.libs", "sympy", "mpmath"):
        here = Path(sysconfig.get_path("purelib")) / name
        if here.is_dir():
            shutil.copytree(here, there / name, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    return folder


def solves(body: Json) -> Step:
    if body["messages"][-1]["role"] == "tool":
        return completion("done")
    code = json.dumps({"code": "import sympy\nprint(sympy.Integer(1000) + 7)"})
    return completion(None, finish="tool_calls", tool_calls=[call("python", code)])
