from __future__ import annotations

import contextlib
import json
import pickle
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.errors import ConfigError, EnvError, TaskError
from areal_agents.tool import ToolResult
from areal_agents.tools import sql_inside
from areal_agents.tools.sql import sql_tool
from areal_agents.types import Task
from tests.tools.sessions import call, play


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 orders of 1,000 customers, in a file whose name must be quoted."""
    path = tmp_path_factory.mktemp("sql") / "a shop #1?100%.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, cents INTEGER, note BLOB)")
        connection.executemany("INSERT INTO customers VALUES (?, ?)", ((n, f"name {n}") for n in range(1000)))
        connection.executemany("INSERT INTO orders VALUES (?, ?, ?, NULL)", ((n, n % 1000, n) for n in range(100_000)))
        connection.execute("UPDATE customers SET name = ? WHERE id = 7", ("a|b\nc",))
        connection.execute("UPDATE orders SET note = ? WHERE id = 1", (b"\xff\x00",))
    connection.close()
    return path


def ask(shop: Path, *queries: str, **options: bool | int | float) -> list[ToolResult]:
    return play((sql_tool(shop, **options),), *(call("sql", query=q) for q in queries))  # type: ignore[arg-type]


def test_queries_are_answered_with_tables(shop: Path) -> None:
    total, joined, odd, none, many = ask(
        shop,
        "SELECT count(*), sum(cents) AS total FROM orders;",
        "WITH t AS (SELECT customer, sum(cents) AS s FROM orders GROUP BY 1) "
        "SELECT name, s FROM t JOIN customers c ON c.id = t.customer ORDER BY s DESC LIMIT 2",
        "SELECT c.name, o.note, NULL FROM customers c, orders o WHERE c.id = 7 AND o.id = 1",
        "SELECT * FROM customers WHERE 0",
        "SELECT id FROM orders",
    )
    assert total.text == "count(*) | total\n100000 | 4999950000\n(1 row)"
    # customer c has the orders c, c + 1000, …: 100 c + 1000 (0 + … + 99) = 100 c + 4950000
    assert joined.text == "name | s\nname 999 | 5049900\nname 998 | 5049800\n(2 rows)"
    assert odd.text == "name | note | NULL\na\\|b\\nc | (a blob of 2 bytes) | NULL\n(1 row)"
    assert none.text == "id | name\n(0 rows)"
    assert many.text.splitlines()[1] == "0"
    assert many.text.splitlines()[50:] == ["49", "(50 rows; there are more: use LIMIT and OFFSET, or count them)"]


def test_the_exit_code_of_a_query_is_not_lost(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asyncio says so in a warning, and that the code was 255."""
    results = play((sql_tool(shop),), [call("sql", query="SELECT 1") for _ in range(24)])
    assert {result.text for result in results} == {"1\n1\n(1 row)"}
    assert caplog.messages == []


WRITES = [
    "INSERT INTO customers VALUES (5000, 'x')", "UPDATE customers SET name = 'x'", "DELETE FROM orders",
    "DROP TABLE orders", "CREATE TABLE t (a)", "CREATE TEMP TABLE t (a)", "ALTER TABLE orders RENAME TO o",
    "CREATE INDEX i ON orders (cents)",
    "BEGIN IMMEDIATE",
]  # fmt: skip
NEVER = [
    "ATTACH '/etc/passwd' AS p", "ATTACH ':memory:' AS m", "DETACH main", "VACUUM INTO '/tmp/areal-stolen'", "VACUUM",
    "PRAGMA journal_mode = WAL", "PRAGMA query_only = OFF", "PRAGMA writable_schema = ON", "PRAGMA temp_store = MEMORY",
    "PRAGMA temp_store_directory = '/tmp'", "PRAGMA hard_heap_limit = 1", "PRAGMA wal_checkpoint",
    "SELECT load_extension('/tmp/x.so')", "SELECT fts3_tokenizer('simple')", "SELECT readfile('/etc/passwd')",
    "SELECT writefile('/tmp/areal-x', 'y')", "CREATE VIRTUAL TABLE v USING fts5(a)",
    "SELECT * FROM pragma_user_version(3)",
    "INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 1, 'x')",
    "PRAGMA database_list", "SELECT file FROM pragma_database_list", "PRAGMA temp_store_directory",  # paths of the host
    "PRAGMA module_list", "PRAGMA cache_size = 1000000",
]  # fmt: skip


def test_nothing_is_written_and_nothing_else_is_opened(shop: Path) -> None:
    before = shop.read_bytes()
    results = ask(shop, *WRITES, *NEVER)
    assert [(q, r.status) for q, r in zip(WRITES + NEVER, results, strict=True) if r.status != "error"] == []
    assert "not allowed; the database is read-only" in results[0].text
    assert results[len(WRITES)].text == "error: ATTACH, DETACH and VACUUM is not allowed; the database is read-only"
    assert shop.read_bytes() == before
    assert not Path("/tmp/areal-stolen").exists()


def test_a_pragma_that_tells_is_allowed(shop: Path) -> None:
    told, master = ask(shop, "PRAGMA table_info(customers)", "SELECT name FROM sqlite_master ORDER BY 1")
    assert told.text.splitlines()[1] == "0 | id | INTEGER | 0 | NULL | 1"
    assert master.text == "name\ncustomers\norders\n(2 rows)"


def test_a_pragma_in_a_query_is_as_good_and_a_refused_one_names_the_others(shop: Path) -> None:
    told, named, *refused = ask(
        shop, "SELECT name, type FROM pragma_table_info('customers') ORDER BY 1",
        "SELECT m.name, i.name FROM sqlite_master m, pragma_table_info(m.name) i WHERE i.pk ORDER BY 1",
        "SELECT file FROM pragma_database_list", "PRAGMA database_list", "PRAGMA journal_mode = WAL",
    )  # fmt: skip
    assert told.text == "name | type\nid | INTEGER\nname | TEXT\n(2 rows)"
    assert named.status == "ok"
    for name, result in zip(("database_list", "database_list", "journal_mode"), refused, strict=True):
        assert result.text == (
            f"error: PRAGMA {name} is not allowed; as PRAGMA NAME(…) or SELECT … FROM pragma_NAME(…) these may be "
            "used: collation_list, compile_options, foreign_key_list, function_list, index_info, index_list, "
            "index_xinfo, table_info, table_list, table_xinfo"
        )


def test_json_is_read_as_a_table_and_other_made_up_tables_are_refused(shop: Path) -> None:
    each, tree, stat, made = ask(
        shop, "SELECT value * 2 AS v FROM JSON_EACH('[1, 2]')", "SELECT count(*) FROM customers, json_tree('[1]')",
        "SELECT name FROM dbstat", "CREATE TABLE json_each (a)",
    )  # fmt: skip
    assert each.text == "v\n2\n4\n(2 rows)"
    assert tree.text == "count(*)\n2000\n(1 row)"
    assert stat.text in (
        "error: dbstat is a virtual table, and these are not allowed",
        "error: no such table: dbstat",
    )
    assert made.text == "error: a statement that writes is not allowed; the database is read-only"


def test_a_view_with_the_name_of_a_made_up_table_is_a_view(shop: Path) -> None:
    made, seen, _, refused, mine = ask(
        shop, "CREATE VIEW json_each AS SELECT 7 AS n", "SELECT n FROM json_each",
        "CREATE VIEW pragma_table_list AS SELECT load_extension('/tmp/x.so') AS n", "SELECT n FROM pragma_table_list",
        "SELECT name FROM main.pragma_table_info('customers')", writable=True,
    )  # fmt: skip
    assert (made.text, seen.text) == ("done", "n\n7\n(1 row)")
    assert (refused.status, "load_extension" in refused.text) == ("error", True)
    assert mine.text == "name\nid\nname\n(2 rows)"


@pytest.mark.parametrize("writable", [False, True])
def test_each_pragma_that_is_named_may_be_used_both_ways(shop: Path, writable: bool) -> None:
    alone = ("collation_list", "compile_options", "function_list")
    names = [name if name in alone else f"{name}('customers')" for name in sorted(sql_inside._PRAGMAS)]
    queries = [query + name for name in names for query in ("PRAGMA ", "SELECT * FROM pragma_")]
    results = ask(shop, *queries, writable=writable)
    assert [(q, r.text) for q, r in zip(queries, results, strict=True) if r.status != "ok"] == []


ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
HOARDS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT randomblob(1000000) FROM c ORDER BY 1"


def test_queries_without_an_end_are_stopped(shop: Path) -> None:
    start = time.monotonic()
    endless, cross, hoards, after = ask(
        shop, ENDLESS, "SELECT count(*) FROM orders a, orders b, orders c", HOARDS, "SELECT 1", seconds=0.5
    )
    assert endless == cross == ToolResult("error: stopped after 0.5 s", "timeout")
    assert hoards.status in ("timeout", "error")
    assert after.text == "1\n1\n(1 row)"
    assert time.monotonic() - start < 120


def test_one_step_that_takes_forever_is_stopped_too(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # SQLite looks at no handler inside one function.
    monkeypatch.setattr("areal_agents.tools.sql.GRACE_S", 1.0)
    slow = "SELECT instr(hex(zeroblob(3500000)), hex(zeroblob(1700000)) || '1')"
    (result,) = ask(shop, slow, seconds=0.5)
    assert result == ToolResult("error: stopped after 0.5 s", "timeout")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("", "done"),
        ("-- only a comment", "done"),
        ("SELEC 1", 'error: near "SELEC": syntax error'),
        ("SELECT missing", "error: no such column: missing"),
        ("SELECT 1; SELECT 2", "error: You can only execute one statement at a time."),
        ("SELECT ?", "error: Incorrect number of bindings supplied"),
        ("SELECT 1\0", "error: "),
        ("SELECT '\ud800'", "error: the query is no text for SQLite"),
        ("SELECT " + "(" * 900 + "1" + ")" * 900, "error: "),
        ("SELECT " + "1+" * 9000 + "1", "error: Expression tree is too large"),
        ("SELECT 1 -- " + "x" * 20_000, "error: the query has 20012 characters"),
        ("SELECT zeroblob(1000000000)", "error: string or blob too big"),
        ("SELECT hex(randomblob(8000000))", "error: string or blob too big"),
        ("SELECT CAST(x'ff' AS TEXT)", "CAST(x'ff' AS TEXT)\n\ufffd\n"),
        ("SELECT abs(-9223372036854775808)", "error: integer overflow"),
    ],
)
def test_what_is_no_query_is_told(shop: Path, query: str, says: str) -> None:
    (result,) = ask(shop, query)
    assert result.text.startswith(says)
    assert len(result.text) < 500


def test_writes_go_to_a_copy_of_the_episode(shop: Path) -> None:
    before, temporary = shop.read_bytes(), set(Path(tempfile.gettempdir()).glob("areal-agents-sql-*"))
    first = ask(
        shop, "DELETE FROM orders WHERE id >= 10", "SELECT count(*) FROM orders", "CREATE TABLE t (a)",
        "INSERT INTO t VALUES (1), (2)", "SELECT sum(a) FROM t", *NEVER, writable=True,
    )  # fmt: skip
    assert [r.text for r in first[:5]] == [
        "done; 99990 rows changed", "count(*)\n10\n(1 row)", "done", "done; 2 rows changed", "sum(a)\n3\n(1 row)"
    ]  # fmt: skip
    assert [(q, r.text) for q, r in zip(NEVER, first[5:], strict=True) if r.status != "error"] == []
    (second,) = ask(shop, "SELECT count(*) FROM orders", writable=True)
    assert second.text == "count(*)\n100000\n(1 row)"
    assert shop.read_bytes() == before
    assert set(Path(tempfile.gettempdir()).glob("areal-agents-sql-*")) == temporary


def test_virtual_tables_are_neither_read_nor_changed(tmp_path: Path) -> None:
    """Neither are the tables that hold their data, in which a query could plant what breaks their readers."""
    path = tmp_path / "words.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE VIRTUAL TABLE Words USING fts5(x); INSERT INTO Words VALUES ('a b'); CREATE TABLE wordsmith (a);"
            "CREATE TABLE words_history (a);"
            "CREATE VIRTUAL TABLE box USING rtree(id, low, high); INSERT INTO box VALUES (1, 2, 3)"
        )
    connection.close()
    read = ["SELECT * FROM words WHERE words MATCH 'a'"]
    changes = [
        "UPDATE words_data SET block = zeroblob(9)", "DELETE FROM WORDS_IDX", "DROP TABLE words", "DROP TABLE box_node",
        "INSERT INTO box_node VALUES (9, x'00')", "ALTER TABLE box_node RENAME TO n",
        "INSERT INTO box VALUES (2, 3, 4)",
    ]  # fmt: skip
    plain = [
        "INSERT INTO wordsmith VALUES (1)", "INSERT INTO words_history VALUES (1)", "SELECT count(*) FROM words_data",
    ]  # fmt: skip
    trigger = [
        "CREATE TRIGGER r AFTER INSERT ON wordsmith BEGIN UPDATE words_data SET block = x'00'; END",
        "INSERT INTO wordsmith VALUES (1)",
    ]
    for writable in (False, True):
        first, *others = ask(path, *read, *changes, *plain, *trigger, writable=writable)
        assert first.text == "error: Words is a virtual table, and these are not allowed"
        refused, (inserted, beside, counted, _, fired) = others[: len(changes)], others[len(changes) :]
        assert {result.status for result in refused} == {"error"}, refused
        assert all("virtual table" in result.text for result in refused) == writable
        assert inserted.status == beside.status == ("ok" if writable else "error")
        assert (counted.status, fired.status) == ("ok", "error")


def test_a_value_is_one_line_without_control_characters(shop: Path) -> None:
    value = "a\tb\x1b[2J\u2028\x85|\\\u3000\u200dé"
    (result,) = ask(shop, f"SELECT '{value}' || char(0) AS v")
    assert result.text == "v\na\\tb\\x1b[2J\\u2028\\x85\\|\\\\\u3000\u200dé\\x00\n(1 row)"


def test_a_database_a_task(shop: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.sqlite"
    with sqlite3.connect(small) as connection:
        connection.execute("CREATE TABLE only (a)")
    connection.close()
    spec = sql_tool(tmp_path / "{db}.sqlite")
    env = SimpleNamespace(task=Task.make("t", split="test", seed=0, payload={"db": "small"}), state=None)
    (result,) = play((spec,), call("sql", query="SELECT name FROM sqlite_master"), env=env)
    assert result.text == "name\nonly\n(1 row)"
    env.task = Task.make("t", split="test", seed=0, payload={"db": "gone"})
    with pytest.raises(TaskError, match="cannot read"):
        play((spec,), call("sql", query="SELECT 1"), env=env)
    env.task = Task.make("t", split="test", seed=0, payload={})
    with pytest.raises(TaskError, match="does not fit"):
        play((spec,), call("sql", query="SELECT 1"), env=env)


def test_what_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no database")
    with pytest.raises(ConfigError, match="no SQLite database"):
        sql_tool(tmp_path / "text")
    with pytest.raises(ConfigError, match="No such file"):
        sql_tool(tmp_path / "gone")
    with pytest.raises(ValueError, match="positive"):
        sql_tool(tmp_path / "text", max_rows=0)


def test_the_tool_pickles(shop: Path) -> None:
    spec = pickle.loads(pickle.dumps(sql_tool(shop, name="query", max_rows=1)))
    (result,) = play((spec,), call("query", query="SELECT id FROM orders"))
    assert result.text.splitlines()[:2] == ["id", "0"]
    assert result.text.startswith("id\n0\n(1 row; there are more")


PIECES = st.sampled_from(
    ["SELECT", "*", "FROM", "orders", "customers", "WHERE", "id", "=", "1", "(", ")", ";", "'", '"', "UNION", "ATTACH",
     "DELETE", "DROP TABLE", "PRAGMA", "INTO", "VALUES", "--", "/*", "\0", "é", "\ud800", "WITH RECURSIVE", "AS", ","]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(PIECES, max_size=12).map(" ".join))
def test_any_query_is_answered_and_changes_nothing(shop: Path, query: str) -> None:
    size, when = shop.stat().st_size, shop.stat().st_mtime_ns
    request = {"path": str(shop), "query": query, "writable": False, "rows": 3, "seconds": 0.2}
    said = sql_inside.run(request)
    assert list(said) in (["text"], ["error"], ["timeout"])
    assert (shop.stat().st_size, shop.stat().st_mtime_ns) == (size, when)


def test_all_queries_of_an_episode_write_within_one_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (z)")
    connection.close()
    sizes: list[int] = []

    async def limits(request: dict[str, object]) -> ToolResult:
        sizes.append(int(str(request["file_size"])))
        with sqlite3.connect(str(request["path"])) as copy:
            copy.execute("INSERT INTO t VALUES (zeroblob(100000))")
        copy.close()
        return ToolResult("")

    monkeypatch.setattr("areal_agents.tools.sql._run", limits)
    ask(path, "1", "2", "3", writable=True)
    assert sizes == [path.stat().st_size] * 3  # and not those of the copy, which grows


def test_a_broken_database_is_not_the_models_doing(tmp_path: Path) -> None:
    path = tmp_path / "broken.sqlite"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    for writable in (False, True):
        with pytest.raises(EnvError, match="broken"):
            ask(path, "SELECT 1 FROM sqlite_master", writable=writable)


def test_cpu_time_ends_a_query_with_the_signal_that_names_it() -> None:
    program = Path(sql_inside.__file__).read_text().rpartition('if __name__ == "__main__":')[0]
    program += "run = lambda request: {'text': repr(resource.getrlimit(resource.RLIMIT_CPU))}\nmain()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        input='{"seconds": 1, "file_size": 0}',
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == '{"text": "(3, 4)"}'  # at equal limits the kernel sends SIGKILL


HOARD = (
    "(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 8000) "
    "SELECT randomblob(1000) FROM c ORDER BY 1 LIMIT -1 OFFSET 1)"
)


def temporary(process: subprocess.Popen[str]) -> list[int]:
    """The sizes of the temporary files that a process has open."""
    sizes = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).endswith("(deleted)"):
                    sizes.append(link.stat().st_size)
    return sizes


@pytest.mark.parametrize(("sorts", "size"), [(1, 4), (4, 20)], ids=["one file", "the sum"])
def test_the_temporary_files_of_a_query_are_bounded_together(shop: Path, sorts: int, size: int) -> None:
    """Each sort needs 8 MB of its own: one is past 4 MiB, and four are past 20 MiB, which none of them reaches."""
    main = 'if __name__ == "__main__":'
    program = Path(sql_inside.__file__).read_text().replace(main, f"TEMPORARY = {size << 20}\nWATCH_S = 0\n{main}")
    query = "SELECT count(*) FROM " + ", ".join(f"{HOARD} AS t{n}" for n in range(sorts))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        request = {"path": str(shop), "query": query, "writable": False, "rows": 3, "seconds": 60, "file_size": 0}
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        seen = [0]
        while process.poll() is None:
            seen.append(sum(temporary(process)))
        answer = json.loads(process.stdout.read())
    assert answer == {"error": f"the query needs more than {size} MiB of disk"}
    assert max(seen) < (size + 8) << 20


def test_a_full_disk_is_not_the_models_doing_where_it_only_reads(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(sqlite3.OperationalError):
        sqlite_errorcode = sqlite3.SQLITE_FULL

    def table(cursor: sqlite3.Cursor, max_rows: int) -> str:
        raise Full("database or disk is full")

    monkeypatch.setattr(sql_inside, "table", table)
    request = {"path": str(shop), "query": "SELECT 1", "writable": False, "rows": 3, "seconds": 5}
    assert sql_inside.run(request) == {"broken": "database or disk is full"}
    assert sql_inside.run({**request, "path": str(shop.with_name("gone"))}) == {
        "broken": "unable to open database file"
    }
