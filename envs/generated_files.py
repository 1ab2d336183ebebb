"""Files that an environment needs and that are made once for each machine: databases, corpora."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from areal_agents.models import cache_dir


def generated_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache, which ``make`` fills where it is not there yet.

    ``make`` must write the same in every process: two that begin at once both do, and one of the results stays. The
    name has a version, which changes with what is written.
    """
    folder = cache_dir() / "envs" / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
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
    return folder
