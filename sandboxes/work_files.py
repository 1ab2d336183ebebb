"""The files of a sandbox: written, read, packed and unpacked below a directory that hostile code may have filled.

Each function walks from a directory descriptor and follows no symlink, wherever it runs. Sent into the sandbox with
the supervisor, so it imports only the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import stat
from collections.abc import Iterator
from typing import IO, Any

BAD_ARCHIVE = 200
"""Exit code of a file operation that got no archive it may unpack."""
CHUNK = 1 << 16
SCRATCH = ("/tmp", "/dev/shm")
"""What code may write besides /work. No snapshot holds it."""


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
    """Remove everything below ``root``, however deep it is: inner folders are moved up, so no path grows long."""
    names = os.listdir(root)
    taken = set(names)
    free = (other for other in map(".moved{}".format, itertools.count()) if other not in taken)
    while names:
        name = names.pop()
        if not stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=root)
            continue
        os.chmod(name, 0o700, dir_fd=root)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        try:
            for entry in os.listdir(inner):
                if stat.S_ISDIR(os.stat(entry, dir_fd=inner, follow_symlinks=False).st_mode):
                    # A folder that nobody may write cannot be moved, because its ``..`` would change.
                    os.chmod(entry, 0o700, dir_fd=inner)
                    moved = next(free)
                    os.rename(entry, moved, src_dir_fd=inner, dst_dir_fd=root)
                    names.append(moved)
                else:
                    os.unlink(entry, dir_fd=inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=root)


def unpack(root: int, source: IO[bytes]) -> None:
    """Replace what is below ``root`` by the content of a tar in a seekable file.

    Raises ValueError for an unreadable archive, a link, a device, an absolute path or ``..``; OSError when writing
    fails. The archive is checked whole before anything changes.
    """
    inspect(source)
    source.seek(0)
    extract(root, source)


class _Ending(io.RawIOBase):
    """A file to read that does not end twice: tarfile would look for what a header promises, for hours."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__()
        self._source, self._left = source, 8

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self._left -= not data
        if self._left < 0:
            raise EOFError("it ends within a file")
        return data


def inspect(source: IO[bytes]) -> None:
    """Read a tar to its end. Raises ValueError where ``unpack`` refuses it."""
    import tarfile

    try:
        with tarfile.open(fileobj=_Ending(source), mode="r|") as archive:
            for member in archive:
                if not (member.isreg() or member.isdir()):
                    raise ValueError(f"{member.name!r} is neither a file nor a directory")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{member.name!r} leaves /work")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"not a tar archive: {error}") from error


def extract(root: int, source: IO[bytes]) -> None:
    """Replace what is below ``root`` by the content of a tar that ``inspect`` has found good."""
    import tarfile

    try:
        with tarfile.open(fileobj=_Ending(source), mode="r|") as archive:
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
    """Make the folder ``path`` below ``root``, and those above it."""
    if path.strip("./"):
        directory, name = open_parent(root, path, create=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=directory)
        os.close(directory)


def empty(folder: str) -> None:
    """Remove everything below a folder of the sandbox, which code may have closed.

    It may be a link of an image, and no code's: nobody can write beside it.
    """
    folder = os.path.realpath(folder)
    os.chmod(folder, 0o755)
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        clear(root)
    finally:
        os.close(root)


def file_operation(request: dict[str, Any]) -> int:
    """Run one file operation on stdin and stdout, and return its exit code: 0, an errno or BAD_ARCHIVE."""
    if request["op"] in ("unpack", "extract"):
        os.chmod("/work", 0o755)  # code may have closed its own folder
    root = os.open("/work", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    source, sink = open(0, "rb", closefd=False), open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
    try:
        if request["op"] == "write":
            write_file(root, request["path"], source)
        elif request["op"] == "read":
            read_file(root, request["path"], request["max_bytes"], sink)
        elif request["op"] == "pack":
            pack(root, sink)
        elif request["op"] == "inspect":
            inspect(source)
        else:
            (unpack if request["op"] == "unpack" else extract)(root, source)
            for folder in SCRATCH:
                empty(folder)
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
