"""The queries of ``sql.py``, a program of its own that imports the standard library alone.

It reads one request as JSON from stdin and prints one answer as JSON. A query that crashes SQLite or fills its memory
ends this process and nothing else. An authorizer refuses what is neither reading nor, where that is allowed, writing
rows and tables of the one database.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
TEMPORARY = 256 << 20
"""Bytes of a temporary file that a query sorts in."""
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
    "database_list", "collation_list", "function_list", "compile_options",
}  # fmt: skip
"""Pragmas that only tell, whatever their argument."""
_FUNCTIONS_REFUSED = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit"}


def authorizer(writable: bool, refused: list[str]) -> Any:
    """Return SQLite's callback, which adds to ``refused`` what it refuses."""

    def allow(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
        if action == sqlite3.SQLITE_FUNCTION:
            ok = (second or "").lower() not in _FUNCTIONS_REFUSED
            what = f"the function {second}"
        elif action == sqlite3.SQLITE_PRAGMA:
            ok, what = (first or "").lower() in _PRAGMAS, f"PRAGMA {first}"
        elif action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
            ok, what = False, "ATTACH, DETACH and VACUUM"
        else:
            ok = action in _READS or (writable and action in _WRITES)
            what = "changing the schema or other tables" if writable else "a statement that writes"
        if not ok:
            refused.append(what)
        return sqlite3.SQLITE_OK if ok else sqlite3.SQLITE_DENY

    return allow


def cell(value: object) -> str:
    """Write one value in one line."""
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"(a blob of {len(value)} bytes)"
    text = str(value)
    text = text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]}… ({len(text)} characters)"
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("|", "\\|")


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
        connection.set_progress_handler(lambda: time.process_time() > end, 10_000)
        connection.set_authorizer(authorizer(writable, refused))
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
        if refused:
            return {"error": f"{refused[0]} is not allowed" + ("" if writable else "; the database is read-only")}
        if "interrupted" in str(error):
            return {"timeout": f"stopped after {seconds:g} s"}
        return {"error": str(error)}
    except (ValueError, OverflowError) as error:  # a NUL, half a surrogate pair
        return {"error": f"the query is no text for SQLite: {error}"}
    except MemoryError:
        return {"error": "out of memory"}


def main() -> None:
    """Answer one request within the limits of this process."""
    request = json.load(sys.stdin)
    cpu = int(request["seconds"]) + 2
    for which, value in (
        (resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, request["file_size"] + TEMPORARY),
    ):  # fmt: skip
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (value, value) if hard == resource.RLIM_INFINITY else (min(value, hard), hard))
    json.dump(run(request), sys.stdout)


if __name__ == "__main__":
    main()
