"""Process 1 inside a sandbox: it starts what the host asks for, kills what is left, and moves files.

Sent to the sandbox as text and run by its system Python, so it imports only the standard library and process_gate.
As pid 1 it cannot be signalled from inside, and it is not dumpable, so code with the same uid can neither read its
memory nor its descriptors. The host owns every pipe. This process sees requests and reports exit statuses, nothing
else.

Messages on the SEQPACKET control socket (big-endian, fixed size):

    host → here   START id kind   with descriptors: request (JSON), stdin, stdout, stderr
                  KILL  id 0
    here → host   READY 0  0
                  EXIT  id status   exit code, or minus the signal number

A ``run`` ends only when no process of it is left: everything that is not a live ``spawn`` or its descendant is killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

from areal_agents.sandboxes import process_gate

FRAME = struct.Struct("!Bii")
START, KILL, READY, EXIT = 1, 2, 3, 4
RUN, SPAWN = 0, 1
BAD_ARCHIVE = 200
CHUNK = 1 << 16


# Files. Each function walks from a directory descriptor and follows no symlink, wherever it runs.


def open_parent(root: int, path: str, *, create: bool) -> tuple[int, str]:
    """Open the folder of ``path`` (relative to ``root``) and return it with the last name. The caller closes it."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise OSError(errno.EINVAL, "not a path inside /work", path)
    directory = os.dup(root)
    for part in parts[:-1]:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=directory)
        try:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        directory = inner
    return directory, parts[-1]


def write_file(root: int, path: str, source: IO[bytes], size: int = -1) -> None:
    """Write ``source`` to ``path``, and never follow a symlink. Raises OSError.

    Args:
        root: descriptor of the directory that ``path`` starts at.
        path: of a regular file; missing folders are made.
        source: the bytes.
        size: how many of them to write; -1 means all.
    """
    directory, name = open_parent(root, path, create=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        target = os.open(name, flags, 0o644, dir_fd=directory)
    finally:
        os.close(directory)
    with open(target, "wb", buffering=0) as out:
        if not stat.S_ISREG(os.fstat(target).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        out.truncate()
        while size:
            chunk = source.read(CHUNK if size < 0 else min(CHUNK, size))
            if not chunk:
                break
            size -= len(chunk) if size > 0 else 0
            view = memoryview(chunk)
            while view:
                view = view[out.write(view) :]


def open_regular(directory: int, name: str) -> IO[bytes]:
    """Open a regular file for reading. Raises OSError: ELOOP for a symlink, EINVAL for a pipe or a device."""
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    file = open(source, "rb", buffering=0)  # noqa: SIM115
    mode = os.fstat(source).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "not a regular file", name)


def read_file(root: int, path: str, max_bytes: int, sink: IO[bytes]) -> None:
    """Copy ``path`` to ``sink``. Raises OSError.

    Args:
        root: descriptor of the directory that ``path`` starts at.
        path: of a regular file.
        max_bytes: a larger file is refused with EFBIG.
        sink: takes the bytes.
    """
    directory, name = open_parent(root, path, create=False)
    try:
        source = open_regular(directory, name)
    finally:
        os.close(directory)
    with source:
        if os.fstat(source.fileno()).st_size > max_bytes:
            raise OSError(errno.EFBIG, "file larger than max_bytes", path)
        left = max_bytes
        while left and (chunk := source.read(min(CHUNK, left))):
            left -= len(chunk)
            sink.write(chunk)


def walk(root: int, prefix: str = "") -> Iterator[tuple[str, int, str]]:
    """Yield (path, directory descriptor, name) of every regular file and directory below ``root``, sorted."""
    for name in sorted(os.listdir(root)):
        mode = os.stat(name, dir_fd=root, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            yield prefix + name, root, name
        elif stat.S_ISDIR(mode):
            yield prefix + name, root, name
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
            try:
                yield from walk(inner, prefix + name + "/")
            finally:
                os.close(inner)


def pack(root: int, sink: IO[bytes]) -> None:
    """Write a tar of the regular files and directories below ``root``, without links, pipes and devices."""
    import tarfile

    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for path, directory, name in walk(root):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            member = tarfile.TarInfo(path)
            member.mode, member.mtime = status.st_mode & 0o777, int(status.st_mtime)
            if stat.S_ISDIR(status.st_mode):
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                with open_regular(directory, name) as source:
                    member.size = status.st_size
                    archive.addfile(member, source)


def clear(root: int) -> None:
    """Remove everything below ``root``."""
    for name in os.listdir(root):
        if stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
            os.chmod(name, 0o700, dir_fd=root)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
            try:
                clear(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=root)
        else:
            os.unlink(name, dir_fd=root)


def unpack(root: int, source: IO[bytes]) -> None:
    """Replace what is below ``root`` by the content of a tar in a seekable file.

    Raises ValueError for an unreadable archive, a link, a device, an absolute path or ``..``; OSError when writing
    fails. The archive is checked whole before anything changes.
    """
    import tarfile

    try:
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for member in archive:
                if not (member.isreg() or member.isdir()):
                    raise ValueError(f"{member.name!r} is neither a file nor a directory")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{member.name!r} leaves /work")
            clear(root)
            for member in archive:
                if member.isdir():
                    make_directory(root, member.name)
                elif (content := archive.extractfile(member)) is not None:
                    write_file(root, member.name, content, member.size)
                    directory, name = open_parent(root, member.name, create=False)
                    os.chmod(name, member.mode & 0o777, dir_fd=directory)
                    os.close(directory)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"not a tar archive: {error}") from error


def make_directory(root: int, path: str) -> None:
    if path.strip("./"):
        directory, name = open_parent(root, path, create=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=directory)
        os.close(directory)


def file_operation(request: dict[str, Any]) -> int:
    """Run one file operation on stdin and stdout, and return its exit code: 0, an errno or BAD_ARCHIVE."""
    root = os.open("/work", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    source, sink = open(0, "rb", closefd=False), open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
    try:
        if request["op"] == "write":
            write_file(root, request["path"], source)
        elif request["op"] == "read":
            read_file(root, request["path"], request["max_bytes"], sink)
        elif request["op"] == "pack":
            pack(root, sink)
        else:
            unpack(root, source)
    except OSError as error:
        return error.errno if error.errno and 0 < error.errno < BAD_ARCHIVE else errno.EIO
    except RecursionError:
        return errno.ENAMETOOLONG
    except MemoryError:
        return errno.ENOMEM
    except ValueError as error:
        os.write(2, str(error).encode("utf-8", "replace")[:1000])
        return BAD_ARCHIVE
    return 0


def prctl_dumpable(value: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(4, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def child(request: dict[str, Any], fds: list[int], gate: socket.socket) -> int:
    """Become the requested process, or return an exit code where there is no program to become."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    for target, source in enumerate((*fds, gate.fileno())):
        os.dup2(source, target, inheritable=target < 3)
    os.closerange(4, 1 << 16)
    if request["op"] != "exec":
        return file_operation(request)
    prctl_dumpable(1)
    # The kernel then prefers this process over pid 1 when memory runs out.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    limits = request["limits"]
    if "gate" in request and (listener := process_gate.enter(request["gate"], request["argv"])) >= 0:
        socket.send_fds(socket.socket(fileno=3), [b"."], [listener])
        limits = limits | (request["gate"]["limits"] if request["alone"] else {})
    process_gate.set_limits(limits)
    os.chdir("/work")
    try:
        os.execvpe(request["argv"][0], request["argv"], request["env"])
    except (OSError, ValueError) as error:
        os.write(2, f"{request['argv'][0][:200]}: {error}\n".encode("utf-8", "replace"))
        return 127 if isinstance(error, FileNotFoundError) else 126


class Supervisor:
    """The loop of pid 1, which serves the host's requests."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.running: dict[int, int] = {}
        self.spawned: dict[int, int] = {}
        self.gates = process_gate.Gates()
        self.wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Pid 1 is deaf to signals from inside, except to those with a handler: Python installs one for SIGINT.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def serve(self) -> None:
        self.control.send(FRAME.pack(READY, 0, 0))
        poll = self.gates.poll
        poll.register(self.control, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            self.gates.answer(ready)
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.reap()
            if self.control.fileno() in ready and not self.receive():
                return

    def receive(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.control, FRAME.size, 4)
        if not data:
            return False
        kind, ident, mode = FRAME.unpack(data)
        if kind == START:
            self.start(ident, mode, list(fds))
        else:
            for pid, job in (self.running | self.spawned).items():
                if job == ident:
                    os.kill(pid, signal.SIGKILL)
        return True

    def start(self, ident: int, mode: int, fds: list[int]) -> None:
        with open(fds[0], "rb") as file:
            file.seek(0)
            request = json.load(file)
        # A program beside a live one has a share of the memory from the start.
        request["alone"] = mode == RUN and not self.spawned
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            code = 125
            try:
                code = child(request, fds[1:], theirs)
            finally:
                os._exit(code)
        theirs.close()
        for descriptor in fds[1:]:
            os.close(descriptor)
        if request["op"] == "exec" and "gate" in request:
            self.gates.open(ours, request)
        ours.close()
        (self.spawned if mode == SPAWN else self.running)[pid] = ident

    def reap(self, flags: int = os.WNOHANG) -> bool:
        """Collect the dead and report them, and return False when no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, flags)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            code = os.waitstatus_to_exitcode(status)
            if pid in self.running:
                ident = self.running.pop(pid)
                self.sweep()
                self.control.send(FRAME.pack(EXIT, ident, code))
            elif pid in self.spawned:
                ident = self.spawned.pop(pid)
                # A sweep also kills what a running request started: while there is one, its own end sweeps.
                if not self.running:
                    self.sweep()
                self.control.send(FRAME.pack(EXIT, ident, code))

    def sweep(self) -> None:
        """Kill every process but this one and the live spawned trees, and wait until they are gone."""
        for _ in range(200):
            if not self.spawned:
                break
            doomed = self.strays()
            if not doomed:
                return
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
            self.reap()
        # Atomic in the kernel, so that no fork outruns it. Spawned trees go too when the scan above never came clean.
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        self.reap(0)

    def strays(self) -> list[int]:
        parents: dict[int, int] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and name != "1":
                with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
                    # A zombie with threads is a process whose first thread alone has ended.
                    if fields[0] not in (b"Z", b"X") or int(fields[17]) > 1:
                        parents[int(name)] = int(fields[1])
        return [pid for pid in parents if not self.protected(pid, parents)]

    def protected(self, pid: int, parents: dict[int, int]) -> bool:
        for _ in range(len(parents) + 1):
            if pid in self.spawned:
                return True
            if pid not in parents:
                return False
            pid = parents[pid]
        return False


def main(descriptor: int) -> None:
    prctl_dumpable(0)
    Supervisor(socket.socket(fileno=descriptor)).serve()


if __name__ == "__main__" and len(sys.argv) == 2:
    main(int(sys.argv[1]))
