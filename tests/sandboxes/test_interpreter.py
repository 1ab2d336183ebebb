"""A Python with packages inside a sandbox: real environments, and what is refused."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import areal_agents.sandboxes as sandboxes
from areal_agents.errors import RegistryError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import interpreter
from areal_agents.tool import ToolResult
from areal_agents.tools.python import python
from tests.sandboxes.test_backends import bwrap, need

__all__ = ["bwrap"]

BASE = os.path.realpath(sys.executable)
BACKENDS = ("bubblewrap", "unsafe_local")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that a sandbox's user may read, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="areal-agents-python-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def packages_of(environment: Path) -> Path:
    (path,) = environment.glob("lib/python3*/site-packages")
    return path


def environment_of(folder: Path, base: str = BASE) -> Path:
    need(os.access("/usr/bin/prlimit", os.X_OK), "prlimit: apt-get install util-linux")
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    (packages_of(folder) / "greeting.py").write_text("WORD = 'hello'\ndef fail():\n    raise ValueError(WORD)\n")
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> Path:
    return environment_of(folder / "environment")


def run(name: str, *codes: str) -> list[ToolResult]:
    async def main() -> list[ToolResult]:
        backend = sandboxes.get(name)
        try:
            await backend.probe()
            async with backend.session(SandboxSpec()) as sandbox:
                return [await python.invoke({"code": code}, {"sandbox": sandbox}) for code in codes]
        finally:
            await backend.aclose()

    return asyncio.run(main())


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize("backend", BACKENDS)
def test_packages_are_found(backend: str, environment: Path) -> None:
    found, failed, missing, child = run(
        f"{backend}?python={environment}",
        "import greeting, sys; print(greeting.WORD, sys.prefix)",
        "import greeting\ngreeting.fail()",
        "import no_such_package",
        "import subprocess; print(subprocess.run(['python3', '-c', 'import greeting'], check=True).returncode)",
    )
    assert found == ToolResult(f"hello {environment}")
    assert failed.text.splitlines()[-3:] == [
        '  File "greeting.py", line 3, in fail',
        "    raise ValueError(WORD)",
        "ValueError: hello",
    ]
    assert str(environment) not in failed.text
    assert missing.text.endswith("ModuleNotFoundError: No module named 'no_such_package'")
    assert child == ToolResult("0")


@pytest.mark.usefixtures("bwrap")
def test_nothing_else_is_seen_and_nothing_can_be_changed(environment: Path) -> None:
    (environment.parent / "secret").write_text("not for the sandbox")
    listed, written, default = run(
        f"bubblewrap?python={environment}",
        f"import os; print(os.listdir({str(environment.parent)!r}))",
        "import greeting\nfor path in (greeting.__file__, greeting.__file__ + 'x'):\n"
        "    try:\n        open(path, 'w')\n    except OSError as error:\n        print(error.strerror)",
        "import os; print(os.path.exists('/usr/bin/python3'), os.environ['PATH'])",
    )
    assert listed == ToolResult("['environment']")
    assert written == ToolResult("Read-only file system\nRead-only file system")
    assert default == ToolResult(f"True {environment}/bin:/usr/bin:/bin")
    (bare,) = run("bubblewrap", "import greeting")
    assert bare.text.endswith("ModuleNotFoundError: No module named 'greeting'")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A Python outside /usr, as uv and pyenv install them, reached through a link."""
    real, library = folder / "pythons/3.x.1", f"lib/python3.{sys.version_info.minor}"
    (real / "bin").mkdir(parents=True)
    (real / "lib").mkdir()
    shutil.copy(BASE, real / "bin/python3.x")
    (real / "bin/python3").symlink_to("python3.x")
    (real / library).symlink_to(Path(sys.base_prefix) / library)
    (folder / "pythons/3.x").symlink_to("3.x.1")
    return folder / "pythons/3.x"


@pytest.mark.usefixtures("bwrap")
def test_the_base_may_lie_outside_usr(folder: Path, base: Path) -> None:
    need(sys.base_prefix.startswith("/usr"), "a Python below /usr, of which a copy is made")
    environment = environment_of(folder / "elsewhere", str(base / "bin/python3"))
    code = "import greeting, sys; print(greeting.WORD, sys.prefix, sys.base_prefix)"
    assert run(f"bubblewrap?python={environment}", code) == [ToolResult(f"hello {environment} {base}")]
    found = interpreter.find(str(environment), "bubblewrap")
    assert found.mounts == (str(environment), str(base), str(base.resolve()))
    # The base itself, and through a link that lies in neither.
    assert run(f"bubblewrap?python={base}", "import sys; print(sys.prefix)") == [ToolResult(str(base))]
    (folder / "links").mkdir()
    (folder / "links/python3").symlink_to(base / "bin/python3")
    (environment / "bin/python3").unlink()
    (environment / "bin/python3").symlink_to(folder / "links/python3")
    for more in ("", "&preload=json"):
        assert run(f"bubblewrap?python={environment}{more}", "import greeting; print(1)") == [ToolResult("1")]


def test_a_link_that_code_could_replace_is_refused(tmp_path: Path) -> None:
    link = Path("/tmp", f"areal-agents-{tmp_path.name}")
    link.symlink_to("/usr/bin/python3")
    try:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/python3").symlink_to(link)
        with pytest.raises(SandboxUnavailable, match=f"{link} is a link in /tmp, which code in a sandbox may replace"):
            interpreter.find(str(tmp_path), "bubblewrap")
    finally:
        link.unlink()


def test_what_lies_below_tmp_is_kept_in_folders_that_are_not_written() -> None:
    links = (("/tmp/c/d/python3", "/usr/bin/python3"), ("/opt/python3", "/usr/bin/python3"))
    found = interpreter.Interpreter(
        "/tmp/a/b/bin/python3", mounts=("/tmp/a/b", "/tmp/e", "/tmp/e/f", "/opt/g"), links=links
    )
    assert found.covered == {
        "mounts": ["/tmp/a/b", "/tmp/e", "/tmp/e/f"], "links": [links[0]], "fixed": ["/tmp/a", "/tmp/c"]
    }  # fmt: skip


@pytest.mark.usefixtures("bwrap")
def test_other_folders_of_packages_are_mounted_and_projects_are_not(folder: Path) -> None:
    environment = environment_of(folder / "pth")
    shared, project = folder / "shared/site-packages", folder / "project"
    for path, module in ((shared, "common"), (project, "own")):
        path.mkdir(parents=True)
        (path / f"{module}.py").write_text("")
    (packages_of(environment) / "more.pth").write_text(f"# more\nimport sys\n{shared}\n{project}\n/no/such/folder\n")
    common, own = run(f"bubblewrap?python={environment}", "import common; print('common')", "import own")
    assert common == ToolResult("common")
    assert own.text.endswith("No module named 'own'")
    found = interpreter.find(str(environment), "bubblewrap")
    assert found.mounts == (str(environment), str(shared))
    assert [note for note in found.notes if str(project) in note and "is not seen inside" in note] == [found.notes[-1]]


@pytest.mark.usefixtures("bwrap")
def test_a_python_that_does_not_start_is_named(folder: Path) -> None:
    broken = folder / "broken"
    (broken / "bin").mkdir(parents=True)
    (broken / "bin/python3").write_text("#!/opt/no/such/interpreter\n")
    (broken / "bin/python3").chmod(0o755)
    for backend in BACKENDS:
        with pytest.raises(SandboxUnavailable, match=f"{broken}/bin/python3 does not start inside: .*python3"):
            run(f"{backend}?python={broken}", "")


@pytest.mark.usefixtures("bwrap")
def test_a_private_folder_is_named_to_a_root_host(folder: Path) -> None:
    need(os.geteuid() == 0, "root")
    private = folder / "private"
    environment = environment_of(private / "environment")
    private.chmod(0o700)
    with pytest.raises(SandboxUnavailable, match=f"{private} is closed to others"):
        run(f"bubblewrap?python={environment}", "")
    assert run(f"unsafe_local?python={environment}", "import greeting; print(1)") == [ToolResult("1")]


def _python_in(prefix: Path) -> Path:
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/python3").symlink_to("/usr/bin/python3")
    return prefix


def test_what_would_show_more_than_a_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _python_in(tmp_path / "home")
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SandboxUnavailable, match="is not mounted into a sandbox: it is or holds a user's home"):
        interpreter.find(str(home), "bubblewrap")
    with pytest.raises(SandboxUnavailable, match="a user's home"):
        interpreter.find("~/bin/python3", "bubblewrap")
    above = _python_in(tmp_path / "above")
    monkeypatch.setenv("HOME", str(above / "me"))
    with pytest.raises(SandboxUnavailable, match="a user's home"):
        interpreter.find(str(above), "bubblewrap")
    keys = _python_in(tmp_path / "keys")
    (keys / ".ssh").mkdir()
    with pytest.raises(SandboxUnavailable, match=r"it holds \.ssh"):
        interpreter.find(str(keys), "bubblewrap")
    (tmp_path / "alias").symlink_to("/etc")
    assert interpreter._too_much(str(tmp_path / "alias")) == "it is a folder of the system"
    for path in ("/", "/var", "/home", "/opt", "/usr"):
        assert interpreter._too_much(path) == "it is a folder of the system"
    # A harmless environment whose base is the whole system.
    system = _python_in(tmp_path / "system")
    (system / "pyvenv.cfg").write_text("home = /etc/bin\n")
    with pytest.raises(SandboxUnavailable, match="/etc is not mounted into a sandbox"):
        interpreter.find(str(system), "bubblewrap")


@pytest.mark.parametrize("folder", ["/usr", "/usr/", "/", "/usr/../usr", "//usr"])
def test_a_folder_of_the_system_is_no_environment(folder: str, tmp_path: Path) -> None:
    """Whether its Python needs a mount or not: /usr is inside already."""
    with pytest.raises(SandboxUnavailable, match=r"is a folder of the system, and no environment. Leave python out"):
        interpreter.find(folder, "bubblewrap")
    (tmp_path / "alias").symlink_to(folder)
    with pytest.raises(SandboxUnavailable, match="is a folder of the system"):
        interpreter.find(str(tmp_path / "alias"), "bubblewrap")
    assert interpreter.find(interpreter.SYSTEM, "bubblewrap").mounts == ()  # the program itself may be named
    made = _python_in(tmp_path / "made")
    assert interpreter.find(str(made), "bubblewrap").executable == f"{made}/bin/python3"


def test_what_is_no_environment_is_named(tmp_path: Path) -> None:
    for path, problem in (
        ("environment", "'environment' is a relative path"),
        (str(tmp_path), f"is no Python environment: {tmp_path}/bin/python3 was not found. Make one: python3 -m venv"),
        (str(tmp_path / "none"), "none was not found"),
    ):
        with pytest.raises(SandboxUnavailable, match=problem):
            interpreter.find(path, "bubblewrap")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to("/no/such/python")
    with pytest.raises(SandboxUnavailable, match="/bin/python3 leads to /no/such/python, which is not there"):
        interpreter.find(str(tmp_path), "bubblewrap")
    (tmp_path / "bin/python3").unlink()
    (tmp_path / "bin/python3").touch()
    with pytest.raises(SandboxUnavailable, match="is not executable"):
        interpreter.find(str(tmp_path), "bubblewrap")
    (tmp_path / "odd").touch()
    with pytest.raises(SandboxUnavailable, match="there is no python3 beside"):
        interpreter.find(str(tmp_path / "odd"), "bubblewrap")
    with pytest.raises(SandboxUnavailable, match="the sandbox has its own /work"):
        interpreter._add([], "/work/environment", "bubblewrap")


def test_the_system_python_needs_no_mounts(tmp_path: Path) -> None:
    for path in ("/usr/bin/python3", "/bin/python3"):
        if os.path.exists(path) and os.path.realpath(path).startswith("/usr/"):
            assert interpreter.find(path, "bubblewrap").mounts == ()
    environment = environment_of(tmp_path / "environment")
    (environment / "pyvenv.cfg").write_text("home = /bin\n")  # made by /bin/python3, a link to /usr/bin on most systems
    if os.path.islink("/bin") and BASE.startswith("/usr/"):
        assert interpreter.find(str(environment), "bubblewrap").mounts == (str(environment),)


def test_options_are_read_from_the_name() -> None:
    assert sandboxes.get("areal_agents.sandboxes.unsafe_local:UnsafeLocalBackend?python=/x=1")._python == "/x=1"  # type: ignore[attr-defined]
    for name in ("bubblewrap?pythn=/x", "bubblewrap?pool=3", "unsafe_local?python=", "bubblewrap?python=/x&python=/y"):
        with pytest.raises(
            RegistryError, match=r"is no option. Write \w+\?KEY=VALUE, with python( or \w+)* as the key"
        ):
            sandboxes.get(name)
    with pytest.raises(RegistryError, match="Did you mean 'bubblewrap'"):
        sandboxes.get("bubblewarp?python=/x")


_NUMPY = """
import threading
import numpy
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["Threads"]))
meeting = threading.Barrier(32)
from concurrent.futures import ThreadPoolExecutor
def work(number):
    meeting.wait(60)
    return float((numpy.ones((50, 50)) @ numpy.ones((50, 50))).sum())
with ThreadPoolExecutor(32) as pool:
    print(sum(pool.map(work, range(32))))
"""


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_computes_in_32_threads(backend: str, folder: Path) -> None:
    numpy = importlib.util.find_spec("numpy")
    need(numpy, "numpy")
    assert numpy is not None
    assert numpy.origin is not None
    source = Path(numpy.origin).parent
    environment = folder / "numeric"
    if not environment.exists():
        environment_of(environment)
        for name in ("numpy", "numpy.libs"):
            if (source.parent / name).is_dir():
                ignored = shutil.ignore_patterns("tests", "*.pyi", "include")
                shutil.copytree(source.parent / name, packages_of(environment) / name, ignore=ignored)
        for path in environment.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
    # OpenBLAS started no threads of its own; 32 threads x 2500 elements x 50.
    assert run(f"{backend}?python={environment}", _NUMPY) == [ToolResult("1\n4000000.0")]
