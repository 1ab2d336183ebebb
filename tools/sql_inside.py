"""The queries of ``sql.py``, a program of its own that imports the standard library alone.

It reads one request as JSON from stdin and prints one answer as JSON. A query that crashes SQLite or fills its memory
ends this process and nothing else. An authorizer refuses what is neither reading nor, where that is allowed, writing
rows and tables of the one database.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sqlite3
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
TEMPORARY = 256 << 20
"""Bytes of all temporary files that a query sorts in, beyond those of the database."""
WATCH_S = 0.01
"""Seconds between two looks at them."""
MAX_CELL = 300
MAX_CHARS = 64 << 10
MAX_VALUE = 8 << 20
"""Bytes of one value, while SQLite computes."""

_READS = {
    sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE, sqlite3.SQLITE_FUNCTION,
}  # fmt: skip
_WRITES = {
    sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE, sqlite3.SQLITE_TRANSACTION,
    sqlite3.SQLITE_SAVEPOINT, sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_REINDEX, sqlite3.SQLITE_ANALYZE,
    sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_TRIGGER,
    sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_DROP_INDEX, sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_TRIGGER,
    sqlite3.SQLITE_DROP_VIEW, sqlite3.SQLITE_CREATE_TEMP_INDEX, sqlite3.SQLITE_CREATE_TEMP_TABLE,
    sqlite3.SQLITE_CREATE_TEMP_TRIGGER, sqlite3.SQLITE_CREATE_TEMP_VIEW, sqlite3.SQLITE_DROP_TEMP_INDEX,
    sqlite3.SQLITE_DROP_TEMP_TABLE, sqlite3.SQLITE_DROP_TEMP_TRIGGER, sqlite3.SQLITE_DROP_TEMP_VIEW,
}  # fmt: skip
_PRAGMAS = {
    "table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list",
    "collation_list", "function_list", "compile_options",
}  # fmt: skip
"""Pragmas that only tell, whatever their argument, and tell nothing of this machine: no path, say."""
_FUNCTIONS = ("json_each", "json_tree")
"""Tables that SQLite makes of arguments. Others tell of the file, or of the machine."""
_NAMED = "SELECT 1 FROM sqlite_master WHERE lower(name) = ?"
_BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FULL}
"""What no query that reads can cause: the file is broken, or the machine's disk is full."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What is no character of a line: its ends, what a terminal obeys, and what UTF-8 cannot write."""
_ENDS = {
    "data", "idx", "content", "docsize", "config", "segments", "segdir", "stat", "node", "parent", "rowid",
}  # fmt: skip
"""Of the names of the tables in which SQLite's own virtual tables (FTS3 to FTS5, R-tree) keep their data."""
_FUNCTIONS_REFUSED = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}


def authorizer(writable: bool, virtual: list[str], refused: list[str]) -> Any:
    """Return SQLite's callback, which adds to ``refused`` what it refuses.

    ``virtual`` are the database's virtual tables. What such a table keeps its data in must not be made up by a query:
    that is a file of a format whose readers were often wrong.
    """

    kept = {*virtual, *(f"{table}_{end}" for table in virtual for end in _ENDS)}

    def belongs(name: str | None) -> bool:
        return name is not None and name.lower() in kept

    def allow(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            ok = (second or "").lower() not in _FUNCTIONS_REFUSED
            what = f"the function {second}"
        elif action == sqlite3.SQLITE_PRAGMA:
            ok, what = (first or "").lower() in _PRAGMAS, f"PRAGMA {first}"
        elif action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
            ok, what = False, "ATTACH, DETACH and VACUUM"
        elif action in _WRITES and (belongs(first) or (action != sqlite3.SQLITE_UPDATE and belongs(second))):
            ok, what = False, "changing a virtual table"
        else:
            ok = action in _READS or (writable and action in _WRITES)
            what = "changing the schema or other tables" if writable else "a statement that writes"
        if not ok:
            refused.append(what)
        return sqlite3.SQLITE_OK if ok else sqlite3.SQLITE_DENY

    return allow


def _instead(what: str, writable: bool) -> str:
    """Say what may be done where something was refused, or return ""."""
    if what.startswith("PRAGMA "):
        return f"as PRAGMA NAME(…) or SELECT … FROM pragma_NAME(…) these may be used: {', '.join(sorted(_PRAGMAS))}"
    return "" if writable else "the database is read-only"


def declare(connection: sqlite3.Connection, query: str) -> None:
    """Have SQLite make those of a query's tables that it makes of arguments.

    The authorizer would be asked as if they were new ones. What must not be used it refuses by its pragma's name then.
    """
    try:
        pragmas = [name for (name,) in connection.execute("PRAGMA pragma_list")]
    except sqlite3.Error:
        pragmas = []
    for name in (*_FUNCTIONS, *(f"pragma_{name}" for name in {*pragmas, *_PRAGMAS})):
        # A table or a view of that name is meant where there is one, and that is the authorizer's business.
        if name in query.lower() and not connection.execute(_NAMED, (name,)).fetchone():
            with contextlib.suppress(sqlite3.Error):  # one that tells nothing, or that this SQLite has not
                connection.execute(f'EXPLAIN SELECT 1 FROM "{name}"')


def cell(value: object) -> str:
    """Write one value in one line."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"(a blob of {len(value)} bytes)"
    text = str(value)
    text = text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}… ({len(text)} characters)"
    text = text.replace("\\", "\\\\").replace("|", "\\|")
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def table(cursor: sqlite3.Cursor, max_rows: int) -> str:
    """Write the rows of a query as a table of texts."""
    rows = [" | ".join(cell(column[0]) for column in cursor.description)]
    used, count, more = len(rows[0]), 0, False
    for row in cursor:
        line = " | ".join(map(cell, row))
        if count == max_rows or used + len(line) > MAX_CHARS:
            more = True
            break
        rows.append(line)
        used, count = used + len(line) + 1, count + 1
    end = f"({count} row{'' if count == 1 else 's'}"
    end += "; there are more: use LIMIT and OFFSET, or count them)" if more else ")"
    return "\n".join([*rows, end])


def run(request: dict[str, Any]) -> dict[str, str]:
    """Run one statement."""
    writable, seconds = request["writable"], request["seconds"]
    mode = "rw" if writable else "ro"
    end = time.process_time() + seconds  # of the processor: a busy machine must not cost the model reward
    refused: list[str] = []
    opened = False
    try:
        connection = sqlite3.connect(
            f"{Path(request['path']).as_uri()}?mode={mode}",
            uri=True,
            timeout=seconds,
            isolation_level=None,
            cached_statements=0,
        )
        # Values that are no UTF-8 are shown, as the rest is.
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        for limit, value in (
            (sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE), (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0), (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000), (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 20),
        ):  # fmt: skip
            connection.setlimit(limit, value)
        if not writable:
            connection.execute("PRAGMA query_only = ON")
        connection.execute("PRAGMA schema_version")
        virtual = connection.execute("SELECT lower(name) FROM sqlite_master WHERE type = 'table' AND rootpage = 0")
        names = [name for (name,) in virtual]
        declare(connection, request["query"])
        opened = True
        connection.set_progress_handler(lambda: time.process_time() > end, 10_000)
        connection.set_authorizer(authorizer(writable, names, refused))
        try:
            cursor = connection.execute(request["query"])
            if cursor.description is None:
                changed = cursor.rowcount
                return {"text": f"done; {changed} row{'' if changed == 1 else 's'} changed" if changed >= 0 else "done"}
            return {"text": table(cursor, request["rows"])}
        finally:
            connection.set_progress_handler(None, 0)
            connection.close()
    except sqlite3.Warning as error:  # more than one statement, before Python 3.12
        return {"error": str(error)}
    except (sqlite3.Error, sqlite3.ProgrammingError) as error:
        if refused and "vtable constructor failed" in str(error):
            return {"error": f"{str(error).rpartition(': ')[2]} is a virtual table, and these are not allowed"}
        if refused:
            return {"error": f"{refused[0]} is not allowed; {_instead(refused[0], writable)}".removesuffix("; ")}
        if "interrupted" in str(error):
            return {"timeout": f"stopped after {seconds:g} s"}
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_IOERR and opened:  # of a write: one file alone has reached the limit
            return {"error": too_large(request)}
        # What a query changes may break; what it only reads was broken before.
        broken = not writable and (code in _BROKEN or not opened)
        return {"broken" if broken else "error": str(error)}
    except (ValueError, OverflowError) as error:  # a NUL, half a surrogate pair
        return {"error": f"the query is no text for SQLite: {error}"}
    except MemoryError:
        return {"error": "out of memory"}


def temporary_bytes() -> int:
    """Return the bytes of the temporary files that are open: SQLite opens and unlinks one for each sort."""
    total = 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            seen = os.fstat(int(name))
            total += seen.st_size if stat.S_ISREG(seen.st_mode) and not seen.st_nlink else 0
    return total


def most_bytes(request: dict[str, Any]) -> int:
    """Return what a file, and all temporary files together, may have."""
    return int(request["file_size"]) + TEMPORARY


def too_large(request: dict[str, Any]) -> str:
    return f"the query needs more than {most_bytes(request) >> 20} MiB of disk"


def watch(request: dict[str, Any], answering: threading.Lock) -> None:
    """End this process once its temporary files are too large together: the kernel's limit bounds each alone.

    SQLite asks nobody while it merges what it sorts, so this is a thread.
    """
    while True:
        time.sleep(WATCH_S)
        if temporary_bytes() > most_bytes(request) and answering.acquire(blocking=False):
            os.write(1, json.dumps({"error": too_large(request)}).encode())
            os._exit(0)


def main() -> None:
    """Answer one request within the limits of this process."""
    request = json.load(sys.stdin)
    cpu = int(request["seconds"]) + 2
    for which, value in (
        (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, most_bytes(request)),
    ):  # fmt: skip
        hard = resource.getrlimit(which)[1]
        # At the hard limit of CPU time the kernel sends SIGKILL, at the soft one SIGXCPU, which names the cause.
        most = value + 1 if which == resource.RLIMIT_CPU else value
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (min(value, most), most))
    answering = threading.Lock()
    threading.Thread(target=watch, args=(request, answering), daemon=True).start()
    answer = run(request)
    answering.acquire()  # held to the end
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
