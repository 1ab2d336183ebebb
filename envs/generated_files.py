"""Files that an environment needs and that are made once for each machine: databases, corpora."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

from areal_agents.errors import ConfigError
from areal_agents.models import cache_dir
from areal_agents.utils.short_text import described


def generated_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache, which ``make`` fills where it is not there yet.

    ``make`` must write the same in every process: two that begin at once both do, and one of the results stays. The
    name has a version, which changes with what is written.

    Raises:
        ConfigError: the cache cannot be written.
    """
    folder = cache_dir() / "envs" / name
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _make_in(folder, make)
    except (OSError, sqlite3.OperationalError) as error:
        raise ConfigError(
            f"{folder} cannot be made: {described(error)}. Set AREAL_AGENTS_CACHE to a folder with space that can be "
            "written"
        ) from error
    return folder


def _make_in(folder: Path, make: Callable[[Path], None]) -> None:
    """Make the folder beside its place, and move it there when it is whole."""
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(new)
        new.chmod(0o755)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():  # another process was first otherwise
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
