"""The readable text of a page from the web, in one pass over it, however broken the page is."""

from __future__ import annotations

import html
import re
from typing import Final
from urllib.parse import urljoin

_SKIPPED: Final = {"script", "style", "noscript", "template", "svg", "iframe", "object", "canvas", "textarea"}
"""Elements whose content is no text for a reader."""
_BLOCKS: Final = {
    "p", "div", "section", "article", "header", "footer", "nav", "main", "aside", "ul", "ol", "li", "dl", "dt", "dd",
    "table", "tr", "caption", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "blockquote", "br", "hr", "form", "figure",
    "figcaption", "title", "option",
}  # fmt: skip
_HEADINGS: Final = {f"h{n}": "#" * n + " " for n in range(1, 7)}
_NAME: Final = re.compile(r"/?([a-zA-Z][a-zA-Z0-9]*)")
_HREF: Final = re.compile(r"""\bhref\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)
_MAX_TAG: Final = 4096
_ENDS: Final = {name: re.compile(f"</{name}", re.IGNORECASE) for name in _SKIPPED}
_META: Final = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([a-zA-Z0-9_-]{2,20})""", re.IGNORECASE)
_CHARSET: Final = re.compile(
    r"utf-?8|utf-?16(le|be)?|iso-?8859-\d{1,2}|latin-?1|(us-)?ascii|windows-125\d|cp\d{3,4}|gb(2312|k|18030)|big5|"
    r"euc-(jp|kr)|shift_jis|koi8-[ru]",
    re.IGNORECASE,
)
"""Encodings of pages. Python knows others, which are no text or take forever."""


def decode(data: bytes, declared: str | None) -> str:
    """Decode a page by what its header or its first lines declare, else as UTF-8."""
    found = _META.search(data[:4096])
    for name in (declared, found.group(1).decode() if found else None):
        if name and _CHARSET.fullmatch(name):
            try:
                return data.decode(name, "replace")
            except LookupError:
                continue
    return data.decode("utf-8", "replace")


def text_of_html(page: str, base: str = "", *, links: bool = False) -> str:
    """Return the text of an HTML page: headings, paragraphs, list items and table rows in lines of their own.

    Args:
        page: its source.
        base: its address, which relative links start at.
        links: write links as ``[text](address)``.
    """
    out = _Text(base, links)
    position = 0
    while position < len(page):
        start = page.find("<", position)
        out.add(page[position:] if start < 0 else page[position:start])
        if start < 0:
            break
        if page.startswith("<!--", start):
            end = page.find("-->", start + 4)
            position = len(page) if end < 0 else end + 3
            continue
        name_at = _NAME.match(page, start + 1)
        if name_at is None and page[start + 1 : start + 2] not in ("!", "?", "/"):
            out.add("<")  # a sign in the text, and no tag
            position = start + 1
            continue
        end = page.find(">", start)
        if end < 0:
            break
        position = end + 1
        name = name_at.group(1).lower() if name_at else ""
        closing = page[start + 1] == "/"
        if name in _SKIPPED and not closing:
            if page[end - 1] != "/":
                found = _ENDS[name].search(page, position)
                position = len(page) if found is None else found.start()
            continue
        out.tag(name, closing, page[start : min(end, start + _MAX_TAG)])
    return out.finish()


class _Text:
    """The text so far."""

    def __init__(self, base: str, links: bool) -> None:
        self._base, self._links = base, links
        self._parts: list[str] = []
        self._verbatim = False
        self._target = ""

    def add(self, source: str) -> None:
        text = html.unescape(source)
        self._parts.append(text if self._verbatim else re.sub(r"\s+", " ", text))

    def tag(self, name: str, closing: bool, source: str) -> None:
        if name == "pre":
            self._verbatim = not closing
        if self._links and name == "a":
            if self._target:  # a link ends where the next one begins
                self._parts.append(f"]({self._target})")
            self._target = "" if closing else _link(source, self._base)
            self._parts.append("[" if self._target else "")
        if name in _BLOCKS:
            self._parts.append("\n")
            if not closing:
                self._parts.append(_HEADINGS.get(name, "- " if name == "li" else ""))
        elif name in ("td", "th") and closing:
            self._parts.append(" | ")

    def finish(self) -> str:
        """Return all of it without what is empty: spaces at line ends, second empty lines, bullets without text."""
        lines: list[str] = []
        for line in "".join(self._parts).split("\n"):
            line = line.rstrip().removesuffix(" |")
            if not line.strip(" -#|"):
                line = ""
            if line or (lines and lines[-1]):
                lines.append(line if line.startswith("    ") else line.strip())
        return "\n".join(lines).strip()


def _link(tag: str, base: str) -> str:
    found = _HREF.search(tag)
    if found is None:
        return ""
    try:
        address = urljoin(base, html.unescape(next(g for g in found.groups() if g is not None)).strip())
    except ValueError:
        return ""
    ok = address.startswith(("http://", "https://")) and not re.search(r"[\s()<>]", address)
    return address if ok else ""
