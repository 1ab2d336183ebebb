"""Sandbox backends by name.

``get(name)`` builds a backend, ``shared(name)`` returns the one of the running event loop, ``close_shared()`` ends
those. Names: ``bubblewrap`` (the default), ``docker``, ``unsafe_local`` (no isolation), that of an installed package's
entry point in the group ``areal_agents.sandboxes``, or ``"module:Class"``. A name may end in options of the backend,
``bubblewrap?python=/srv/sandbox-python``: an environment with packages for the code inside.
"""

if __name__ != "areal_agents.sandboxes":
    raise ImportError("import areal_agents.sandboxes, not sandboxes")


import asyncio
import difflib
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from typing import Final, cast
from weakref import WeakKeyDictionary

from areal_agents.errors import ArealError, RegistryError
from areal_agents.sandbox import SandboxBackend, require_linux

_BACKENDS: Final = {
    "bubblewrap": "areal_agents.sandboxes.bubblewrap:BubblewrapBackend",
    "docker": "areal_agents.sandboxes.docker_backend:DockerBackend",
    "unsafe_local": "areal_agents.sandboxes.unsafe_local:UnsafeLocalBackend",
}

_TEXTS: Final = (str, "str", "str | Sequence[str]")

GROUP: Final = "areal_agents.sandboxes"
"""Entry points of this group are backends of installed packages."""

_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[int, str], SandboxBackend]] = WeakKeyDictionary()


def names() -> tuple[str, ...]:
    """Return the names of our backends and of installed packages'."""
    return tuple(sorted({*_BACKENDS, *(entry.name for entry in importlib.metadata.entry_points(group=GROUP))}))


def get(name: str) -> SandboxBackend:
    """Build a new backend.

    The caller closes it with ``aclose``. Raises RegistryError for a name that is unknown, used twice or cannot be
    imported, and for an option that the backend does not take, and SandboxUnavailable for one of ours on another system
    than Linux.
    """
    plain, _, query = name.partition("?")
    module_name, colon, attribute = _target(plain).partition(":")
    if not colon:
        close = difflib.get_close_matches(plain, names(), n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise RegistryError(f"no sandbox backend {plain!r}. {hint}Known: {', '.join(names())}, or 'module:Class'.")
    if plain in _BACKENDS:
        require_linux(plain)
        factory = getattr(importlib.import_module(module_name), attribute)
        options = _options(plain, query, factory)
        try:
            return cast(SandboxBackend, factory(**options))
        except ValueError as error:
            raise RegistryError(f"sandbox backend {name!r}: {error}") from error
    return _foreign(plain, query, module_name, attribute)


def _target(name: str) -> str:
    """Return the ``module:Class`` of a name, or the name itself where nobody has registered it."""
    entries = {entry.value for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == name}
    if name in _BACKENDS and entries:
        raise RegistryError(f"sandbox backend {name!r}: {', '.join(entries)} uses a name of ours. Rename it there.")
    if len(entries) > 1:
        raise RegistryError(f"sandbox backend {name!r}: several packages use that name: {', '.join(sorted(entries))}.")
    return _BACKENDS.get(name) or next(iter(entries), name)


def _foreign(name: str, query: str, module: str, attribute: str) -> SandboxBackend:
    """Build somebody else's backend, whose module may raise anything or exit."""
    from areal_agents.utils.foreign import contained, import_foreign  # late: our own backends need none of it

    try:
        factory = getattr(import_foreign(module), attribute)
    except Exception as error:
        raise RegistryError(f"sandbox backend {name!r} cannot be loaded: {error}") from error
    try:
        with contained():
            return cast(SandboxBackend, factory(**_options(name, query, factory)))
    except ArealError:
        raise
    except Exception as error:
        raise RegistryError(f"sandbox backend {name!r} cannot be made: {type(error).__name__}: {error}") from error


def _options(name: str, query: str, factory: Callable[..., object]) -> dict[str, str]:
    """Read ``key=value&key=value``: the constructor's keywords that are texts."""
    known = [p.name for p in inspect.signature(factory).parameters.values() if p.annotation in _TEXTS]
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in known or not value or key in options:
            raise RegistryError(
                f"sandbox backend {name!r}: {part!r} is no option. Write {name}?KEY=VALUE, with "
                f"{' or '.join(known) or 'no key at all: it has none'} as the key."
            )
        options[key] = value
    return options


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
