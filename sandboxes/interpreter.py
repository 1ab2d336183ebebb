"""The Python that code in a sandbox runs on: the system's, or an environment with packages.

It is found without running it: from its path, its ``pyvenv.cfg`` and the links on the way. Folders outside /usr are
mounted read-only at their own paths, so they hold nothing but a Python: a home or a system folder is refused.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxUnavailable

SYSTEM: Final = next(
    (path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)), "/usr/bin/python3"
)
"""The host's Python where nothing else is set, below /usr, which a sandbox sees."""
MAKE: Final = "Make one: python3 -m venv /srv/sandbox-python && /srv/sandbox-python/bin/pip install numpy sympy"
_OWN_INSIDE: Final = ("/work", "/proc", "/dev", "/sys")
"""Folders that a sandbox has of its own, besides /tmp, below which an environment may be mounted."""
_SYSTEM_FOLDERS: Final = ("/etc", "/root", "/home", "/var", "/run", "/tmp", "/usr", "/opt", "/srv", "/mnt", "/boot")
_SECRETS: Final = (".ssh", ".gnupg", ".aws", ".kube", ".netrc", ".git-credentials", ".bash_history")
_MAX_LINKS: Final = 40


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python and what it reads, by paths that hold on the host and inside."""

    executable: str
    prefix: str = ""
    """The folder of a virtual environment; empty for any other Python."""
    mounts: tuple[str, ...] = ()
    """Folders to mount read-only, besides /usr."""
    links: tuple[tuple[str, str], ...] = ()
    """Links outside those folders on the way to the program: (path, target)."""
    notes: tuple[str, ...] = ()

    @property
    def covered(self) -> dict[str, list[Any]]:
        """What lies below /tmp, of which each sandbox has its own: mounts, links, and the folders on the way.

        Those are ``fixed``, file systems that are not written: else code could rename them, and put a Python of its own
        in this one's place. What is mounted cannot be renamed.
        """
        mounts = [path for path in self.mounts if path.startswith("/tmp/")]
        links = [link for link in self.links if link[0].startswith("/tmp/")]
        tops = dict.fromkeys("/".join(path.split("/")[:3]) for path in (*mounts, *(path for path, _ in links)))
        return {"mounts": mounts, "links": links, "fixed": [path for path in tops if path not in self.mounts]}

    @property
    def search_path(self) -> str:
        """The PATH on which ``python3`` is this Python."""
        folders = (os.path.dirname(self.executable), "/usr/bin", "/bin")
        return ":".join(dict.fromkeys(folders))


def find(python: str, backend: str, *, mounted: bool = True) -> Interpreter:
    """Find what a Python needs.

    Args:
        python: absolute path of an environment's folder (made by venv, uv or conda) or of an interpreter.
        backend: name of the sandbox backend, for the errors.
        mounted: find what must be mounted too, for a sandbox that does not see the host's files.

    Raises:
        SandboxUnavailable: where there is no Python, or mounting it would show more than a Python.
    """
    executable = _executable(python, backend)
    if mounted:
        _refuse_system(python, backend)
    prefix = os.path.dirname(os.path.dirname(executable))
    home = _home(prefix)
    if not mounted:
        return Interpreter(executable, prefix if home else "")
    mounts: list[str] = []
    roots = [prefix, os.path.dirname(os.path.realpath(home or os.path.dirname(executable)))]
    if home:
        roots.insert(1, os.path.dirname(home))
    roots.append(os.path.dirname(os.path.dirname(os.path.realpath(executable))))
    for root in roots:
        # /bin/python3 is /usr/bin/python3 by a link that the sandbox has too.
        if root != "/" or not os.path.islink("/bin"):
            _add(mounts, root, backend)
    notes = [f"{python} is mounted read-only: {', '.join(mounts)}"] if mounts else []
    for folder in _added_folders(prefix):
        if _inside(folder, mounts):
            continue
        if os.path.basename(folder) in ("site-packages", "dist-packages"):
            _add(mounts, folder, backend)
        else:
            notes.append(f"{folder}, which a .pth file of {python} adds (an editable install?), is not seen inside")
    links = tuple(link for link in _links(executable) if not _inside(link[0], mounts))
    for path, _ in links:
        _refuse_own(path, _OWN_INSIDE, backend)
        if os.path.dirname(path) == "/tmp":
            remedy = f"Make the environment elsewhere. {MAKE}"
            raise SandboxUnavailable(backend, f"{path} is a link in /tmp, which code in a sandbox may replace", remedy)
    return Interpreter(executable, prefix if home else "", tuple(mounts), links, tuple(notes))


def _refuse_system(python: str, backend: str) -> None:
    """Raise SandboxUnavailable where a folder of the system is named as an environment.

    Its Python may be named, by the path of the program.
    """
    path = os.path.normpath(os.path.expanduser(python))
    real = os.path.realpath(path)
    if os.path.isdir(path) and (real == "/usr/local" or _is_system(real)):
        remedy = f"Leave python out for the system's own, or name an environment. {MAKE}"
        raise SandboxUnavailable(backend, f"{python} is a folder of the system, and no environment", remedy)


def _is_system(real: str) -> bool:
    """Say whether ``real``, a path without links, is a folder of the system or holds one."""
    return real in {"/", *_SYSTEM_FOLDERS} or any(n.startswith(real.rstrip("/") + "/") for n in _SYSTEM_FOLDERS)


def _executable(python: str, backend: str) -> str:
    path = os.path.normpath(os.path.expanduser(python))
    if not os.path.isabs(path):
        raise SandboxUnavailable(backend, f"python = {python!r} is a relative path", "Give an absolute path.")
    if os.path.isdir(path):
        path = os.path.join(path, "bin", "python3")
        if not os.path.exists(path):
            gone = f"leads to {os.readlink(path)}, which is not there" if os.path.islink(path) else "was not found"
            raise SandboxUnavailable(backend, f"{python} is no Python environment: {path} {gone}", MAKE)
    elif not os.path.exists(path):
        remedy = "Install it: apt-get install python3-minimal or dnf install python3." if path == SYSTEM else MAKE
        raise SandboxUnavailable(backend, f"{python} was not found (it runs inside the sandbox)", remedy)
    elif not os.path.exists(os.path.join(os.path.dirname(path), "python3")):
        remedy = "Name an environment's folder, or a Python with a `python3` beside it."
        raise SandboxUnavailable(backend, f"there is no python3 beside {python}", remedy)
    if not os.access(path, os.X_OK):
        raise SandboxUnavailable(backend, f"{path} is not executable", MAKE)
    return os.path.join(os.path.dirname(path), "python3")


def _home(prefix: str) -> str:
    """Return the folder of the program that a virtual environment was made with, or "" where there is no such file."""
    try:
        lines = Path(prefix, "pyvenv.cfg").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    return os.path.normpath(fields["home"]) if fields.get("home") else ""


def _inside(path: str, mounts: list[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in ("/usr", *mounts))


def _add(mounts: list[str], folder: str, backend: str) -> None:
    """Mount a folder, unless it is there already.

    Raises SandboxUnavailable where the sandbox has such a folder of its own, or where it holds more than a Python.
    """
    if _inside(folder, mounts):
        return
    _refuse_own(folder, _OWN_INSIDE, backend)
    if reason := _too_much(folder):
        remedy = f"Use an environment in a folder of its own, whose Python too lies in one. {MAKE}"
        raise SandboxUnavailable(backend, f"{folder} is not mounted into a sandbox: {reason}", remedy)
    mounts.append(folder)


def _refuse_own(path: str, own_folders: tuple[str, ...], backend: str) -> None:
    own = next((own for own in own_folders if path == own or path.startswith(own + "/")), None)
    if own:
        remedy = f"Make the environment elsewhere, not below {own}. {MAKE}"
        raise SandboxUnavailable(backend, f"{path} cannot be seen inside: the sandbox has its own {own}", remedy)


def _too_much(folder: str) -> str:
    """Say why a folder must not be seen by hostile code, or return ""."""
    real = os.path.realpath(folder)
    homes = {os.path.realpath(user.pw_dir) for user in pwd.getpwall()} | {os.path.realpath(Path.home())}
    above = real.rstrip("/") + "/"
    if _is_system(real):
        return "it is a folder of the system"
    # Daemons have system folders as their homes: those are below, or not there at all.
    if any(home == real or home.startswith(above) for home in homes):
        return "it is or holds a user's home"
    secret = next((name for name in _SECRETS if os.path.lexists(os.path.join(real, name))), "")
    return f"it holds {secret}" if secret else ""


def _added_folders(prefix: str) -> Iterator[str]:
    """Yield the folders that .pth files put on the path."""
    for file in sorted(Path(prefix, "lib").glob("python3*/site-packages/*.pth")):
        for line in file.read_text(errors="replace").splitlines():
            words = line.strip()
            if words and not words.startswith(("#", "import ", "import\t")):
                path = os.path.normpath(os.path.join(file.parent, words))
                if os.path.exists(path):
                    yield path


def _links(path: str) -> Iterator[tuple[str, str]]:
    """Yield the links from ``path`` to the program behind it."""
    for _ in range(_MAX_LINKS):
        if not os.path.islink(path):
            return
        target = os.readlink(path)
        yield path, target
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))


def unreadable(interpreter: Interpreter) -> str:
    """Return the first folder on the way to a mount that other users may not enter, or ""."""
    for mount in interpreter.mounts:
        real = Path(os.path.realpath(mount))
        for folder in (*reversed(real.parents), real):
            needed = 0o5 if folder == real else 0o1
            if folder.stat().st_mode & needed != needed:
                return str(folder)
    return ""
