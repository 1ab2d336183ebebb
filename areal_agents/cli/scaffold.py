"""The command ``init``, which starts a package of the user's own.

The package has an environment that runs and trains as it is. A template is itself a working package
(``templates/env-package`` is called ``my_env``, ``templates/game-package`` is ``my_game``, and so on). It is linted,
type-checked and tested as it stands, and ``init`` copies it under another name.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from areal_agents.errors import ConfigError
from areal_agents.registry import ENTRY_POINT_GROUP
from areal_agents.utils.files import is_full, room_to_make

TEMPLATES = Path(__file__).resolve().parent / "templates"
TEMPLATE = TEMPLATES / "env-package"
PLACEHOLDER = "my_env"
Kind = Literal["tool", "game", "dataset", "gymnasium"]
"""``tool`` looks things up and answers. ``game`` has tools that act on the state of the episode. ``dataset`` has the
questions of a file, and a suite. ``gymnasium`` wraps a ``gymnasium.Env`` over text."""


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of package."""

    folder: Path
    placeholder: str
    """Its name, which the user's replaces."""
    env: str
    """The environment that it registers, without the namespace."""
    trains: str
    """How long its first training takes on two cores."""
    further: str
    """What its README goes on with."""


KINDS: dict[Kind, Template] = {
    "tool": Template(TEMPLATE, PLACEHOLDER, "Boxes-v0", "about a minute", "eval, compare, rescore, replay"),
    "game": Template(
        TEMPLATES / "game-package", "my_game", "Cellar-v0", "a few minutes", "eval, levels, a game of your own"
    ),
    "dataset": Template(
        TEMPLATES / "dataset-package", "my_data", "Measures-v0", "a few minutes", "a suite, rescore, a wheel"
    ),
    "gymnasium": Template(
        TEMPLATES / "gymnasium-package", "my_gym", "Guess-v0", "a few minutes", "eval, a game of your own"
    ),
}
MAX_NAME = 40
_RESERVED = {"areal": "it is the namespace of the built-in environments", "tests": "it is the folder of the tests"}


def init(name: str, into: Path | str = ".", kind: Kind = "tool") -> Path:
    """Write the package ``name`` to the new folder ``into/name`` and return that folder.

    ``into`` is made if absent. The folder appears complete or not at all. Raises ConfigError for a name that cannot be
    imported or is taken, a folder that exists, and a disk that refuses.
    """
    require_name(name)
    folder = Path(into) / name
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists already: choose another name, another --into, or remove it")
    require_free(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as staging:
            made = Path(staging) / name
            made.mkdir()
            template = KINDS[kind]
            for source in template_files(template.folder):
                place = source.relative_to(template.folder).as_posix()
                target = made / place.replace(template.placeholder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                text = source.read_text(encoding="utf-8").replace(template.placeholder, name)
                target.write_text(text, encoding="utf-8")
            shutil.move(made, folder)
    except OSError as error:
        room = f"{room_to_make(folder)}, or " if is_full(error) else ""
        raise ConfigError(f"cannot write {folder}: {error.strerror}; {room}choose another --into") from error
    return folder


def require_name(name: str) -> None:
    """Raise ConfigError unless ``name`` is an ASCII identifier that a distribution and a namespace may have too."""
    if len(name) > MAX_NAME:
        raise ConfigError(f"the name {name[:MAX_NAME]!r}… has {len(name)} characters: at most {MAX_NAME} are allowed")
    if re.fullmatch(r"[A-Za-z](\w*[A-Za-z0-9])?", name, re.ASCII) is None:
        like = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_0123456789")
        hint = f", for example {like!r}" if like else ""
        raise ConfigError(
            f"{name!r} is no package name: use letters, digits and inner underscores, a letter first{hint}"
        )
    if keyword.iskeyword(name):
        raise ConfigError(f"{name!r} is a keyword of Python: choose another name, for example '{name}_env'")


def require_free(name: str) -> None:
    """Raise ConfigError where a package called ``name`` would hide, or be hidden by, another one."""
    reason = _RESERVED.get(name.lower(), "")
    if not reason and name in sys.stdlib_module_names:
        reason = "it is a module of Python's standard library"
    if not reason and any(e.name == name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)):
        reason = f"an installed package registers environments as {name}/…"
    if not reason and name in sys.modules:
        reason = "it is an importable module"
    if not reason:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:  # a namespace package (any folder) has no origin
            reason = f"{found.origin} is imported by that name"
    if reason:
        raise ConfigError(f"the name {name!r} is taken: {reason}. Choose another, for example '{name}_env'")


def template_files(folder: Path) -> list[Path]:
    """Return the template's files, sorted.

    What Python and editors leave beside them is no part of it.
    """
    kinds = (".py", ".toml", ".md", ".jsonl")
    files = [p for p in folder.rglob("*") if p.suffix in kinds or p.name == ".gitignore"]
    return sorted(files)


def next_steps(folder: Path, kind: Kind = "tool") -> str:
    """Write what ``areal-agents init`` prints, which is the files and the commands that come next."""
    name = folder.name
    files = "\n".join(f"  {p.relative_to(folder)}" for p in sorted(folder.rglob("*")) if p.is_file())
    return f"""{folder}:
{files}

Next:
  cd {folder}
  pip install -e '.[test]'
  python -m pytest
  areal-agents check {name}/{KINDS[kind].env}
  areal-agents train train.toml              # {KINDS[kind].trains} on two cores
README.md goes on: {KINDS[kind].further}."""
