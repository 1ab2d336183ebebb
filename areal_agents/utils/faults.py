"""Errors of somebody else's code, and whether something outside of it is to blame."""

from __future__ import annotations

import errno
import socket

_DEPTH = 16
_KINDS = (ConnectionError, TimeoutError, socket.gaierror, socket.herror, MemoryError)
_NUMBERS = {
    errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.ENOSPC, errno.EAGAIN, errno.EIO,
}  # fmt: skip


def from_outside(error: BaseException) -> bool:
    """Say whether ``error`` comes from something that the code talks to, or from a machine without resources.

    A refused connection, a timeout, too many open files: none of them says anything about the work itself. The errors
    behind ``error`` count as well.
    """
    found: BaseException | None = error
    for _ in range(_DEPTH):
        if found is None:
            return False
        if isinstance(found, _KINDS) or (isinstance(found, OSError) and found.errno in _NUMBERS):
            return True
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return False
