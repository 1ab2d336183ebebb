"""The ``search`` and ``read_document`` tools on a local corpus (``search_index.py``), ranked by BM25.

A query is a list of words, whatever it looks like: operators and quotes of FTS5 are data like all the rest.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from areal_agents.tool import ToolError, ToolSpec, made_by, tool
from areal_agents.tools.search_index import WORDS, open_index

MAX_TERMS: Final = 32
MAX_TERM_CHARS: Final = 64
MAX_QUERY_CHARS: Final = 10_000
SECONDS: Final = 10.0
"""Of processor time, for one search: a busy machine must not cost the model reward."""
WALL_S: Final = 120.0
MAX_RANKED: Final = 20_000
"""Documents that one search ranks, about: with rarer words in a query, its commonest ones are left out."""
MAX_TITLE_CHARS: Final = 300
"""That are shown: one document must not crowd out the others."""
SNIPPET_WORDS: Final = 32
_COMMON: Final = (
    "a an and are as at be but by did do does for from had has have he her his how i if in into is it "
    "its me my no not of on or our she so than that the their them then there these they this to was we "
    "were what when where which who whom whose why will with would you your"
)
STOPWORDS: Final = frozenset(_COMMON.split())
"""Words that stand in nearly every English text: they cost the most and rank the least."""


def search_tools(
    corpus: str | Path, *, tokenizer: str = WORDS, snippet_words: int = SNIPPET_WORDS, progress: bool = True
) -> tuple[ToolSpec, ToolSpec]:
    """Make ``search`` and ``read_document`` for a corpus. Its index is built here, where there is none yet.

    Args:
        corpus: a JSONL file of documents, a folder of texts, or an index: see ``open_index``.
        tokenizer: what FTS5 calls ``tokenize``; ``trigram`` for languages without spaces between words.
        snippet_words: words of each document that ``search`` shows, at most 64.
        progress: show how far the build is.

    Raises:
        ConfigError: the corpus is none.
        ValueError: ``snippet_words`` is out of range.
    """
    if not 1 <= snippet_words <= 64:
        raise ValueError(f"search_tools: snippet_words = {snippet_words} must be from 1 to 64")
    index = Index(open_index(corpus, tokenizer=tokenizer, progress=progress))

    @tool(timeout=WALL_S, parallel=True, max_output_chars=8000)
    async def search(query: str, top: Annotated[int, Field(ge=1, le=20)] = 5) -> str:
        """Search the documents for words, and see the best ones with a snippet of each.

        Args:
            top: how many
        """
        return await asyncio.to_thread(index.search, query, top, snippet_words)

    @tool(timeout=WALL_S, parallel=True, max_output_chars=6000)
    async def read_document(id: str) -> str:
        """Read a whole document.

        Args:
            id: as search shows it in brackets
        """
        return await asyncio.to_thread(index.document, id)

    mark = made_by(_make, str(corpus), tokenizer, snippet_words, progress)
    return mark(search), mark(read_document)


def _make(corpus: str, tokenizer: str, snippet_words: int, progress: bool) -> tuple[ToolSpec, ToolSpec]:
    return search_tools(corpus, tokenizer=tokenizer, snippet_words=snippet_words, progress=progress)


class Index:
    """A finished index, read by several threads with a connection each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._counts: dict[str, int] = {}

    def search(self, query: str, top: int, snippet_words: int = SNIPPET_WORDS) -> str:
        """Return the best documents as a text for the model. Raises ToolError."""
        terms = terms_of(query)
        if not terms:
            raise ToolError("error: the query has no word")
        match = " OR ".join(f'"{term}"' for term in self._rarest(terms))  # a term has no quotes in it
        # Snippets are made of the best ones alone: in one statement they would be made of each that matches.
        best = self._ask("SELECT rowid FROM words WHERE words MATCH ? ORDER BY rank LIMIT ?", (match, top))
        rows = [
            row
            for (number,) in best
            for row in self._ask(
                "SELECT d.id, d.title, snippet(words, 1, '', '', ' … ', ?) FROM words JOIN documents d "
                "ON d.number = words.rowid WHERE words MATCH ? AND words.rowid = ?",
                (snippet_words, match, number),
            )
        ]
        if not rows:
            return "(no document has any of these words)"
        lines = []
        for place, (name, title, snippet) in enumerate(rows, 1):
            lines.append(f"{place}. [{name}] {' '.join(title.split())[:MAX_TITLE_CHARS]}".rstrip())
            lines.append("   " + " ".join(snippet.split())[: snippet_words * 40])
        return "\n".join(lines)

    def _rarest(self, terms: list[str]) -> list[str]:
        """Return the terms of a query, the rarest first, until their documents are as many as one search ranks."""
        for term in terms:
            if term not in self._counts:
                if len(self._counts) > 100_000:
                    self._counts.clear()
                counted = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
                self._counts[term] = self._ask(counted, (f'"{term}"', MAX_RANKED))[0][0]
        kept: list[str] = []
        left = MAX_RANKED
        for term in sorted(terms, key=lambda t: self._counts[t]):
            if self._counts[term] and (self._counts[term] <= left or not kept):
                kept.append(term)
                left -= self._counts[term]
        return kept or terms[:1]

    def document(self, name: str) -> str:
        """Return a document's title and text. Raises ToolError where there is none."""
        rows = self._ask("SELECT title, text FROM documents WHERE id = ?", (name.encode(errors="replace").decode(),))
        if not rows:
            raise ToolError("error: there is no document with this id; search shows ids in brackets")
        title, text = rows[0]
        return f"{title}\n\n{text}" if title else text or "(an empty document)"

    def _ask(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        try:
            connection = self._idle.pop()
        except IndexError:
            # Nobody changes the file: there are no locks to ask for.
            connection = sqlite3.connect(f"{self.path.as_uri()}?immutable=1", uri=True, check_same_thread=False)
            connection.execute("PRAGMA mmap_size = 1073741824")
        connection.set_progress_handler(_over(time.thread_time() + SECONDS), 10_000)
        try:
            return connection.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            raise ToolError(f"error: the search took longer than {SECONDS:g} s: use fewer and rarer words") from None
        finally:
            self._idle.append(connection)


def terms_of(query: str) -> list[str]:
    """Return the words of a query, each once, without the commonest ones where others remain."""
    # A word stays as it is written, with its accents: the index folds it as it folded the documents, Python otherwise.
    asked = query[:MAX_QUERY_CHARS]
    plain = "".join(c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else " " for c in asked)
    words: dict[str, str] = {}
    for word in plain.split():
        if any(map(str.isalnum, word)):
            words.setdefault(word.casefold(), word[:MAX_TERM_CHARS])
    rare = [word for folded, word in words.items() if folded not in STOPWORDS]
    return (rare or list(words.values()))[:MAX_TERMS]


def _over(end: float) -> Callable[[], bool]:
    return lambda: time.thread_time() > end
