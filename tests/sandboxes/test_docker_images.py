"""Images of the docker backend: pulled from a real registry, built from folders, kept by use, and steering nothing."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from areal_agents import Task
from areal_agents.cli.main import main
from areal_agents.errors import ConfigError, RegistryError, SandboxUnavailable
from areal_agents.registry import EnvSpec
from areal_agents.reward import boxed_number
from areal_agents.rollout.player import prove_sandbox
from areal_agents.sandbox import SandboxSpec, Service
from areal_agents.sandboxes import get
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.bash import bash
from tests.sandboxes.engines import containers, play
from tests.sandboxes.test_backends import need


@pytest.fixture(autouse=True)
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty record of what was pulled here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def registry(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on the loopback, of the Debian package docker-registry."""
    need(shutil.which("docker-registry"), "docker-registry")
    if engine.api.base_url != "http+docker://localhost":
        pytest.skip("the engine is on another machine, whose loopback has no registry of ours")
    room = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY": str(room),
        "REGISTRY_HTTP_ADDR": address,
        "REGISTRY_LOG_LEVEL": "error",
    }
    (room / "config.yml").write_text("version: 0.1\nstorage: {filesystem: {rootdirectory: /x}}\nhttp: {addr: ':1'}\n")
    with (room / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(room / "config.yml")], env={**os.environ, **config}, stdout=log, stderr=log
        )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (room / "log").read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def make(engine: Any, name: str, size: int = 2 << 20, changes: Sequence[str] = ()) -> str:
    """Hand the engine an image of one file of so many random bytes, and of no program."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo("blob")
        member.size = size
        archive.addfile(member, io.BytesIO(os.urandom(size)))
    repository, _, tag = name.rpartition(":")
    engine.api.import_image_from_data(sink.getvalue(), repository=repository, tag=tag, changes=list(changes))
    return name


@pytest.fixture(scope="module")
def in_registry(engine: Any, registry: str) -> list[str]:
    """Three images of 2 MB that the registry has."""
    names = [f"{registry}/areal/{uuid.uuid4().hex[:8]}:1" for _ in range(3)]
    for name in names:
        make(engine, name)
        said = engine.api.push(name)
        assert '"error"' not in said, said
    return names


@pytest.fixture
def published(engine: Any, in_registry: list[str]) -> Iterator[list[str]]:
    """Those images, which the engine has not."""
    remove(engine, in_registry)
    yield in_registry
    remove(engine, in_registry)


def remove(engine: Any, names: Sequence[str]) -> None:
    for name in names:
        if has(engine, name):
            engine.images.remove(name, force=True)


def has(engine: Any, name: str) -> bool:
    return any(name in image.tags for image in engine.images.list())


def specs(*names: str) -> list[SandboxSpec]:
    return [SandboxSpec(image=name) for name in names]


async def works(backend: DockerBackend, image: str) -> None:
    """Start a session in an image that may have no program."""
    async with backend.session(SandboxSpec(image=image)) as sandbox:
        await sandbox.write_file("a", b"1")
        assert await sandbox.read_file("a", 9) == b"1"


@pytest.mark.docker
def test_images_are_pulled_ahead_and_by_the_command(
    engine: Any, published: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def calls(backend: DockerBackend) -> None:
        await backend.prepare(specs(*published[:2], IMAGE, ""))
        told = capsys.readouterr().err
        for name in published[:2]:
            assert f"docker: pulling {name}: " in told
            assert " of 2 MB" in told
            assert has(engine, name)
        await works(backend, published[0])
        service = Service(name="db", image=published[2], port=1)
        await backend.prepare([SandboxSpec(services=(service,))])
        assert has(engine, published[2])

    play(calls)
    engine.images.remove(published[2])
    assert main(["sandbox", "prepare", "docker", published[2]]) == 0
    assert has(engine, published[2])
    assert main(["sandbox", "prepare", "bubblewrap", "x"]) == 2


@pytest.mark.docker
def test_what_is_missing_is_named_before_anything_starts(engine: Any, registry: str, published: list[str]) -> None:
    async def calls(backend: DockerBackend) -> None:
        missing = [f"{registry}/areal/none:1", f"{registry}/areal/none:2"]
        with pytest.raises(SandboxUnavailable, match=r"2 of 3 images cannot be had: .*none:1.*none:2"):
            await backend.prepare(specs(*missing, published[0]))
        with pytest.raises(SandboxUnavailable, match=r"none:1.*docker pull"):
            await backend.prepare(specs(missing[0]))

    play(calls)


@pytest.mark.docker
def test_those_used_longest_ago_are_removed_and_never_the_users(engine: Any, published: list[str]) -> None:
    first, second, third = published
    mine = make(engine, "areal-test-mine:1")
    engine.images.pull(*first.rsplit(":", 1))  # by the user, of whose images none is in the record

    async def calls(backend: DockerBackend) -> None:
        await works(backend, first)
        await works(backend, mine)
        await works(backend, second)  # pulled: 2 of the 5 MB
        await works(backend, third)  # 4 of 5
        assert (has(engine, second), has(engine, third)) == (True, True)
        engine.images.remove(first)
        backend._images.forget(first)
        backend._images._kept._written.clear()  # as a minute later
        await works(backend, second)
        await works(backend, first)  # pulled: the third is older than the second
        assert [has(engine, name) for name in (first, second, third, mine)] == [True, True, False, True]
        await works(backend, third)  # and pulled again where it is asked for
        assert [has(engine, name) for name in (first, second, third, mine)] == [True, False, True, True]

    play(calls, image_cache="5M")
    engine.images.remove(mine)


@pytest.mark.docker
def test_no_session_fails_for_a_record_that_cannot_be_kept(
    engine: Any, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = make(engine, "areal-test-volumes:1", changes=["VOLUME /work/", "VOLUME /tmp/"])

    async def calls(backend: DockerBackend) -> None:
        await works(backend, IMAGE)
        path = backend._images._kept._path
        path.parent.mkdir(parents=True)
        for broken in ("", "[]", '{"areal-test-volumes:1": 7}'):
            path.write_text(broken)
            backend._images._kept._written.clear()
            await works(backend, mine)
            await backend.prepare(specs(mine))
        path.unlink()
        path.mkdir()
        backend._images._kept._written.clear()
        await works(backend, mine)

    play(calls)
    assert capsys.readouterr().err.count(f"no record can be kept in {record}") == 1
    engine.images.remove(mine)


@pytest.mark.docker
def test_an_image_in_use_is_kept(engine: Any, published: list[str]) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(image=published[0])) as sandbox:
            await sandbox.write_file("a", b"")
            await works(backend, published[1])
            assert has(engine, published[0])
            assert (await sandbox.read_file("a", 1)) == b""
        await works(backend, published[2])
        assert [has(engine, name) for name in published] == [False, False, True]

    play(calls, image_cache="1M")


@pytest.mark.docker
def test_what_there_is_no_room_for_is_looked_for_and_not_pulled(
    engine: Any, registry: str, published: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def calls(backend: DockerBackend) -> None:
        await backend.prepare(specs(published[0]))
        await backend.prepare(specs(*published))
        assert [has(engine, name) for name in published] == [True, False, False]
        assert "2 of 3 images are not pulled ahead" in capsys.readouterr().err
        with pytest.raises(SandboxUnavailable, match="none:1' cannot be had"):
            await backend.prepare(specs(published[0], f"{registry}/areal/none:1"))
        await works(backend, published[1])

    play(calls, image_cache="1M")


@pytest.mark.docker
def test_without_a_record_nothing_is_removed_and_sessions_work(
    engine: Any, published: list[str], record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write_text("a file, where the folder would be")

    async def calls(backend: DockerBackend) -> None:
        await works(backend, published[0])
        await works(backend, published[1])
        assert [has(engine, name) for name in published] == [True, True, False]
        assert f"{published[0]} stays until you remove it" in capsys.readouterr().err

    play(calls, image_cache="1M")


def test_the_size_of_the_cache_is_checked() -> None:
    for size in ("5", "x", "-1G", "1.5G", "5g"):
        with pytest.raises(RegistryError, match="write a size"):
            get(f"docker?image_cache={size}")


@pytest.mark.docker
def test_folders_are_built_once(engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY . /srv/\nRUN echo made-of-it > /srv/made\nENV FROM_IT=1\n")
    (folder / "data").write_text(f"one {uuid.uuid4()}")
    (folder / "secret").write_text("x")
    (folder / ".dockerignore").write_text("secret\n")

    async def look(backend: DockerBackend) -> bytes:
        async with backend.session(SandboxSpec(image=str(folder))) as sandbox:
            script = "cat /srv/made /srv/data; ls -a /srv; echo $FROM_IT"
            return (await sandbox.exec(["sh", "-c", script], timeout=60)).stdout

    async def calls(backend: DockerBackend) -> None:
        await backend.prepare(specs(str(folder)))
        assert f"docker: building {folder}: Step 3/" in capsys.readouterr().err
        made, data, *names = (await look(backend)).split()
        assert (made, data) == (b"made-of-it", b"one")
        assert names[1:] == b".. .dockerignore Dockerfile data made 1".split()  # the secret is left out

    async def again(backend: DockerBackend) -> None:
        (folder / "secret").write_text("y")
        await look(backend)
        assert "building" not in capsys.readouterr().err

    async def changed(backend: DockerBackend) -> None:
        (folder / "data").write_text(f"two {uuid.uuid4()}")
        assert b"two" in await look(backend)
        assert "building" in capsys.readouterr().err

    async def broken(backend: DockerBackend) -> None:
        (folder / "Dockerfile").write_text(f"FROM {IMAGE}\nRUN echo said; exit 3\n")
        with pytest.raises(SandboxUnavailable, match=r"(?s)cannot be built: .*code: 3.*said"):
            await backend.prepare(specs(str(folder)))
        (folder / "Dockerfile").unlink()
        with pytest.raises(ConfigError, match="has no Dockerfile"):
            await backend.prepare(specs(str(folder)))

    try:
        for one in (calls, again, changed, broken):
            play(one)
    finally:
        remove(engine, [tag for image in engine.images.list() for tag in image.tags if "areal-agents-built:" in tag])


@pytest.fixture(scope="module")
def steering(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image whose variables and files would steer every program of it, also pid 1."""
    folder = tmp_path_factory.mktemp("steering")
    (folder / "ld.so.preload").write_text("/opt/of-a-file.so\n")
    (folder / "startup.py").write_text("print('steered')")
    (folder / "struct.py").write_text("raise SystemExit('steered')")
    variables = {
        "LD_PRELOAD": "/opt/of-a-variable.so", "LD_LIBRARY_PATH": "/opt", "LD_AUDIT": "/opt/audit.so",
        "PYTHONSTARTUP": "/opt/startup.py", "PYTHONPATH": "/opt", "PYTHONHOME": "/opt", "HOME": "/root",
        "PATH": "/opt/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "3", "ITS_OWN": "a=b c",
    }  # fmt: skip
    lines = [f"FROM {IMAGE}", "COPY ld.so.preload /etc/", "COPY startup.py struct.py /opt/"]
    lines += [f'ENV {name}="{value}"' for name, value in variables.items()]
    (folder / "Dockerfile").write_text("\n".join(lines))
    engine.images.build(path=str(folder), tag="areal-test-steering:1", rm=True)
    yield "areal-test-steering:1"
    engine.images.remove("areal-test-steering:1", force=True)


@pytest.mark.docker
def test_an_image_steers_its_programs_and_not_pid_1(engine: Any, steering: str) -> None:
    async def calls(backend: DockerBackend) -> None:
        service = Service(name="db", image=steering, port=0, ready=("true",), command=("sleep", "600"))
        spec = SandboxSpec(image=steering, services=(service,))
        async with backend.session(spec) as sandbox:
            done = await sandbox.exec(["/bin/sh", "-c", "env"], timeout=60)
            assert b"/opt/of-a-variable.so" in done.stderr  # the loader obeys it here
            env = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
            wanted = {"PATH": "/opt/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "3", "ITS_OWN": "a=b c", "HOME": "/work"}
            assert {name: env[name] for name in wanted} == wanted
            assert (env["PYTHONPATH"], env["PYTHONSTARTUP"], env["LANG"]) == ("/opt", "/opt/startup.py", "C.UTF-8")
            await sandbox.write_file("a", b"1")
            assert await sandbox.read_file("a", 9) == b"1"
            assert sandbox._holder._stream.errors == b""  # type: ignore[attr-defined]
            for made in containers(engine):
                assert [e for e in made.attrs["Config"]["Env"] if "=" in e and not e.startswith("PATH=")] == []
                assert "/etc/ld.so.preload" in made.attrs["HostConfig"]["MaskedPaths"]
                assert "/proc/kcore" in made.attrs["HostConfig"]["MaskedPaths"]  # the engine's own are masked too

    play(calls)


class TwoImages(ToolEnv):
    tools = (bash,)
    rubric: ClassVar[Any] = boxed_number()

    @classmethod
    def tasks(cls, split: str, **_: Any) -> list[Task]:
        images = os.environ["AREAL_TEST_IMAGES"].split()
        payload = [{"image": image, "answer": "1"} for image in images]
        return [Task.make(str(i), split=split, seed=0, payload=p) for i, p in enumerate(payload)]

    @classmethod
    def sandbox_of(cls, task: Task) -> SandboxSpec:
        return SandboxSpec(image=str(task.payload["image"]))

    def prompt(self, task: Task) -> str:
        return "?"


@pytest.mark.docker
def test_a_run_has_the_images_of_its_tasks_first(
    engine: Any, registry: str, published: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EnvSpec("areal-test/TwoImages-v0", f"{__name__}:TwoImages")
    monkeypatch.setenv("AREAL_TEST_IMAGES", " ".join(published[:2]))
    asyncio.run(prove_sandbox(spec, "docker"))
    assert [has(engine, name) for name in published] == [True, True, False]
    with pytest.raises(ConfigError, match="has no images"):
        asyncio.run(prove_sandbox(spec, "bubblewrap"))
    monkeypatch.setenv("AREAL_TEST_IMAGES", f"{registry}/areal/none:1")
    with pytest.raises(SandboxUnavailable, match="none:1' cannot be had"):
        asyncio.run(prove_sandbox(spec, "docker"))
