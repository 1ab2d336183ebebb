"""The index of a corpus: SQLite's FTS5 with BM25, built once and kept in the cache.

    corpus (JSONL, or a folder of texts) ─▶ documents + words ─▶ one file, named after what it was made of

A JSONL line is an object with ``text``, and perhaps ``id`` and ``title``; the number of the line is the id where there
is none. In a folder each ``.txt`` and ``.md`` file is a document, and its path the id. The index also has a hash of all
documents, by which a corpus is known wherever it lies, and the length of the longest one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import sqlite3
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from areal_agents.errors import ConfigError
from areal_agents.models import cache_dir
from areal_agents.utils.short_text import short

WORDS: Final = "porter unicode61 remove_diacritics 2"
"""English stems of words. For languages without spaces between words: ``trigram``."""
MAX_ID_CHARS: Final = 200
_ENDINGS: Final = (".txt", ".md")
_FORMAT: Final = "4"
_HEADER: Final = b"SQLite format 3\0"
_BATCH: Final = 1000

Document = tuple[str, str, str]
"""Id, title and text."""


def open_index(corpus: str | Path, *, tokenizer: str = WORDS, progress: bool = True) -> Path:
    """Return the index of a corpus, which is built if there is none of what the corpus is now.

    Processes that ask at the same time wait for the one that builds it.

    Args:
        corpus: a JSONL file, a folder, or an index that ``open_index`` has made, on another machine perhaps.
        tokenizer: what FTS5 calls ``tokenize``.
        progress: show a bar.

    Raises:
        ConfigError: the corpus cannot be read, has a line or a file that is no document, the same id twice, or none.
    """
    source = Path(corpus).expanduser().resolve()
    if not source.exists():
        raise ConfigError(f"the search corpus {str(corpus)!r} is not there")
    if source.is_file() and _is_database(source):
        return source
    files = _files(source)
    folder = cache_dir() / "search"
    final = folder / f"{_fingerprint(source, files, tokenizer)}.sqlite"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{final.stem}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            if source.is_dir():
                _tell_of_others(source, set(files))
            temporary = folder / f".{final.stem}.{os.getpid()}.new"
            try:
                with _bar(source.name, sum(file.stat().st_size for file in files), progress) as advance:
                    _build(temporary, source, files, tokenizer, advance)
                os.replace(temporary, final)
            finally:
                temporary.unlink(missing_ok=True)
    return final


def summary(index: Path) -> tuple[str, int]:
    """Return the hash of an index's documents, and the characters of the longest one, its title among them.

    Raises ConfigError where it is no index of this version.
    """
    with contextlib.closing(sqlite3.connect(f"{index.as_uri()}?immutable=1", uri=True)) as connection:
        try:
            digest, longest = connection.execute("SELECT digest, longest FROM corpus").fetchone()
        except (sqlite3.DatabaseError, TypeError) as error:
            raise ConfigError(
                f"the search corpus {str(index)!r} is no index of this version: name the documents it was made of"
            ) from error
    return digest, longest


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"the search corpus: {str(path)!r} cannot be read: {error.strerror}") from error


def _is_database(path: Path) -> bool:
    with _reading(path), path.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in _ENDINGS and p.is_file())
    if not files:
        raise ConfigError(f"the search corpus {str(source)!r} has no .txt or .md file")
    return files


def _tell_of_others(source: Path, files: set[Path]) -> None:
    """Warn of what lies in a folder and is no document, links to folders and to nothing among it."""
    others = [p for p in source.rglob("*") if p not in files and (p.is_symlink() or not p.is_dir())]
    if others:
        endings = Counter(p.suffix.lower() or "without an ending" for p in others)
        counted = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:5]
        warnings.warn(
            f"the search corpus {str(source)!r}: {len(files)} .txt and .md files are its documents; {len(others)} "
            f"others are left out ({', '.join(f'{count} {ending}' for ending, count in counted)})",
            stacklevel=3,
        )


def _fingerprint(source: Path, files: list[Path], tokenizer: str) -> str:
    digest = hashlib.sha256(f"{_FORMAT}\0{tokenizer}\0{source}".encode(errors="surrogateescape"))
    for file in files:
        status = file.stat()
        digest.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]


def _build(path: Path, source: Path, files: list[Path], tokenizer: str, advance: Callable[[int], None]) -> None:
    documents = _lines(source, advance) if source.is_file() else _texts(source, files, advance)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # The file is renamed when it is whole, so that what a crash leaves is never read.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE documents (number INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, text TEXT)")
        try:
            connection.execute(
                "CREATE VIRTUAL TABLE words USING fts5(title, text, content = 'documents', content_rowid = 'number', "
                f"tokenize = '{tokenizer.replace(chr(39), chr(39) * 2)}')"
            )
        except sqlite3.OperationalError as error:
            raise ConfigError(f"search: tokenizer {tokenizer!r}: {error}") from error
        connection.execute("CREATE TABLE corpus (digest TEXT, longest INTEGER)")
        connection.execute("BEGIN")
        count, longest, digest = 0, 0, hashlib.sha256()
        for count, (name, title, text) in enumerate(documents, 1):
            longest = max(longest, len(title) + len(text))
            try:
                connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", (count, name, title, text))
            except sqlite3.IntegrityError:
                raise ConfigError(
                    f"the search corpus {str(source)!r} has two documents {name!r}{_where(source, name)}"
                ) from None
            digest.update(json.dumps([name, title, text]).encode())
        if not count:
            raise ConfigError(f"the search corpus {str(source)!r} has no document")
        connection.execute("INSERT INTO corpus VALUES (?, ?)", (digest.hexdigest(), longest))
        connection.execute("INSERT INTO words (words) VALUES ('rebuild')")
        connection.execute("INSERT INTO words (words) VALUES ('optimize')")
        connection.execute("INSERT INTO words (words, rank) VALUES ('rank', 'bm25(2.0, 1.0)')")  # a title counts twice
        connection.execute("COMMIT")
        advance(0)


def _lines(source: Path, advance: Callable[[int], None]) -> Iterator[Document]:
    with _reading(source), source.open("rb") as file:
        for number, line in enumerate(file, 1):
            advance(len(line))
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where} is no JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ConfigError(f"{where} is no document: an object with a `text` is needed")
            name, title = row.get("id", number), row.get("title") or ""
            if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(title, str):
                raise ConfigError(f"{where}: `id` and `title` must be texts")
            yield _id(str(name), where), _clean(title), _clean(row["text"])


def _where(source: Path, name: str) -> str:
    """Say on which lines of a JSONL file the documents of one id are."""
    if source.is_dir():
        return ""
    with source.open("rb") as file:
        rows = ((number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip())
        found = (str(number) for number, row in rows if _clean(str(row.get("id", number))) == name)
        return ": lines " + " and ".join(itertools.islice(found, 2))  # those after it were not read yet


def _texts(source: Path, files: list[Path], advance: Callable[[int], None]) -> Iterator[Document]:
    for file in files:
        with _reading(file):
            data = file.read_bytes()
        advance(len(data))
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8: {error}: convert it with iconv, or take it out") from None
        yield _id(str(file.relative_to(source)), str(file)), "", text


def _id(name: str, where: str) -> str:
    """Return an id by which a model can read its document. Raises ConfigError where it cannot be shown as one."""
    if len(name) > MAX_ID_CHARS or name.splitlines() != [name]:
        raise ConfigError(f"{where}: the id {short(name)} is not one line of 1 to {MAX_ID_CHARS} characters")
    return _clean(name)


def _clean(text: str) -> str:
    """Return ``text`` without halves of surrogate pairs, which no file can hold."""
    return text.encode(errors="replace").decode()


@contextlib.contextmanager
def _bar(name: str, total: int, on: bool) -> Iterator[Callable[[int], None]]:
    """Show how far the build is, on a terminal as a bar, else in a line every ten seconds."""
    if not on:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task(f"index {name}", total=total)
            yield lambda size: progress.advance(task, size)
        return
    done, said = 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, said
        done += size
        if time.monotonic() - said > 10:
            said = time.monotonic()
            print(f"index {name}: {done >> 20} of {total >> 20} MB", file=sys.stderr, flush=True)

    yield advance
