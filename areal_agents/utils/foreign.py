"""The import of somebody else's module, which may raise anything, exit or print, and must cost only itself."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from areal_agents.utils.exits import no_exit


def import_foreign(name: str) -> ModuleType:
    """Import the module ``name``.

    Raises what the module raises, and RuntimeError where it exits. See ``contained``.
    """
    with contained():
        return importlib.import_module(name)


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
