"""The import of somebody else's module, which may raise anything, exit or print, and must cost only itself."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from types import ModuleType
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.utils.exits import no_exit


def import_foreign(name: str) -> ModuleType:
    """Import the module ``name``.

    Raises what the module raises, and RuntimeError where it exits. See ``contained``.
    """
    with contained():
        return importlib.import_module(name)


def find_foreign(name: str, where: str) -> Any:
    """Return what ``package.module:name`` names.

    Raises ConfigError, whose message begins with ``where``, for a module that cannot be imported or lacks the name.
    """
    module_name, _, path = name.partition(":")
    try:
        module = import_foreign(module_name)
    except Exception as error:  # a boundary: the author's module may raise anything
        raise ConfigError(f"{where}: importing {module_name!r} failed: {error!r}") from error
    try:
        return attrgetter(path)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(path, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{where}: module {module_name!r} has no {path!r}{hint}") from error


@contextmanager
def contained() -> Iterator[None]:
    """Raise RuntimeError in place of ``sys.exit`` and of other exceptions that are no Exception.

    Ctrl-C passes: it is the user's.
    """
    interrupted: KeyboardInterrupt | None = None
    with no_exit():
        try:
            yield
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
