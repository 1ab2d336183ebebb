"""The interfaces of a network namespace over which something could be sent.

Modules of the kernel (ipip, sit, ip_gre, ip6_tunnel) put a device of theirs into each namespace: tunl0, sit0, gre0. It
is down and has neither an address nor a route, so that nothing passes it. Code that looks from inside a sandbox is sent
with this file as text, so it imports only the standard library.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

FLAGS, ADDRESS, UP = 0x8913, 0x8915, 1
TABLES = {"route": 0, "if_inet6": -1, "ipv6_route": -1}
"""Files of /proc/net, and the column of an interface's name: routes and addresses."""


def rows(path: str) -> list[str]:
    """Return the lines of a file, none where a kernel without IPv6, say, has no such file."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


def asked(name: str, request: int) -> bytes:
    """Return the kernel's answer about an interface. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return fcntl.ioctl(any_socket, request, struct.pack("16s24x", name.encode()))


def is_up(name: str) -> bool:
    try:
        return bool(struct.unpack_from("H", asked(name, FLAGS), 16)[0] & UP)
    except OSError:
        return True  # not known: it counts


def has_address(name: str) -> bool:
    """Say whether an interface has an IPv4 address."""
    try:
        asked(name, ADDRESS)
    except OSError:
        return False
    return True


def interfaces(folder: str = "/proc/net") -> list[str]:
    """Return the names of the interfaces that are up, or have an address or a route."""
    names = [line.split(":")[0].strip() for line in rows(os.path.join(folder, "dev"))[2:]]
    listed = {
        line.split()[column]
        for table, column in TABLES.items()
        for line in rows(os.path.join(folder, table))
        if line.strip()
    }
    return sorted(name for name in names if name in listed or is_up(name) or has_address(name))
