from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from areal_agents.errors import EnvError
from areal_agents.utils.sync import background_loop, run_sync


async def double(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


async def where() -> tuple[int, bool]:
    return id(asyncio.get_running_loop()), threading.current_thread() is threading.main_thread()


def test_results_and_errors_come_back() -> None:
    async def broken() -> None:
        raise KeyError("k")

    assert run_sync(double(4)) == 8
    with pytest.raises(KeyError, match="k"):
        run_sync(broken())


def test_sys_exit_in_a_task_comes_back_as_an_error() -> None:
    async def leave() -> None:
        sys.exit(3)

    async def in_the_middle() -> None:
        await asyncio.gather(leave())

    for ends in (leave, in_the_middle):
        with pytest.raises(RuntimeError, match=r"it called sys\.exit\(3\)"):
            run_sync(ends())
    assert run_sync(double(4)) == 8


def test_one_loop_in_a_thread_of_its_own() -> None:
    assert run_sync(where()) == run_sync(where()) == (id(background_loop()), False)


def test_works_inside_another_running_loop() -> None:
    async def main() -> int:
        return run_sync(double(3))

    assert asyncio.run(main()) == 6


def test_a_call_from_its_own_loop_raises_instead_of_waiting_for_itself() -> None:
    async def nested() -> int:
        return run_sync(double(1))

    with pytest.raises(EnvError, match="await areset/astep/aclose instead"):
        run_sync(nested())


_FORK = """
import asyncio, os, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*multi-threaded.*fork.*", DeprecationWarning)
from areal_agents.utils.sync import background_loop, run_sync
async def pid():
    await asyncio.sleep(0)
    return os.getpid()
assert run_sync(pid()) == os.getpid()
child = os.fork()
if child == 0:
    ok = run_sync(pid()) == os.getpid()
    os._exit(0 if ok else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run_sync(pid()) == os.getpid()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_a_loop_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_hooks_run_on_the_loop() -> None:
    code = (
        "import asyncio; from areal_agents.utils.sync import background_loop, on_exit, run_sync\n"
        "async def bad(): raise OSError\n"
        "async def hook(): print(await asyncio.to_thread(abs, -7), asyncio.get_running_loop() is background_loop())\n"
        "async def nothing(): asyncio.create_task(asyncio.sleep(3600))\n"
        "on_exit(bad); on_exit(hook); on_exit(hook); run_sync(nothing()); print('end')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("end\n7 True\n", "")
