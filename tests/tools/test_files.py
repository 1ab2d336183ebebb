from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_agents.tool import ToolResult
from areal_agents.tools.files import FILE_TOOLS, MAX_TEXT_CHARS, file_tools, read_file
from areal_agents.tools.files_inside import answer
from areal_agents.tools.python import python
from areal_agents.types import ToolCall
from tests.tools.sessions import call, play

TOOLS = (*FILE_TOOLS, python)

TRAPS = r"""
import os, socket
os.symlink('/etc/passwd', 'link'); os.symlink('/etc', 'etc'); os.symlink('..', 'up'); os.symlink('real', 'inner')
os.symlink('loop', 'loop'); os.symlink('/dev/zero', 'zero'); os.mkfifo('pipe')
open('real', 'w').write('one\n'); os.link('real', 'twin'); os.makedirs('sub/deep')
open('sub/deep/f.py', 'w').write('x = 1\n')
open('sparse', 'w').truncate(60 << 20)
open('binary', 'wb').write(b'a\0b'); open('crlf', 'wb').write(b'a\r\nb\r\n'); open('latin', 'wb').write(b'caf\xe9\n')
open('evil\x1b[31m\nname', 'w').close(); open('empty', 'w').close(); open('long', 'w').write('z' * 100000)
socket.socket(socket.AF_UNIX).bind('sock')
"""


def trapped(*calls: ToolCall) -> list[ToolResult]:
    return play(TOOLS, call("python", code=TRAPS), list(calls), backend="bubblewrap")[1:]


def test_files_are_written_read_edited_listed_and_searched() -> None:
    text = "".join(f"line {n}\n" for n in range(1, 2001))
    results = play(
        TOOLS,
        call("write_file", path="src/a.txt", content=text),
        call("read_file", path="/work/src/a.txt", first=3, last=4),
        call("edit_file", path="src/a.txt", old="line 3\nline 4\n", new="line three\n"),
        call("read_file", path="src/a.txt", first=1, last=3),
        call("edit_file", path="src/a.txt", old="line 9", new="x"),
        call("edit_file", path="src/a.txt", old="line 1", new="row 1", all=True),
        call("search_files", text="row 199", files="*.txt"),
        call("search_files", text=r"^row 19{2}\d$", regex=True, path="src"),
        call("list_files"),
        call("list_files", depth=2),
        call("python", code="print(open('src/a.txt').read()[:12])"),
        call("write_file", path="src/a.txt", content="é"),
        call("read_file", path="src/a.txt"),
        backend="bubblewrap",
    )
    texts = [r.text for r in results]
    assert texts[0] == f"wrote src/a.txt: {len(text)} bytes"
    assert texts[1] == "3\tline 3\n4\tline 4\n[lines 3 to 4 of 2000; read on with first=5]"
    assert texts[2] == "edited src/a.txt: 1 place, the first at line 3"
    assert texts[3] == "1\tline 1\n2\tline 2\n3\tline three\n[lines 1 to 3 of 1999; read on with first=4]"
    assert texts[4].startswith("error: old occurs 111 times, at lines 8, 89, 90,")  # 9, 9x, 9xx
    assert texts[5] == "edited src/a.txt: 1111 places, the first at line 1"  # 1, 1x, 1xx, 1xxx
    assert texts[6].splitlines()[0] == "src/a.txt:198: row 199"
    assert len(texts[6].splitlines()) == 11
    assert texts[7].splitlines() == [f"a.txt:{n - 1}: row {n}" for n in range(1990, 2000)]
    assert texts[8:10] == ["src/", f"src/\nsrc/a.txt  {len(text) - 14 + 11 - 1111}"]
    assert texts[10] == "row 1\nline 2"
    assert texts[11:] == ["replaced src/a.txt: 2 bytes", "1\té"]


def test_a_long_file_is_read_on() -> None:
    text = "".join(f"{n} {'y' * 90}\n" for n in range(1, 301))
    first, second = play(
        TOOLS,
        call("write_file", path="f", content=text),
        call("read_file", path="f"),
        call("read_file", path="f", first=73),
        backend="bubblewrap",
    )[1:]
    assert not first.truncated
    last = first.text.splitlines()[-1]
    assert last == "[lines 1 to 72 of 300; read on with first=73]"
    assert second.text.startswith("73\t73 yyy")


@pytest.mark.parametrize("path", ["link", "etc/passwd", "up/etc", "inner", "loop", "zero", "pipe", "sock", "sub", "."])
def test_what_is_no_file_is_neither_read_nor_written_nor_edited(path: str) -> None:
    results = trapped(
        call("read_file", path=path),
        call("edit_file", path=path, old="root", new="x"),
        call("write_file", path=path, content="x"),
        call("python", code="print(open('real').read(), open('/etc/passwd').read()[:4])"),
    )
    assert [r.status for r in results] == ["error", "error", "error", "ok"]
    assert all(r.text.startswith("error: ") and "root:" not in r.text for r in results[:3])
    assert results[3].text == "one\n sand"


@pytest.mark.parametrize(
    "path", ["..", "../etc/passwd", "/etc/passwd", "sub/../../x", "a\0b", "x" * 5000, "n" * 300, "/"]
)
def test_paths_out_of_the_folder_are_refused(path: str) -> None:
    results = trapped(
        call("read_file", path=path), call("write_file", path=path, content=""), call("list_files", path=path)
    )
    assert all(r.status == "error" and len(r.text) < 400 for r in results)


def test_traps_are_shown_for_what_they_are() -> None:
    listed, found, binary, empty, long, latin, sparse = trapped(
        call("list_files", depth=9),
        call("search_files", text="o"),
        call("read_file", path="binary"),
        call("read_file", path="empty"),
        call("read_file", path="long"),
        call("read_file", path="latin"),
        call("edit_file", path="sparse", old="a", new="b"),
    )
    rows = listed.text.splitlines()
    assert {"link -> /etc/passwd", "pipe  (pipe)", "sock  (socket)", "real  4", "sub/deep/f.py  6"} <= set(rows)
    assert r"evil\x1b[31m\nname  0" in rows
    assert not any(row.startswith(("etc/", "up/")) for row in rows)
    assert found.text.splitlines() == [
        "real:1: one",
        "twin:1: one",
        "[2 binary, large or unreadable files were left out]",
    ]
    assert sparse.text == "error: the file is larger than 4194304 bytes"
    assert binary.text == "error: this is a binary file of 3 bytes"
    assert empty.text == "(an empty file)"
    assert long.text == "1\t" + "z" * 500 + " [… line cut]"
    assert latin.text == "1\tcaf\ufffd"


def test_a_hard_link_keeps_the_other_name() -> None:
    edited, real, twin, crlf, seen = trapped(
        call("edit_file", path="twin", old="one", new="two"),
        call("read_file", path="real"),
        call("read_file", path="twin"),
        call("edit_file", path="crlf", old="a\nb", new="a\nc\nb"),
        call("python", code="print(open('crlf', 'rb').read())"),
    )
    assert edited.status == crlf.status == "ok"
    assert (real.text, twin.text) == ("1\tone", "1\ttwo")
    assert seen.text == r"b'a\r\nc\r\nb\r\n'"


def test_a_full_disk_and_a_slow_pattern_are_told_and_nothing_is_lost() -> None:
    fill = "f = open('fill', 'wb', 0)\nwhile True: f.write(b'x' * 4096)"
    results = play(
        TOOLS,
        call("write_file", path="keep", content="old"),
        call("python", code=fill),
        call("write_file", path="keep", content="n" * MAX_TEXT_CHARS),
        call("read_file", path="keep"),
        call("list_files"),
        call("write_file", path="big", content="n" * (MAX_TEXT_CHARS + 1)),
        backend="bubblewrap",
    )
    assert "No space left" in results[1].text
    assert results[2].text == "error: keep: No space left on device"
    assert results[3].text == "1\told"
    assert sorted(row.split()[0] for row in results[4].text.splitlines()) == ["fill", "keep"]
    assert results[5].text == f"error: content has {MAX_TEXT_CHARS + 1} characters, more than {MAX_TEXT_CHARS}"


def test_a_pattern_that_takes_forever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.tools.files.EXEC_TIMEOUT_S", 1.0)
    results = play(
        TOOLS,
        call("write_file", path="a", content="a" * 40 + "b"),
        call("search_files", text="(a+)+$", regex=True),
        call("search_files", text="(", regex=True),
        call("search_files", text=""),
        backend="bubblewrap",
    )
    assert results[1] == ToolResult("error: stopped after 1 s", "timeout")
    assert results[2].text.startswith("error: text is no regular expression: missing )")
    assert results[3].text == "error: text must have at least one character"


def test_another_root() -> None:
    other = file_tools("/tmp")
    results = play(
        other,
        call("write_file", path="/tmp/a", content="x"),
        call("list_files", path="/tmp"),
        call("read_file", path="/etc/passwd"),
        backend="bubblewrap",
    )
    assert [r.status for r in results] == ["ok", "ok", "error"]
    assert results[1].text == "a  1"
    with pytest.raises(ValueError, match="absolute"):
        file_tools("tmp")


def test_the_tools_pickle() -> None:
    again = pickle.loads(pickle.dumps(FILE_TOOLS))
    assert [t.name for t in again] == ["read_file", "write_file", "edit_file", "list_files", "search_files"]
    assert again[0].parameters == read_file.parameters
    assert again[0].function is not None


names = st.text(max_size=8) | st.sampled_from(
    ["a", "d/f", "..", "/", "d", "link", "a/b/c", "\ud800", "\0", "%s", "a\n"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    op=st.sampled_from(["read", "edit", "list", "search", "write"]), path=names, text=st.text(max_size=12), other=names,
    first=st.integers(-3, 5), last=st.none() | st.integers(-2, 9), depth=st.integers(-1, 50), flag=st.booleans(),
)  # fmt: skip
def test_the_program_inside_answers_anything(
    tmp_path_factory: pytest.TempPathFactory, op: str, path: str, text: str, other: str, first: int, last: int | None,
    depth: int, flag: bool,
) -> None:  # fmt: skip
    root = tmp_path_factory.getbasetemp() / "fuzz"
    if not root.exists():
        (root / "in" / "d").mkdir(parents=True)
        (root / "secret").write_text("secret")
        (root / "in" / "a").write_text("one\ntwo\n")
        (root / "in" / "link").symlink_to("../secret")
    request = {
        "op": op, "root": str(root / "in"), "path": path, "content": text, "old": text, "new": other, "all": flag,
        "first": first, "last": last, "depth": depth, "text": text, "files": other, "regex": flag,
    }  # fmt: skip
    said = answer(request)
    assert list(said) in (["text"], ["error"])
    assert len(next(iter(said.values()))) <= 8000
    assert (root / "secret").read_text() == "secret"
    assert sorted(p.name for p in root.iterdir()) == ["in", "secret"]


def test_lines_have_the_same_numbers_in_a_search_and_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("a\x0cb\u2028c\r\nneedle\n".encode())
    common = {"root": str(tmp_path)}
    search = {**common, "op": "search", "path": ".", "text": "^needle$|^$", "regex": True, "files": "*"}
    assert answer(search) == {"text": "a:2: needle"}
    read = answer({**common, "op": "read", "path": "a", "first": 2, "last": None})
    assert read["text"].startswith("2\tneedle")
