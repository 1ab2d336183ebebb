"""The attacks that a sandbox must hold, in one list: hostile code inside, and the host that looks what came of it.

Each has a control, which shows that the attack did run, and says what it needs: attacks that must have been held before
it is safe to try. So a backend without isolation is told so, and its host is not harmed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from areal_agents.sandboxes import attacks_files as files
from areal_agents.sandboxes import attacks_reach as reach
from areal_agents.sandboxes import attacks_resources as resources
from areal_agents.sandboxes.subject import Subject


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. ``run`` returns what was seen, or raises NotContained or NotTried."""

    name: str
    what: str
    run: Callable[[Subject], Awaitable[str]]
    needs: tuple[str, ...] = ()


_PROCESSES: Final = ("host processes",)
_CALLS: Final = "mount, unshare, bpf, io_uring, keyctl, perf, ptrace, userfaultfd and others"

ATTACKS: Final[tuple[Attack, ...]] = (
    Attack("host processes", "see and signal a process of the host", reach.host_processes),
    Attack("secret files", "read /etc/shadow and other secrets", reach.secret_files),
    Attack("host environment", "find the parent's environment, in /proc too", reach.host_environment),
    Attack("network", "connect to the host's loopback, an abstract socket, the internet", reach.network),
    Attack("writes outside", "write anywhere but /work, /tmp and /dev/shm", reach.writes_outside),
    Attack("devices", "make and open device files", reach.devices),
    Attack("pid 1", "signal, trace and read pid 1 and the parent", reach.pid_1, _PROCESSES),
    Attack(
        "system calls",
        _CALLS,
        reach.system_calls,
        _PROCESSES,
    ),
    Attack("leftovers", "leave files and processes for another session", reach.leftovers, ("writes outside",)),
    Attack("links", "symlinks and hard links under uploads, downloads and snapshots", files.links),
    Attack("odd files", "pipes, sockets, sparse and closed files under downloads", files.odd_files),
    Attack("infinite loop", "never end", resources.infinite_loop),
    Attack("output", "print 1 GB", resources.endless_output),
    Attack("daemons", "leave a daemonised grandchild", resources.daemons, _PROCESSES),
    Attack("memory by one", "800 MB where 512 are allowed", resources.memory_by_one),
    Attack("memory by many", "8 processes of 300 MB each", resources.memory_by_many, _PROCESSES),
    Attack("disk", "fill /work, /tmp and /dev/shm", resources.disk_fill, ("writes outside",)),
    Attack("inodes", "250000 empty files", resources.inode_fill, ("disk",)),
    Attack("fork bomb", "fork without end", resources.fork_bomb, ("host processes", "daemons")),
    Attack("deep recursion", "recurse through C", resources.deep_recursion),
    Attack("bombs", "zip, pickle and tar bombs", resources.bombs, ("memory by one",)),
    Attack("terminal escapes", "print control sequences", resources.terminal_escapes),
    Attack("rebound machinery", "rebind what a live Python is made of", resources.rebound_machinery, _PROCESSES),
)
