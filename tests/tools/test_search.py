from __future__ import annotations

import contextlib
import json
import pickle
import re
import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.errors import ConfigError
from areal_agents.tool import ToolError
from areal_agents.tools.read_output import read_output
from areal_agents.tools.search import Index, search_tools, terms_of
from areal_agents.tools.search_index import open_index, summary
from tests.tools.sessions import call, play

DOCUMENTS = [
    {"id": "par", "title": "Paris", "text": "Paris is the capital of France. The Seine flows through Paris."},
    {"id": "lon", "title": "London", "text": "London is the capital of the United Kingdom, on the Thames."},
    {"id": "riv", "title": "Rivers", "text": "The Thames flows through London, the Seine through Paris, as rivers do."},
    {"id": "cafe", "title": "Café", "text": "A café serves coffee. " + "filler " * 3000 + "The end of the café."},
    {"title": "No id", "text": "NEAR AND OR NOT are words: running, runs, ran."},
]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_AGENTS_CACHE", str(cache))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "it's a corpus?.jsonl"
    path.write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n\n")
    return path


def test_the_best_document_comes_first_with_a_snippet(corpus: Path) -> None:
    tools = (*search_tools(corpus), read_output)
    seine, capital, none, document, long, more, unknown, stem, accent = play(
        tools,
        call("search", query="Seine Paris", top=2),
        call("search", query="the capital"),
        call("search", query="zebra"),
        call("read_document", id="lon"),
        call("read_document", id="cafe"),
        call("read_output", output=1, start=20_000),
        call("read_document", id="nowhere"),
        call("search", query="runner run", top=1),
        call("search", query="CAFE", top=1),
    )
    assert seine.text.splitlines() == [
        "1. [par] Paris",
        "   Paris is the capital of France. The Seine flows through Paris.",
        "2. [riv] Rivers",
        "   The Thames flows through London, the Seine through Paris, as rivers do.",
    ]
    assert [line[:8] for line in capital.text.splitlines()[::2]] == ["1. [par]", "2. [lon]"]
    assert none.text == "(no document has any of these words)"
    assert document.text == "London\n\nLondon is the capital of the United Kingdom, on the Thames."
    assert long.truncated
    assert "read_output(output=1, start=29" in long.text
    assert more.text.endswith("The end of the café.")
    assert more.text.startswith("[characters 20000 to 21048 of 21048]")
    assert unknown.status == "error"
    assert stem.text.startswith("1. [5] No id")
    assert accent.text.startswith("1. [cafe] Café")
    assert len(accent.text) < 400


@pytest.mark.parametrize(
    "query",
    ['"', '"Paris', "Paris AND", "NEAR(Paris Paris)", "title:Paris", "Paris*", "^Paris", "-Paris", "Paris OR (",
     "{title}: x Paris",     "Paris\0", "Paris\ud800", "'; DROP TABLE documents; -- Paris", "Paris " * 5000],
)  # fmt: skip
def test_what_looks_like_syntax_is_words(corpus: Path, query: str) -> None:
    (result,) = play(search_tools(corpus), call("search", query=query, top=1))
    if "NEAR" in query:
        assert result.text.startswith("1. [5] No id\n")  # the rarer word of the two
    elif query == '"':
        assert result.text == "error: the query has no word"
    else:
        assert result.text.startswith("1. [par] Paris\n")


def test_terms_are_bounded_and_common_words_are_left_out() -> None:
    assert terms_of("What is the capital of France? the CAPITAL") == ["capital", "France"]
    assert terms_of("to be or not to be") == ["to", "be", "or", "not"]
    assert len(terms_of(" ".join(map(str, range(1000))))) == 32
    assert terms_of("x" * 10**6) == ["x" * 64]
    assert terms_of("?!") == []


def test_the_commonest_words_are_left_out_where_too_many_documents_have_them(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_agents.tools.search.MAX_RANKED", 2)
    index = Index(open_index(corpus))
    assert index._rarest(["capital", "coffee", "zebra"]) == ["coffee"]  # 2, 1 and 0 documents
    assert index._rarest(["capital"]) == ["capital"]
    assert index.search("coffee capital", 5).startswith("1. [cafe]")


@pytest.mark.parametrize("top", [0, 21, -1, 10**30, "many"])
def test_the_number_of_results_is_checked(corpus: Path, top: object) -> None:
    (result,) = play(search_tools(corpus), call("search", query="Paris", top=top))
    assert result.status == "invalid_arguments"


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(["AND", "OR", "NOT", "NEAR", '"', "(", ")", "*", "^", "Paris", ":", "+"])).map(" ".join)
)
def test_any_query_is_answered(corpus: Path, cache: Path, query: str) -> None:
    index = _indexes.setdefault(corpus, Index(open_index(corpus)))
    if terms_of(query):
        assert isinstance(index.search(query, 3), str)
    else:
        with pytest.raises(ToolError, match="no word"):
            index.search(query, 3)
    with pytest.raises(ToolError, match="no document"):
        index.document(query + "?")


_indexes: dict[Path, Index] = {}


def test_an_index_is_built_once_and_anew_for_a_changed_corpus(tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"text": "apple"}))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(open_index(corpus))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    when = found[0].stat().st_mtime_ns
    assert open_index(corpus).stat().st_mtime_ns == when
    assert Index(found[0]).search("apple", 1).startswith("1. [1]")
    corpus.write_text(json.dumps({"text": "a pear now"}))
    again = open_index(corpus)
    assert again != found[0]
    assert Index(again).search("pear", 1).startswith("1. [1]")
    assert open_index(again) == again  # an index is a corpus too
    assert not list((cache / "search").glob(".*.new"))


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.md").write_text("# Apple\n\nAn apple a day.")
    (tmp_path / "B.TXT").write_bytes("\ufeffcafé pear\r\n".encode())
    (tmp_path / "c.bin").write_bytes(b"apple")
    (tmp_path / "README").write_bytes(b"apple")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    told = "2 .txt and .md files are its documents; 3 others are left out (1 .bin, 1 .txt, 1 without an ending)"
    with pytest.warns(UserWarning, match=re.escape(f"the search corpus {str(tmp_path)!r}: {told}")):
        index = Index(open_index(tmp_path, progress=False))
    assert open_index(tmp_path, progress=False) == index.path  # told once, where it is built
    assert index.search("apple", 5) == "1. [d/a.md]\n   # Apple An apple a day."
    assert index.document("B.TXT") == "café pear\r\n"


@pytest.mark.parametrize(
    ("path", "data", "says"),
    [
        ("b.txt", b"caf\xe9 pear", "b.txt is not UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        ("b.txt", "pear".encode("utf-16"), "b.txt is not UTF-8"),
        ("a\nb.txt", b"pear", r"the id 'a\\nb.txt' is not one line of 1 to 200 characters"),
        ("x.txt", None, "'.*x.txt' cannot be read: Input/output error"),
    ],
)
def test_a_file_that_is_no_document_is_refused_with_its_name(
    tmp_path: Path, path: str, data: bytes | None, says: str
) -> None:
    if data is None:
        (tmp_path / path).symlink_to("/proc/self/mem")
    else:
        (tmp_path / path).write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        open_index(tmp_path, progress=False)


def test_words_are_found_that_python_folds_otherwise_than_the_index(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    texts = ("Die Straße nach Bern", "ΟΔΟΣ", "cafés", "हिन्दी", "द न ह", "ﬁnch", "snake_case words", "case snake")
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    index = Index(open_index(corpus))
    for query, found in (
        ("Straße", ["1"]), ("STRAßE", ["1"]), ("ΟΔΟΣ", ["2"]), ("cafe\u0301s", ["3"]), ("CAFÉS", ["3"]),
        ("हिन्दी", ["4"]), ("ﬁnch", ["6"]), ("snake_case", ["7"]),
    ):  # fmt: skip
        shown = index.search(query, 5)
        assert [line.split("]")[0].split("[")[1] for line in shown.splitlines()[::2]] == found, (query, shown)


def test_a_long_title_leaves_room_for_the_others(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    documents = [{"id": "a", "title": "pear " * 5000, "text": ""}, {"id": "b", "title": "pear", "text": "one"}]
    corpus.write_text("\n".join(map(json.dumps, documents)))
    lines = Index(open_index(corpus)).search("pear", 5).splitlines()
    assert {line.split(" ", 1)[1] for line in lines[::2]} == {f"[a] {('pear ' * 60).strip()}", "[b] pear"}


def test_an_index_knows_its_longest_document_and_another_file_does_not(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"title": "abc", "text": "defgh"}\n{"text": "abcdefg"}')
    digest, longest = summary(open_index(corpus))
    assert (len(digest), longest) == (64, 8)
    other = tmp_path / "other.sqlite"
    for statement in ("CREATE TABLE documents (id TEXT)", "CREATE TABLE corpus (digest TEXT, longest INTEGER)"):
        with contextlib.closing(sqlite3.connect(other)) as connection, connection:
            connection.execute(statement)
        with pytest.raises(ConfigError, match="is no index of this version: name the documents"):
            summary(other)


def test_trigrams_find_parts_of_words(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(json.dumps({"text": "東京は日本の首都です"}))
    assert Index(open_index(corpus, tokenizer="trigram")).search("日本の", 1).startswith("1. [1]")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no document"),
        ("nonsense", "line 1 is no JSON"),
        ('{"text": "a"}\n[1]', "line 2 is no document"),
        ('{"title": "a"}', "line 1 is no document"),
        ('{"text": "a", "id": {}}', "must be texts"),
        ('{"text": "a", "id": true}', "must be texts"),
        ('{"text": "a"}\n{"text": "a", "id": ""}', "line 2: the id '' is not one line"),
        ('{"text": "a", "id": "a\\u2028b"}', "line 1: the id .* is not one line"),
        (json.dumps({"text": "a", "id": "x" * 201}), "line 1: the id .* is not one line of 1 to 200 characters"),
        ("[" * 200_000, "line 1 is no JSON"),
        ('{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', "two documents '1': lines 1 and 2"),
    ],
)
def test_what_is_no_corpus_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, text: str, says: str) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(text)
    with pytest.raises(ConfigError, match=says):
        search_tools(corpus)
    assert not list((cache / "search").glob(".*.new"))
    with pytest.raises(ConfigError, match="is not there"):
        search_tools(tmp_path / "gone")
    corpus.write_text('{"text": "ok"}')
    with pytest.raises(ConfigError, match="tokenizer"):
        search_tools(corpus, tokenizer="no such' thing")


def test_the_tools_pickle(corpus: Path) -> None:
    tools = pickle.loads(pickle.dumps(search_tools(corpus)))
    assert [t.name for t in tools] == ["search", "read_document"]
    (result,) = play(tools, call("search", query="Thames", top=1))
    assert result.text.startswith("1. [lon]")
