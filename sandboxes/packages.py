"""Environments with packages of the user's choice, built once for each list and mounted read-only.

They lie where a sandbox's user may read them: in ``/var/cache/areal-agents`` of a root host, whose sandboxes are plain
users, and in ``~/.cache/areal-agents`` of a plain user.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from areal_agents.errors import SandboxUnavailable
from areal_agents.sandboxes import interpreter

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION: Final = r"(?:===|==|~=|!=|<=|>=|<|>)[A-Za-z0-9][A-Za-z0-9.*+!-]*"
_REQUIREMENT: Final = re.compile(rf"{_NAME}(?:\[{_NAME}(?:,{_NAME})*\])?(?:{_VERSION}(?:,{_VERSION})*)?")
_DONE: Final = "areal-agents.json"
"""Written last: an environment without it was not finished, and is made anew."""


def requirements(wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Return a list of requirements in one order and spelling.

    A text has commas between them: ``numpy,pandas>=2,<3``. Raises ValueError for what is no name with an optional
    version: no option of pip, no path, no address.
    """
    parts = [wanted] if isinstance(wanted, str) else list(wanted)
    if isinstance(wanted, str):
        # A comma stands between two versions of one package too, and between its extras.
        parts = re.split(r",(?![<>=!~ ])(?![^\[]*\])", wanted)
    found = set()
    for part in parts:
        text = re.sub(r"\s*([<>=!~,\[\]]+)\s*", r"\1", part.strip())
        if not _REQUIREMENT.fullmatch(text):
            raise ValueError(f"packages has {part!r}: write a name, with a version or not: pandas>=2,<3.")
        name = re.match(_NAME, text)
        assert name is not None
        found.add(re.sub(r"[-_.]+", "-", name[0]).lower() + text[name.end() :])
    return tuple(sorted(found))


def folder_of(wanted: Sequence[str], base: str, root: Path | None = None) -> Path:
    """Return where the environment of a list lies, for one base Python."""
    if root is None:
        root = Path("/var/cache") if os.geteuid() == 0 else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        root = root.expanduser() / "areal-agents" / "sandbox-python"
    real = os.path.realpath(base)
    told = json.dumps([list(wanted), real, os.stat(real).st_mtime_ns]).encode()
    return root / hashlib.sha256(told).hexdigest()[:16]


def ensure(
    wanted: Sequence[str],
    *,
    base: str = interpreter.SYSTEM,
    root: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return the environment with these packages, and build it where there is none.

    Two processes that want the same one build it once: the other waits.

    Args:
        wanted: what ``requirements`` returns.
        base: the Python that it is made with.
        root: the folder of all of them; the module's docstring says which one by default.
        progress: is called with each line that pip prints; by default they go to stderr.

    Raises:
        SandboxUnavailable: where it cannot be built, with the last lines of what failed.
    """
    folder = folder_of(wanted, base, root)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for above in (folder.parent, folder.parent.parent):
            if os.geteuid() == 0 and above.stat().st_uid == 0 and above.name in ("areal-agents", "sandbox-python"):
                above.chmod(0o755)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / _DONE).exists():
                shutil.rmtree(folder, ignore_errors=True)
                _build(wanted, base, folder, progress or _tell)
    except OSError as error:
        raise _unavailable(f"cannot be kept in {folder.parent}: {error}", "Make that folder writable.") from error
    return folder


def _build(wanted: Sequence[str], base: str, folder: Path, progress: Callable[[str], None]) -> None:
    progress(f"sandbox packages: building {folder} with {', '.join(wanted)}")
    _run([base, "-m", "venv", "--without-pip", str(folder)], progress)
    _run([*_installer(str(folder / "bin" / "python3")), *wanted], progress)
    listed = sorted(
        path.name.removesuffix(".dist-info") for path in folder.glob("lib/python3*/site-packages/*.dist-info")
    )
    (folder / _DONE).write_text(json.dumps({"wanted": list(wanted), "installed": listed}, indent=1))
    progress(f"sandbox packages: {', '.join(listed)}")


def _installer(python: str) -> list[str]:
    """Return the command that installs into an environment which has no pip of its own."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--python", python, "install", "--no-input", "--disable-pip-version-check"]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "pip", "install", "--python", python, "--link-mode=copy", "--compile-bytecode"]
    raise _unavailable("need pip or uv, and there is neither", f"Install one: {sys.executable} -m ensurepip")


def _run(command: list[str], progress: Callable[[str], None]) -> None:
    """Run a program to its end and pass its lines on. Raises SandboxUnavailable where it fails."""
    last: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        umask=0o022,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-5:], line.strip()]
            progress(f"sandbox packages: {line.rstrip()}")
    if process.returncode:
        said = " ".join(last)[-600:] or "no message"
        raise _unavailable(f"cannot be installed: {said}", f"Run it by hand: {' '.join(command)}")


def _unavailable(problem: str, remedy: str) -> SandboxUnavailable:
    return SandboxUnavailable("bubblewrap", f"its packages {problem}", remedy)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
