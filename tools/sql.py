"""The ``sql`` tool, which runs one statement on a SQLite database, by default read-only.

    query ─▶ a process of its own (``sql_inside.py``): authorizer, limits of time, memory and size ─▶ a table as text

With ``writable=True`` each episode writes into a copy of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import ConfigError, EnvError, TaskError
from areal_agents.tool import ToolError, ToolResult, ToolSpec, made_by, tool
from areal_agents.tool_resources import Resources

GRACE_S: Final = 60.0
"""Seconds of wall clock beyond a query's own seconds of the processor, for a busy machine."""
MAX_ANSWER: Final = 2 << 20
MAX_QUERY_CHARS: Final = 20_000
_HEADER: Final = b"SQLite format 3\0"


def sql_tool(
    database: str | Path,
    *,
    writable: bool = False,
    max_rows: int = 50,
    seconds: float = 5.0,
    name: str = "sql",
) -> ToolSpec:
    """Make the tool for a database.

    Args:
        database: its file. ``{key}`` stands for what the task's payload has there: a database a task.
        writable: each episode changes a copy, which its end removes.
        max_rows: rows that one answer shows.
        seconds: of processor time, for one query.
        name: what the model calls it.

    Raises:
        ConfigError: the file is no SQLite database.
        ValueError: a limit is not positive.
    """
    if max_rows < 1 or seconds <= 0:
        raise ValueError(f"sql_tool: max_rows = {max_rows} and seconds = {seconds} must be positive")
    pattern = str(database)
    if not _by_task(pattern):
        _check(Path(pattern), ConfigError)

    async def ask(query: str, payload: Mapping[str, Any], resources: Resources) -> ToolResult:
        path = _database(pattern, payload)
        kind = TaskError if _by_task(pattern) else EnvError
        # A sort may need a temporary file as large as the database. A copy grows beyond the database by a bound too.
        size = path.stat().st_size
        if writable:
            try:
                path = await resources.get(("sql", path), functools.partial(_copy, path))
            except sqlite3.Error as error:
                raise kind(f"the sql tool cannot copy {str(path)!r}: {error}") from error
        limits = {"rows": max_rows, "seconds": seconds, "file_size": size}
        answer = await _run({"path": str(path), "query": query, "writable": writable, **limits})
        if isinstance(answer, str):
            raise kind(f"the sql tool cannot read {str(path)!r}: {answer}")
        return answer

    limits: dict[str, Any] = {"name": name, "timeout": seconds + GRACE_S + 30.0, "max_output_chars": 8000}
    if _by_task(pattern):

        @tool(**limits)
        async def sql(query: str, *, env: Any, resources: Resources) -> ToolResult:
            """Run one SQL statement on the SQLite database. sqlite_master lists its tables."""
            return await ask(query, env.task.payload, resources)
    else:

        @tool(parallel=not writable, **limits)
        async def sql(query: str, *, resources: Resources) -> ToolResult:
            """Run one SQL statement on the SQLite database. sqlite_master lists its tables."""
            return await ask(query, {}, resources)

    return made_by(_make, pattern, writable, max_rows, seconds, name)(sql)


def _make(database: str, writable: bool, max_rows: int, seconds: float, name: str) -> ToolSpec:
    return sql_tool(database, writable=writable, max_rows=max_rows, seconds=seconds, name=name)


def _by_task(pattern: str) -> bool:
    return "{" in pattern


def _check(path: Path, error: type[ConfigError] | type[TaskError]) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_HEADER))
    except OSError as wrong:
        raise error(f"the sql tool cannot read {str(path)!r}: {wrong.strerror}") from wrong
    if start not in (_HEADER, b""):  # an empty file is an empty database
        raise error(f"the sql tool's {str(path)!r} is no SQLite database")


def _database(pattern: str, payload: Mapping[str, Any]) -> Path:
    if not _by_task(pattern):
        return Path(pattern).resolve()
    try:
        path = Path(pattern.format_map(payload))
    except (KeyError, ValueError, AttributeError, IndexError) as wrong:
        raise TaskError(f"the sql tool's {pattern!r} does not fit the task's payload: {wrong!r}") from wrong
    _check(path, TaskError)
    return path.resolve()


@contextlib.asynccontextmanager
async def _copy(path: Path) -> AsyncIterator[Path]:
    """Give a copy of a database, with what its log of writes holds."""
    with tempfile.TemporaryDirectory(prefix="areal-agents-sql-") as folder:
        copy = Path(folder) / "copy.sqlite"
        await asyncio.to_thread(_back_up, path, copy)
        yield copy


def _back_up(path: Path, copy: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


async def _run(request: dict[str, Any]) -> ToolResult | str:
    """Run a query in a process of its own, and return what it found, or what is wrong with the database."""
    query, seconds = request["query"], request["seconds"]
    if len(query) > MAX_QUERY_CHARS:
        raise ToolError(f"error: the query has {len(query)} characters, more than {MAX_QUERY_CHARS}")
    program = str(Path(__file__).with_name("sql_inside.py").resolve())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", "-X", "utf8", program,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={"TMPDIR": tempfile.gettempdir(), "MALLOC_ARENA_MAX": "1"}, cwd="/", limit=MAX_ANSWER,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    late = False
    try:
        async with asyncio.timeout(seconds + GRACE_S):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(json.dumps(request).encode())
                await process.stdin.drain()
                process.stdin.close()
            data = b""
            while len(data) < MAX_ANSWER and (chunk := await process.stdout.read(1 << 16)):
                data += chunk
            if len(data) < MAX_ANSWER:  # asyncio may lose the exit code of a process that is killed while it ends
                await process.wait()
    except TimeoutError:
        late = True
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        code = await process.wait()
    if late or code == -signal.SIGXCPU:  # one step of SQLite took longer than all of the time
        return ToolResult(f"error: stopped after {seconds:g} s", "timeout")
    return _answer(data, code)


def _answer(data: bytes, code: int) -> ToolResult | str:
    try:
        answer = json.loads(data)
    except ValueError:
        if code < 0:
            raise ToolError(f"error: the query ended its process (signal {-code}): it needs too much") from None
        raise EnvError(f"the sql tool's process failed with exit code {code}") from None
    if "broken" in answer:
        return str(answer["broken"])
    if "timeout" in answer:
        return ToolResult(f"error: {answer['timeout']}", "timeout")
    return ToolResult(f"error: {answer['error']}", "error") if "error" in answer else ToolResult(answer["text"])
