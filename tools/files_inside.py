"""The file operations of ``files.py``, a program that runs inside the sandbox and imports the standard library alone.

It reads one request as JSON from stdin and prints one answer as JSON: ``{"text": …}`` or ``{"error": …}``. It walks
from the descriptor of the folder down, one name after the other, and follows no symbolic link, so that nothing outside
of the folder is reached, whatever other processes do meanwhile.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import IO, Any

MAX_SCAN = 64 << 20
"""Bytes of a file that are looked at to count its lines."""
MAX_EDIT = 4 << 20
"""Bytes of a file that is edited or searched."""
MAX_SHOWN = 7000
"""Characters of an answer."""
MAX_LINE = 500
MAX_ENTRIES = 300
MAX_WALKED = 20_000
"""Entries that one call looks at."""
MAX_DEPTH = 40
MAX_MATCHES = 100


class Refused(Exception):
    """A request that cannot be done, with the reason for the model."""


def parts_of(path: str, root: str) -> list[str]:
    """Split a path into names below the folder. An absolute one must begin with the folder's own path, or /work."""
    if "\0" in path or len(path.encode("utf-8", "surrogatepass")) > 4096:
        raise Refused("a path has no NUL character and at most 4096 bytes")
    for prefix in (root, "/work"):
        if path == prefix or path.startswith(prefix.rstrip("/") + "/"):
            path = path[len(prefix) :]
            break
    else:
        if path.startswith("/"):
            raise Refused(f"{shown(path)} is outside the working folder: give a path relative to it")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused(f"{shown(path)} has '..': give a path relative to the working folder")
    return parts


def shown(name: str) -> str:
    """Write a name without control characters, and cut."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return text if len(text) <= 200 else text[:200] + "…"


def enter(root: int, parts: list[str], *, create: bool = False) -> int:
    """Open the folder that ``parts`` lead to."""
    folder = os.dup(root)
    for part in parts:
        try:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=folder)
            refuse_link(folder, part)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def refuse_link(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise Refused(f"{shown(name)} is a symbolic link, which is not followed: name the file itself")


def kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISLNK, "symbolic link"), (stat.S_ISFIFO, "pipe"),
        (stat.S_ISSOCK, "socket"),
    ):  # fmt: skip
        if test(mode):
            return name
    return "device"


def open_file(root: int, parts: list[str]) -> IO[bytes]:
    """Open a regular file for reading. It never waits, as opening a pipe would."""
    if not parts:
        raise Refused("this is the working folder itself, not a file")
    folder = enter(root, parts[:-1])
    try:
        refuse_link(folder, parts[-1])
        number = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise Refused(f"this is a {kind(mode)}, not a file")
    return open(number, "rb")


def is_binary(start: bytes) -> bool:
    return b"\0" in start


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield number and text of each line, cut, until MAX_SCAN bytes are read."""
    scanned, number = 0, 0
    while scanned < MAX_SCAN and (line := file.readline(1 << 16)):
        number += 1
        scanned += len(line)
        yield number, line
        while not line.endswith(b"\n") and scanned < MAX_SCAN and (line := file.readline(1 << 16)):
            scanned += len(line)


def clip(line: bytes, limit: int) -> str:
    text = line.rstrip(b"\r\n").decode("utf-8", "replace")
    return text if len(text) <= limit else text[:limit] + " [… line cut]"


def read(root: int, parts: list[str], request: dict[str, Any]) -> str:
    first, last = request["first"], request["last"]
    if first < 1 or (last is not None and last < first):
        raise Refused("first must be 1 or more, and last not less than first")
    with open_file(root, parts) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(1 << 13)
        file.seek(0)
        if is_binary(start):
            raise Refused(f"this is a binary file of {size} bytes")
        rows: list[str] = []
        used, number, full = 0, 0, False
        for number, line in lines_of(file):
            if number < first or full or (last is not None and number > last):
                continue
            row = f"{number}\t{clip(line, MAX_LINE)}"
            full = used + len(row) > MAX_SHOWN
            if not full:
                rows.append(row)
                used += len(row) + 1
        total = f"at least {number}" if file.tell() < size else str(number)
    if not number:
        return "(an empty file)"
    if not rows:
        raise Refused(f"the file has {total} lines")
    end = first + len(rows) - 1
    if first == 1 and total == str(end):
        return "\n".join(rows)
    more = f"; read on with first={end + 1}" if end < number else ""
    return "\n".join([*rows, f"[lines {first} to {end} of {total}{more}]"])


def write_new(root: int, parts: list[str], data: bytes) -> bool:
    """Put a file in place as a whole, and say whether one was there.

    The name gets a new file: another name of the old one (a hard link) keeps the old content, and a full disk loses
    nothing.
    """
    if not parts:
        raise Refused("this is the working folder itself, not a file")
    folder = enter(root, parts[:-1], create=True)
    temporary = f".{os.getpid()}.{os.urandom(6).hex()}.new"
    try:
        mode, existed = 0o644, False
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
            if not stat.S_ISREG(there):
                raise Refused(f"{shown(parts[-1])} is a {kind(there)}, not a file")
            mode, existed = there & 0o777, True
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        number = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            with open(number, "wb") as file:
                file.write(data)
                os.fchmod(number, mode)
            os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
    finally:
        os.close(folder)
    return existed


def write(root: int, parts: list[str], request: dict[str, Any]) -> str:
    data = request["content"].encode()
    existed = write_new(root, parts, data)
    return f"{'replaced' if existed else 'wrote'} {shown('/'.join(parts))}: {len(data)} bytes"


def edit(root: int, parts: list[str], request: dict[str, Any]) -> str:
    old, new = request["old"].encode(), request["new"].encode()
    if not old or old == new:
        raise Refused("old must have at least one character, and new must be another text")
    with open_file(root, parts) as file:
        data = file.read(MAX_EDIT + 1)
    if len(data) > MAX_EDIT:
        raise Refused(f"the file is larger than {MAX_EDIT} bytes")
    if not data.count(old) and b"\r\n" in data and b"\r" not in old:  # a file with the other line ends
        old, new = old.replace(b"\n", b"\r\n"), new.replace(b"\n", b"\r\n")
    count = data.count(old)
    if not count:
        raise Refused("old does not occur in the file: it must be the exact text, with its spaces and line ends")
    if count > 1 and not request["all"]:
        places: list[str] = []
        at = data.find(old)
        while at >= 0 and len(places) < 10:
            places.append(str(data.count(b"\n", 0, at) + 1))
            at = data.find(old, at + len(old))
        raise Refused(f"old occurs {count} times, at lines {', '.join(places)}: give more text around it, or set all")
    first = data.count(b"\n", 0, data.find(old)) + 1
    changed = data.replace(old, new)
    if len(changed) > MAX_EDIT:
        raise Refused(f"the file would be larger than {MAX_EDIT} bytes")
    write_new(root, parts, changed)
    return f"edited {shown('/'.join(parts))}: {count} place{'s' if count > 1 else ''}, the first at line {first}"


def walk(folder: int, prefix: str, depth: int, budget: list[int]) -> Iterator[tuple[str, os.stat_result, int, str]]:
    """Yield path, status, folder and name of what is below a folder, sorted, without following links."""
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            budget[0] -= 1
            if budget[0] < 0:
                break
            names.append(entry.name)
    for name in sorted(names):
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            continue
        yield prefix + name, status, folder, name
        if stat.S_ISDIR(status.st_mode) and depth > 1:
            try:
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            except OSError:
                continue  # closed to us, or gone: its own line stands
            try:
                yield from walk(inner, f"{prefix}{name}/", depth - 1, budget)
            finally:
                os.close(inner)


def list_folder(root: int, parts: list[str], request: dict[str, Any]) -> str:
    if not 1 <= request["depth"] <= MAX_DEPTH:
        raise Refused(f"depth must be from 1 to {MAX_DEPTH}")
    rows: list[str] = []
    used, more, folder = 0, False, enter(root, parts)
    budget = [MAX_WALKED]
    try:
        for path, status, at, name in walk(folder, "", request["depth"], budget):
            row = shown(path)
            if stat.S_ISDIR(status.st_mode):
                row += "/"
            elif stat.S_ISLNK(status.st_mode):
                with contextlib.suppress(OSError):
                    row += f" -> {shown(os.readlink(name, dir_fd=at))}"
            else:
                row += f"  {status.st_size}" if stat.S_ISREG(status.st_mode) else f"  ({kind(status.st_mode)})"
            if len(rows) == MAX_ENTRIES or used + len(row) > MAX_SHOWN:
                more = True
                break
            rows.append(row)
            used += len(row) + 1
    finally:
        os.close(folder)
    if more or budget[0] < 0:
        rows.append("[there is more: list a folder of these]")
    return "\n".join(rows) or "(an empty folder)"


def search(root: int, parts: list[str], request: dict[str, Any]) -> str:
    pattern = request["text"] if request["regex"] else re.escape(request["text"])
    try:
        finder = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as wrong:
        raise Refused(f"text is no regular expression: {shown(str(wrong))}") from None
    if not request["text"]:
        raise Refused("text must have at least one character")
    rows: list[str] = []
    used, skipped, budget = 0, 0, [MAX_WALKED]
    folder = enter(root, parts)
    try:
        for path, status, at, name in walk(folder, "", MAX_DEPTH, budget):
            named = fnmatch.fnmatchcase(path, request["files"]) or fnmatch.fnmatchcase(name, request["files"])
            if not stat.S_ISREG(status.st_mode) or not named:
                continue
            if status.st_size > MAX_EDIT:
                skipped += 1
                continue
            try:
                with open_file(at, [name]) as file:
                    data = file.read(MAX_EDIT)
            except (OSError, Refused):
                skipped += 1
                continue
            if is_binary(data[: 1 << 13]):
                skipped += 1
                continue
            # Lines as `read` numbers them: a form feed ends none.
            for number, line in enumerate(data.decode("utf-8", "replace").removesuffix("\n").split("\n"), 1):
                if finder.search(line.removesuffix("\r")) is None:
                    continue
                row = f"{shown(path)}:{number}: {clip(line.strip().encode(), 200)}"
                if len(rows) == MAX_MATCHES or used + len(row) > MAX_SHOWN:
                    return "\n".join([*rows, "[there are more: search for a longer text, or in one folder]"])
                rows.append(row)
                used += len(row) + 1
    finally:
        os.close(folder)
    if skipped:
        rows.append(f"[{skipped} binary, large or unreadable files were left out]")
    if budget[0] < 0:
        rows.append("[there are more files than could be looked at: search in one folder]")
    return "\n".join(rows) or "(no line with it)"


OPERATIONS = {"read": read, "write": write, "edit": edit, "list": list_folder, "search": search}


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Do what was asked. What the file system says is an answer too."""
    try:
        where = request["root"] or os.getcwd()
        root = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return {"text": OPERATIONS[request["op"]](root, parts_of(request["path"], where), request)}
        finally:
            os.close(root)
    except Refused as reason:
        return {"error": str(reason)}
    except OSError as error:
        return {"error": f"{shown(request['path'])}: {os.strerror(error.errno) if error.errno else error}"}
    except (RecursionError, MemoryError):
        return {"error": "this is too large to look at"}
    except UnicodeError:
        return {"error": "the path or the content is no text that UTF-8 can write"}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
