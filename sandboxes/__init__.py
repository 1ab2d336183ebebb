"""Sandbox backends by name.

``get(name)`` builds a backend, ``shared(name)`` returns the one of the running event loop, ``close_shared()`` ends
those. Names: ``bubblewrap`` (the default), ``unsafe_local`` (no isolation), or ``"module:Class"``.
"""

if __name__ != "areal_agents.sandboxes":
    raise ImportError("import areal_agents.sandboxes, not sandboxes")


import asyncio
import difflib
import importlib
import os
from typing import Final, cast
from weakref import WeakKeyDictionary

from areal_agents.errors import ArealError, RegistryError
from areal_agents.sandbox import SandboxBackend, require_linux

_BACKENDS: Final = {
    "bubblewrap": "areal_agents.sandboxes.bubblewrap:BubblewrapBackend",
    "unsafe_local": "areal_agents.sandboxes.unsafe_local:UnsafeLocalBackend",
}

_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[int, str], SandboxBackend]] = WeakKeyDictionary()


def names() -> tuple[str, ...]:
    """Return the registered backend names."""
    return tuple(sorted(_BACKENDS))


def get(name: str) -> SandboxBackend:
    """Build a new backend with its default settings.

    The caller closes it with ``aclose``. Raises RegistryError for a name that is unknown or cannot be imported, and
    SandboxUnavailable for one of ours on another system than Linux.
    """
    target = _BACKENDS.get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, _BACKENDS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise RegistryError(f"no sandbox backend {name!r}. {hint}Known: {', '.join(names())}, or 'module:Class'.")
    if name in _BACKENDS:
        require_linux(name)
        return cast(SandboxBackend, getattr(importlib.import_module(module_name), attribute)())
    return _foreign(name, module_name, attribute)


def _foreign(name: str, module: str, attribute: str) -> SandboxBackend:
    """Build somebody else's backend, whose module may raise anything or exit."""
    from areal_agents.utils.foreign import contained, import_foreign  # late: our own backends need none of it

    try:
        factory = getattr(import_foreign(module), attribute)
    except Exception as error:
        raise RegistryError(f"sandbox backend {name!r} cannot be loaded: {error}") from error
    try:
        with contained():
            return cast(SandboxBackend, factory())
    except ArealError:
        raise
    except Exception as error:
        raise RegistryError(f"sandbox backend {name!r} cannot be made: {type(error).__name__}: {error}") from error


def shared(name: str) -> SandboxBackend:
    """Return the backend ``name`` of this process and the running event loop.

    It is built at first use. Raises RegistryError as ``get`` does, and RuntimeError outside an event loop.
    """
    backends = _shared.setdefault(asyncio.get_running_loop(), {})
    # A forked child has a copy of this dictionary, and must neither use nor close its parent's backends.
    key = (os.getpid(), name)
    if key not in backends:
        backends[key] = get(name)
    return backends[key]


async def close_shared() -> None:
    """Close every shared backend of this process and the running event loop."""
    backends = _shared.pop(asyncio.get_running_loop(), {})
    mine = [backend for (pid, _), backend in backends.items() if pid == os.getpid()]
    await asyncio.gather(*(backend.aclose() for backend in mine))
