"""Errors of somebody else's code, and whether something outside of it is to blame."""

from __future__ import annotations

import errno
import re
import socket

_DEPTH = 16
_KINDS = (ConnectionError, TimeoutError, socket.gaierror, socket.herror, MemoryError)
_NUMBERS = {
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ENOSPC, errno.EAGAIN, errno.EIO,
}  # fmt: skip
_STATUSES = {408, 425, 429, 502, 503, 504, 529}
"""Answers of servers that are away or have too much to do. 500 is not one: a request may be what breaks a server."""
_NAMES = re.compile(
    r"Timeout|Connect(ion)?(Error|Closed|Lost|Reset)|Disconnected|Unavailable|RateLimit|TooManyRequests"
)
"""In the names of clients' own errors, which need not be kinds of Python's."""


def from_outside(error: BaseException) -> bool:
    """Say whether ``error`` comes from something that the code talks to, or from a machine without resources.

    A refused connection, a timeout, a server that answers 503, too many open files: none of them says anything about
    the work itself. The errors behind ``error`` count as well.
    """
    found: BaseException | None = error
    for _ in range(_DEPTH):
        if found is None:
            return False
        if isinstance(found, _KINDS) or (isinstance(found, OSError) and found.errno in _NUMBERS):
            return True
        if any(_NAMES.search(kind.__name__) for kind in type(found).__mro__) or _status(found) in _STATUSES:
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that a client's error holds, or None."""
    try:
        for holder in (error, getattr(error, "response", None)):
            for name in ("status_code", "status", "code"):
                found: object = getattr(holder, name, None)
                if isinstance(found, int):
                    return int(found)
    except Exception:  # noqa: BLE001  somebody else's object, which may raise anything
        return None
    return None
