"""Packages of the user's choice in a sandbox: what may be asked for, and one real environment from a local wheel."""

from __future__ import annotations

import functools
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_agents import sandboxes
from areal_agents.errors import RegistryError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import bubblewrap, interpreter, packages
from areal_agents.sandboxes.packages import ensure, requirements
from tests.sandboxes.test_zygote import play, python


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("numpy", ("numpy",)),
        ("pandas>=2,<3,numpy", ("numpy", "pandas>=2,<3")),
        (["Foo_Bar.baz == 1.0", "a[x,y]>1"], ("a[x,y]>1", "foo-bar-baz==1.0")),
        ("a[x,y],b", ("a[x,y]", "b")),
        ("numpy,numpy", ("numpy",)),
    ],
)
def test_requirements_are_read(wanted: str | list[str], found: tuple[str, ...]) -> None:
    assert requirements(wanted) == found


@pytest.mark.parametrize(
    "wanted",
    [
        "--index-url=http://x",
        "-r",
        "./here",
        "/etc",
        "a @ http://x",
        "git+https://x",
        "a;b",
        "a b",
        "a,",
        "$(x)",
        "a>=",
        "é",
    ],
)
def test_what_is_no_requirement_is_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match="packages has"):
        requirements(wanted)
    with pytest.raises(RegistryError, match="packages has"):
        sandboxes.get(f"bubblewrap?packages={wanted}")


def test_packages_and_an_environment_of_ones_own_exclude_each_other() -> None:
    with pytest.raises(RegistryError, match="leave python out"):
        sandboxes.get("bubblewrap?packages=numpy&python=/srv/mine")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that a sandbox's user may read, with a wheel of ``areal-tiny`` in it."""
    made = Path(tempfile.mkdtemp(prefix="areal-agents-packages-"))
    made.chmod(0o755)
    info = "areal_tiny-1.0.dist-info"
    with zipfile.ZipFile(made / "areal_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("areal_tiny.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: areal-tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"areal_tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))


@pytest.mark.usefixtures("offline")
def test_an_environment_is_built_once_and_again_where_it_was_not_finished(folder: Path) -> None:
    lines: list[str] = []
    made = ensure(("areal-tiny==1.0",), root=folder, progress=lines.append)
    assert any("areal-tiny" in line for line in lines)
    assert lines[-1] == "sandbox packages: areal_tiny-1.0"
    assert list(made.glob("lib/python3*/site-packages/areal_tiny.py"))
    lines.clear()
    assert ensure(("areal-tiny==1.0",), root=folder, progress=lines.append) == made
    assert lines == []
    (made / "areal-agents.json").unlink()
    (made / "half").touch()
    assert ensure(("areal-tiny==1.0",), root=folder, progress=lines.append) == made
    assert lines
    assert not (made / "half").exists()
    other = packages.folder_of(("areal-tiny",), interpreter.SYSTEM, folder)
    assert other != made
    with pytest.raises(SandboxUnavailable, match="no-such-package-here"):
        ensure(("no-such-package-here",), root=folder, progress=lines.append)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("preload", ["", "areal_tiny"])
def test_code_finds_the_packages_and_cannot_change_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, preload: str
) -> None:
    """The environment lies below /tmp, of which each sandbox has its own."""
    monkeypatch.setattr(bubblewrap, "ensure", functools.partial(ensure, root=folder, progress=lambda line: None))
    built = bubblewrap.BubblewrapBackend

    async def scene(unused: bubblewrap.BubblewrapBackend) -> None:
        backend = built(pool=0, packages="areal-tiny==1.0", preload=preload)
        try:
            async with backend.session(SandboxSpec(disk=16 << 20)) as sandbox:
                seen = await python(sandbox, "import sys; print('areal_tiny' in sys.modules)")
                assert seen.stdout == (b"True\n" if preload else b"False\n")
                found = await python(sandbox, "import areal_tiny; print(areal_tiny.answer, areal_tiny.__file__)")
                assert found.stdout.startswith(b"42 " + str(folder).encode()), found
                write = await python(sandbox, "import areal_tiny; open(areal_tiny.__file__, 'a').write('answer = 43')")
                assert b"Read-only file system" in write.stderr or b"Permission denied" in write.stderr
                assert (await python(sandbox, "open('/tmp/own', 'w'); print('own')")).stdout == b"own\n"
                # Else it could put a Python of its own in this one's place, for whoever runs python3 here next.
                top = "/".join(folder.parts[1:3])
                for code in (f"import os; os.rename('/{top}', '/tmp/moved')", f"open('/{top}/x', 'w')"):
                    refused = await python(sandbox, code)
                    assert b"busy" in refused.stderr or b"Read-only file system" in refused.stderr, refused
        finally:
            await backend.aclose()

    play(scene)
