"""The docker backend with a real engine: the suite, images, what a dead run leaves, and an engine that goes away."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import areal_agents
from areal_agents import sandboxes
from areal_agents.cli.main import main
from areal_agents.envs.arithmetic import Arithmetic
from areal_agents.errors import ConfigError, RegistryError, SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec, open_console
from areal_agents.sandboxes import docker_backend, docker_containers, docker_engine, docker_image
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.sandboxes.subject import SPEC, run, value
from areal_agents.sandboxes.suite import Finding
from areal_agents.tools.bash import bash
from areal_agents.tools.files import FILE_TOOLS
from areal_agents.tools.python import python
from tests.envs.test_arithmetic import InSession, demonstrate
from tests.sandboxes.engines import containers, play
from tests.sandboxes.test_backends import ROOT
from tests.sandboxes.test_suite import NAMES, check, fail_unless_good
from tests.tools.sessions import call
from tests.tools.sessions import play as play_tools
from tests.tools.test_files import TRAPS

pytestmark = pytest.mark.docker


@pytest.fixture(scope="session")
def findings(engine: Any) -> dict[str, Finding]:
    return check("docker")


@pytest.mark.parametrize("name", NAMES)
def test_docker(name: str, findings: dict[str, Finding]) -> None:
    fail_unless_good(findings[name])


def test_the_suite_left_no_container(engine: Any, findings: dict[str, Finding]) -> None:
    assert containers(engine) == []


@pytest.fixture(scope="session")
def without_python(engine: Any) -> Iterator[str]:
    """An image that has a shell of its own and no Python, a variable, a file, and declares a volume."""
    whole, sink = io.BytesIO(docker_image.root_file_system()), io.BytesIO()
    with tarfile.open(fileobj=whole) as old, tarfile.open(fileobj=sink, mode="w") as new:
        for member in old:
            if "python" not in member.name:
                new.addfile(member, old.extractfile(member) if member.isreg() else None)
        mark = tarfile.TarInfo("opt/mark")
        mark.size, mark.mode = 5, 0o644
        new.addfile(mark, io.BytesIO(b"mine\n"))
    name = "areal-test-without-python:1"
    changes = ["ENV PATH=/opt/tools:/usr/bin:/bin", "VOLUME /data", 'ENTRYPOINT ["/bin/false"]']
    engine.api.import_image_from_data(sink.getvalue(), repository="areal-test-without-python", tag="1", changes=changes)
    yield name
    engine.images.remove(name, force=True)


def test_any_image(without_python: str) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(image=without_python)) as sandbox:
            script = "cat /opt/mark; echo $PATH; echo x > /data/x; command -v python3 || echo none; echo $HOME"
            done = await sandbox.exec(["/bin/sh", "-c", script], timeout=60)
            assert done.stdout.decode().split("\n") == ["mine", "/opt/tools:/usr/bin:/bin", "none", "/work", ""]
            assert b"/data/x" in done.stderr
            await sandbox.write_file("a", b"1")
            await sandbox.restore(await sandbox.snapshot())
            assert await sandbox.read_file("a", 10) == b"1"
            missing = await sandbox.exec(["python3", "-c", "1"], timeout=60)
            assert (missing.status, missing.exit_code) == ("error", 127)
        async with backend.session(SandboxSpec()) as sandbox:  # the spec's image is its own alone
            assert (await run(sandbox, "print(1)")).stdout == b"1\n"

    play(calls)


def test_an_image_of_the_backend(without_python: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async def calls(backend: DockerBackend) -> None:
        await backend.prepare([SandboxSpec(image=without_python)])
        async with backend.session(SandboxSpec()) as sandbox:
            assert (await sandbox.exec(["cat", "/opt/mark"], timeout=60)).stdout == b"mine\n"

    play(calls, image=without_python)
    program = tmp_path / "x.py"
    program.write_text("print(6 * 7)")
    assert main(["sandbox", "exec", "docker", str(program)]) == 0
    assert json.loads(capsys.readouterr().out)["stdout"] == "42\n"
    assert main(["sandbox", "exec", "docker", str(program), "--image", without_python]) == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 127


def test_an_image_that_cannot_be_had(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(image="areal-test/none:1")) as sandbox:
            with pytest.raises(SandboxUnavailable, match="image 'areal-test/none:1' cannot be had"):
                await run(sandbox, "")

    play(calls)


@pytest.mark.parametrize("name", ["bubblewrap", "unsafe_local"])
def test_a_sandbox_without_images_refuses_one(name: str) -> None:
    async def whole() -> None:
        async with sandboxes.get(name).session(SandboxSpec(image="x")):
            raise AssertionError("opened")

    with pytest.raises(ConfigError, match="has no images, and image 'x'"):
        asyncio.run(whole())


def test_limits_reach_the_engine(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(memory=300 << 20, disk=8 << 20, processes=7)) as sandbox:
            await run(sandbox, "")
            (container,) = containers(engine)
            settings = container.attrs["HostConfig"]
            assert settings["Memory"] == settings["MemorySwap"] == 300 << 20
            assert (settings["PidsLimit"], settings["NanoCpus"]) == (8 + docker_containers.SPARE_PLACES, 500_000_000)
            assert (settings["NetworkMode"], settings["ReadonlyRootfs"], settings["CapDrop"]) == ("none", True, ["ALL"])
            assert settings["Privileged"] is False
            assert container.attrs["Config"]["User"].partition(":")[0].isdigit()
            assert "no-new-privileges:true" in settings["SecurityOpt"]
            assert await value(sandbox, "import os; print(os.getuid())") >= 10_000

    play(calls, cpus="0.5")


_HOST = """
import asyncio, sys
from areal_agents.envs.arithmetic import Arithmetic
from areal_agents.sandbox import SandboxSpec, open_console
from areal_agents.sandboxes.docker_backend import DockerBackend

async def main():
    backend = DockerBackend(pool=1)
    async with backend.session(SandboxSpec()) as sandbox:
        await sandbox.spawn(["/bin/cat"])
        await sandbox.exec(["/bin/true"], timeout=60)
        # The engine ends the making of a container whose client is gone: none is under way when this is killed.
        await asyncio.gather(*backend._pool._warm[next(iter(backend._pool._warm))])
        print("runs", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_killed_run_leaves_nothing_that_runs_and_the_next_one_removes_it(engine: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOST], cwd=ROOT, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"runs\n"
        host.send_signal(signal.SIGKILL)
    left = containers(engine)
    assert left  # which shows that there is something to remove
    for container in left:
        # Pid 1 reads the end of its stream, and leaves: nothing of the run goes on.
        if container.status == "running":
            assert container.wait(timeout=60)["StatusCode"] in (0, 137)

    async def calls(backend: DockerBackend) -> None:
        assert "dead runs had left" in " ".join((await backend.probe()).notes)

    docker_backend._reports.clear()
    play(calls)
    assert containers(engine) == []


def test_only_what_ran_here_and_is_dead_is_an_orphan() -> None:
    mine = docker_engine.owner()
    machine, pid, started = mine.split(" ")
    assert not docker_engine.orphaned(mine)
    assert docker_engine.orphaned(f"{machine} {pid} {int(started) + 1}")  # the number is another process's by now
    assert not docker_engine.orphaned(f"elsewhere/1 {pid} 1")
    assert not docker_engine.orphaned("")


def test_a_dead_container_is_an_error_and_leaves_the_pool(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SPEC) as sandbox:
            process = await sandbox.spawn(["/bin/cat"])
            call = asyncio.ensure_future(run(sandbox, "import time; time.sleep(600)", timeout=600))
            await process.send(b"x")
            assert await process.recv(1, timeout=60) == b"x"
            await asyncio.gather(*backend._pool._warm[next(iter(backend._pool._warm))])
            for container in containers(engine):
                container.kill()
            with pytest.raises(SandboxError, match=r"died during the call|has ended"):
                await call
            with pytest.raises(SandboxError, match="Open a new session"):
                await run(sandbox, "")
        async with backend.session(SPEC) as sandbox:
            assert (await run(sandbox, "print(1)")).stdout == b"1\n"

    play(calls, pool=1)
    assert containers(engine) == []


WAITS = "import time; print('x', flush=True); time.sleep(600)"
TAKES = "echo 0 > /proc/self/oom_score_adj; head -c 1; exec dd if=/dev/zero of=/work/x bs=64k count=240"


def test_a_container_killed_for_its_memory_is_told_from_one_that_was_killed(engine: Any) -> None:
    """Code that has undone what makes the kernel prefer it fills the memory with files: pid 1 is the largest then."""

    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SPEC) as sandbox:
            await run(sandbox, "")
            (container,) = containers(engine)
            container.update(mem_limit="18m", memswap_limit="18m")
            assert (await sandbox.exec(["sh", "-c", TAKES], stdin=b"x", timeout=60)).status == "oom"
            with pytest.raises(SandboxError, match="Open a new session"):
                await run(sandbox, "")
        for before in ("print(1)", "b = bytearray(2 << 30)"):  # what was killed before is not the reason
            async with backend.session(SPEC) as sandbox:
                assert (await run(sandbox, before)).status == ("ok" if before == "print(1)" else "oom")
                call = asyncio.ensure_future(run(sandbox, WAITS, timeout=600))
                begun = sandbox._holder._calls  # type: ignore[attr-defined]
                while not any(one.stdout for one in begun.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                (container,) = containers(engine)
                container.kill()
                with pytest.raises(SandboxError, match="died during the call"):
                    await call

    play(calls)
    assert containers(engine) == []


def test_pid_1_that_hangs_is_ended_by_the_watchdog(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.sandboxes.container.GRACE", 0.5)

    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SPEC) as sandbox:
            await run(sandbox, "")
            (container,) = containers(engine)
            container.pause()
            start = time.monotonic()
            done = await run(sandbox, "print(1)", timeout=0.5)
            assert (done.status, done.stdout) == ("timeout", b"")
            assert time.monotonic() - start < 60
            with pytest.raises(SandboxError, match="Open a new session"):
                await run(sandbox, "")

    play(calls)
    assert containers(engine) == []


def test_a_cancelled_start_leaves_no_container(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        await backend.probe()
        for wait in (0.0, 0.05, 0.15, 0.3):
            async with backend.session(SPEC) as sandbox:
                call = asyncio.ensure_future(run(sandbox, ""))
                await asyncio.sleep(wait)
                call.cancel()
                await asyncio.wait((call,))

    play(calls)
    assert containers(engine) == []


def test_live_output_is_taken_as_it_is_asked_for(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SPEC) as sandbox:
            code = "import os\nwhile True: os.write(1, b'x' * 65536)"
            process = await sandbox.spawn(["python3", "-I", "-c", code])
            assert await process.recv(1, timeout=60) == b"x"
            await run(sandbox, "import time; time.sleep(0.5)")
            held = process._call.stdout  # type: ignore[attr-defined]
            assert len(held) <= 1 << 18  # the rest waits inside
            got = 0
            while got < 1 << 20:
                data = await process.recv(1 << 16, timeout=60)
                assert data
                got += len(data)
            await process.kill()

    play(calls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "unix:///nowhere/sock"}, "no engine answers at unix:///nowhere/sock"),
        ({"host": "tcp://127.0.0.1:9"}, "no engine answers"),
        ({"runtime": "no-such-runtime"}, "has no runtime 'no-such-runtime', only .*runc.*daemon.json"),
        ({"runtime": "runsc"}, "has no runtime 'runsc', only .*runc.*gvisor.dev/docs/user_guide/install"),
    ],
)
def test_what_is_refused(options: dict[str, str], message: str, engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        with pytest.raises(SandboxUnavailable, match=message):
            await backend.probe()

    play(calls, **options)


def test_settings_are_checked() -> None:
    for cpus in ("x", "0", "-1", "nan", "1e9"):
        with pytest.raises(RegistryError, match="write a number"):
            sandboxes.get(f"docker?cpus={cpus}")
    with pytest.raises(ValueError, match="pool must be"):
        DockerBackend(pool=-1)


def test_consoles_live_in_a_container(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec()) as sandbox:
            python, shell = await open_console(sandbox, "python"), await open_console(sandbox, "shell")
            assert (await python.call("x = 20", timeout=60)).status == "ok"
            assert (await shell.call("cd /tmp; y=3", timeout=60)).status == "ok"
            assert (await python.call("while True: pass", timeout=0.5)).status == "timeout"
            assert (await python.call("x + 1", timeout=60)).output == b"21\n"
            assert (await shell.call("echo $y; pwd", timeout=60)).output == b"3\n/tmp\n"
            await python.close()
            await shell.close()
            assert (await run(sandbox, "print(1)")).stdout == b"1\n"

    play(calls)


def test_what_the_engine_did_not_remove_is_removed_later(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SPEC) as sandbox:
            await run(sandbox, "")
            labels = {docker_engine.LABEL: "1", docker_engine.BACKEND: backend._own}
            engine.containers.create(docker_image.IMAGE, ["/bin/true"], labels=labels)
            backend._containers.left = True  # as after a removal that the engine, going away, did not do
            async with backend.session(SPEC) as second:
                await run(second, "")
                assert len(containers(engine)) == 2  # of the two sessions
            assert (await run(sandbox, "print(1)")).stdout == b"1\n"

    play(calls)
    assert containers(engine) == []


def test_code_that_takes_every_place_keeps_no_later_call_from_starting(engine: Any) -> None:
    """Else a policy could end its episode as one that the sandbox lost."""

    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(processes=12)) as sandbox:
            shell = await open_console(sandbox, "shell", background=True)
            fill = "python3 -I -c 'import os, time\nwhile os.fork(): pass\ntime.sleep(1000)'"
            done = await shell.call(fill, timeout=60)
            assert b"BlockingIOError" in done.output
            assert len(done.left) > 5
            for _ in range(2):
                assert (await sandbox.exec(("/bin/true",), timeout=60)).status == "ok"

    play(calls)


@pytest.mark.parametrize("make", [Arithmetic, InSession])
def test_the_demos_task_pays_what_it_pays_in_bubblewrap(engine: Any, make: type[Arithmetic]) -> None:
    for task in areal_agents.spec("areal/Arithmetic-v0").tasks("test")[:3]:
        wanted = demonstrate(task, sandboxes.get("bubblewrap"))
        assert wanted[1] == 1.0
        assert demonstrate(task, sandboxes.get("docker"), make) == wanted


def test_tools_answer_as_they_do_in_bubblewrap(engine: Any) -> None:
    tools = (*FILE_TOOLS, python, bash)
    asked = [
        call("python", code=TRAPS),
        call("write_file", path="src/a.txt", content="one\ntwo\n"),
        call("edit_file", path="src/a.txt", old="two", new="three"),
        call("read_file", path="src/a.txt"),
        *(call("read_file", path=path) for path in ("link", "etc/passwd", "pipe", "zero", "sparse", "loop", "up/x")),
        call("write_file", path="etc/new", content="x"),
        call("write_file", path="twin", content="x"),
        call("list_files", depth=3),
        call("bash", command="cat real src/a.txt; cd src; export X=1"),
        call("bash", command="pwd; echo $X"),
    ]
    found = play_tools(tools, *asked, backend="docker")
    assert found == play_tools(tools, *asked, backend="bubblewrap")
    assert [r.text for r in (found[3], found[-1])] == ["1\tone\n2\tthree", "/work/src\n1"]
    assert [r.status for r in found[4:12]] == ["error"] * 8
