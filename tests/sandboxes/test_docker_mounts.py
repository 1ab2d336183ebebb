"""What becomes of the volumes that an image declares: by their names, by what is mounted, and on a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import docker_mounts
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.sandboxes.docker_image import IMAGE
from tests.sandboxes.engines import containers, play
from tests.sandboxes.test_docker_services import web


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ([], ()),
        (["/data", "/data/", "//data", "/x/../data"], ("/data",)),
        (["/work/", "/tmp", "/dev/shm/"], ("/work", "/tmp", "/dev/shm")),  # what is in memory anyway
        (["/var/lib/db", "/var"], ("/var/lib/db", "/var")),
        (["/workshop", "/devices", "/processes", "/dev/shm/x"], ("/workshop", "/devices", "/processes", "/dev/shm/x")),
    ],
)
def test_volumes_are_absolute_paths(declared: list[str], expected: tuple[str, ...]) -> None:
    assert docker_mounts.volumes("i:1", declared) == expected


@pytest.mark.parametrize(
    ("volume", "why"),
    [
        ("data", "relative"), ("./data", "relative"), ("work/data", "relative"), ("/", "nothing can be mounted at /"),
        ("", "at /:"), (".", "at /:"), ("//", "at /:"), ("/a/..", "at /:"), ("/proc", "at /proc"),
        ("/proc/1", "at /proc/1"),
        ("/sys/x", "at /sys/x"), ("/dev", "at /dev"), ("/dev/pts", "at /dev/pts"), ("/dev/shmx", "at /dev/shmx"),
        ("/.areal-agents", "at /.areal-agents"), ("/.areal-agents/bin", "at /.areal-agents/bin"),
    ],
)  # fmt: skip
def test_a_volume_where_nothing_can_be_mounted_is_refused(volume: str, why: str) -> None:
    with pytest.raises(SandboxUnavailable) as caught:
        docker_mounts.volumes("i:1", ["/ok", volume])
    assert f"image 'i:1' declares the volume {volume!r}: " in str(caught.value)
    assert why.rstrip(":") in str(caught.value)
    assert "docker export" in caught.value.remedy


@pytest.mark.parametrize("volume", ["/work/data", "/work/a/b", "/tmp/x", "/dev/shm/x"])
def test_a_volume_below_what_code_has_for_itself_is_refused(volume: str) -> None:
    docker_mounts.require_session("i:1", ("/work", "/tmp", "/dev/shm", "/workshop", "/data"))
    with pytest.raises(SandboxUnavailable, match=f"'i:1' declares the volume '{volume}': it would be a folder in /"):
        docker_mounts.require_session("i:1", ("/data", volume))


OURS = {"/work": "/work", "/tmp": "/tmp", "/dev/shm": "/dev/shm"}
USUAL = [
    ("/", "overlay", False), ("/proc", "proc", True), ("/dev", "tmpfs", True), ("/dev/pts", "devpts", True),
    ("/sys", "sysfs", False), ("/work", "tmpfs", True), ("/tmp", "tmpfs", True), ("/dev/shm", "tmpfs", True),
    ("/etc/hosts", "ext4", False), ("/data", "tmpfs", False), ("/proc/kcore", "tmpfs", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "folders", "wrong"),
    [
        ([], OURS, ""),
        ([("/data2", "ext4", True)], OURS, r"/data2 is on the engine's disk \(ext4\)"),  # an engine that ignores tmpfs
        ([("/data2", "ext4", True)], {}, "/data2 is on the engine's disk"),
        ([("/work", "tmpfs", False)], OURS, "/work is not what code needs"),  # /data is a link to /work
        ([("/work/x", "tmpfs", False)], OURS, "/work/x is not what code needs"),
        ([("/work", "tmpfs", False), ("/work", "tmpfs", True)], OURS, ""),
        ([("/var/tmp", "tmpfs", True)], OURS | {"/tmp": "/var/tmp"}, ""),  # /tmp is a link of the image
        ([], OURS | {"/tmp": "/var/tmp"}, "/tmp is not what code needs"),
        ([("/tmp/x", "tmpfs", True)], {}, ""),  # a service may
    ],
)
def test_what_is_mounted_is_checked(more: list[Any], folders: dict[str, str], wrong: str) -> None:
    def check(declared: tuple[str, ...]) -> None:
        docker_mounts.require_seen("i:1", declared, folders, [*USUAL, *more])

    check(())  # an image without volumes hides nothing
    if not wrong:
        check(("/data",))
        return
    with pytest.raises(SandboxUnavailable, match=rf"'i:1' declares the volume '/data': {wrong}"):
        check(("/data",))


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({}, ""),
        ({"/tmp": "/var/tmp", "/work": "/data"}, ""),
        ({"/tmp": "/work2"}, ""),
        ({"/tmp": "/work"}, "has a link at /work or /tmp: /work is in /work"),
        ({"/tmp": "/work/t"}, "has a link at /tmp or /work: /work/t is in /work"),
        ({"/work": "/dev/shm/w"}, "/dev/shm/w is in /dev/shm"),
    ],
)
def test_folders_that_are_one_are_refused(links: dict[str, str], message: str) -> None:
    if not message:
        docker_mounts.require_apart("i:1", OURS | links)
        return
    with pytest.raises(SandboxUnavailable, match=f"image 'i:1' .*{message}"):
        docker_mounts.require_apart("i:1", OURS | links)


@pytest.fixture
def image(engine: Any, tmp_path: Path) -> Iterator[Any]:
    """Makes an image of ours with more lines in its Dockerfile."""
    made: list[str] = []

    def make(*lines: str) -> str:
        name = f"areal-test-mounts:{len(made) + 1}"
        (tmp_path / "Dockerfile").write_text("\n".join([f"FROM {IMAGE}", *lines]))
        engine.images.build(path=str(tmp_path), tag=name, rm=True)
        made.append(name)
        return name

    yield make
    for name in made:
        engine.images.remove(name, force=True)


def volumes(engine: Any) -> set[str]:
    return {one.name for one in engine.volumes.list() if not one.name.startswith("areal-agents-python")}


LOOK = """
cd /work && mkdir a && echo 1 > a/b && rm -r a && touch /tmp/x /dev/shm/x && df -B1 /work | tail -1
for d in /data /srv/d; do [ -e $d ] && { touch $d/x 2>&1; ls -A $d | wc -l; }; done; exit 0
"""


@pytest.mark.docker
def test_volumes_elsewhere_are_empty_and_not_on_the_engines_disk(engine: Any, image: Any) -> None:
    name = image("RUN mkdir -p /data && echo kept > /data/file", "VOLUME /data/ /srv/d /work /tmp/ /dev/shm")
    before = volumes(engine)

    async def calls(backend: DockerBackend) -> None:
        spec = SandboxSpec(image=name, disk=8 << 20)
        await backend.prepare([spec])
        async with backend.session(spec) as sandbox:
            done = await sandbox.exec(["sh", "-c", LOOK], timeout=60)
            work, *rest = done.stdout.decode().splitlines()
            assert str(8 << 20) in work
            assert [line.rpartition(": ")[2] for line in rest] == ["Read-only file system", "0"] * 2
            await sandbox.write_file("kept/x", b"1")
            await sandbox.restore(await sandbox.snapshot())
            assert await sandbox.read_file("kept/x", 9) == b"1"
            assert volumes(engine) == before

    play(calls)
    assert volumes(engine) == before


@pytest.mark.docker
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["VOLUME /work/data"], "the volume '/work/data': it would be a folder in /work"),
        (["VOLUME /tmp/cache"], "the volume '/tmp/cache': it would be a folder in /tmp"),
        (["VOLUME data"], "the volume 'data': it is a relative path"),
        (["VOLUME /proc/x"], "nothing can be mounted at /proc/x"),
        (["RUN ln -s /work /data", "VOLUME /data"], "the volume '/data': /work"),
        (["RUN ln -s /work /data", "VOLUME /data/sub"], "the volume '/data/sub': /work"),
    ],
)
def test_volumes_that_would_hide_a_folder_are_refused_by_name(
    engine: Any, image: Any, lines: list[str], message: str
) -> None:
    name = image(*lines)
    before = volumes(engine)

    async def calls(backend: DockerBackend) -> None:
        spec = SandboxSpec(image=name)
        if "ln -s" not in lines[0]:
            with pytest.raises(SandboxUnavailable, match=message):
                await backend.prepare([spec])
        for _ in range(2):
            async with backend.session(spec) as sandbox:
                with pytest.raises(SandboxUnavailable, match=f"image '{name}' declares the volume") as caught:
                    await sandbox.exec(["true"], timeout=60)
                assert message in str(caught.value)
        async with backend.session(SandboxSpec()) as sandbox:
            assert (await sandbox.exec(["true"], timeout=60)).status == "ok"

    play(calls)
    assert (containers(engine), volumes(engine)) == ([], before)


@pytest.mark.docker
def test_links_of_an_image_at_folders_of_code(engine: Any, image: Any) -> None:
    fine = image("RUN rm -rf /tmp /work && ln -s /var/tmp /tmp && mkdir /data && ln -s /data /work")
    one = image("RUN rm -rf /tmp && ln -s /work /tmp")

    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(image=fine, disk=1 << 20)) as sandbox:
            await sandbox.write_file("kept/x", b"1")
            data = await sandbox.snapshot()
            fill = "head -c 9000000 /dev/zero > /tmp/x; head -c 9000000 /dev/zero > /work/x; du -k /tmp/x /work/x"
            done = await sandbox.exec(["sh", "-c", fill], timeout=60)
            assert [int(line.split()[0]) <= 1024 for line in done.stdout.decode().splitlines()] == [True, True]
            await sandbox.restore(data)
            listed = await sandbox.exec(["sh", "-c", "ls /work/ /tmp/"], timeout=60)
            assert listed.stdout == b"/tmp/:\n\n/work/:\nkept\n"
        async with backend.session(SandboxSpec(image=one)) as sandbox:
            with pytest.raises(SandboxUnavailable, match=r"has a link at /work or /tmp"):
                await sandbox.exec(["true"], timeout=60)

    play(calls)
    assert containers(engine) == []


@pytest.mark.docker
def test_a_service_may_have_volumes_where_a_session_may_not(engine: Any, image: Any) -> None:
    name = image("RUN mkdir -p /var/run && ln -s /run /var/run/link", "VOLUME /work/data /tmp/x /var/run/link/db")
    write = "for d in /work/data /tmp/x /run/db; do echo 1 > $d/x || exit 9; done; exec sleep 600"
    service = web(image=name, command=("sh", "-c", write), port=0, ready=("test", "-e", "/run/db/x"), user="1234:5")

    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(services=(service,))) as sandbox:
            assert (await sandbox.exec(["true"], timeout=60)).status == "ok"
            made = next(one for one in containers(engine) if one.attrs["Config"]["Hostname"] == "web")
            assert {mount["Type"] for mount in made.attrs["Mounts"]} <= {"volume"}
            assert [m["Name"] for m in made.attrs["Mounts"] if not m["Name"].startswith("areal-agents-python")] == []

    play(calls)
    assert json.dumps(sorted(volumes(engine)))
