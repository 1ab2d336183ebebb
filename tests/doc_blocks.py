"""README.md and docs/ taken apart: code blocks, commands, tables, links. Only text is read; ``test_docs`` runs it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(p.relative_to(ROOT)): p.read_text(encoding="utf-8")
    for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PROGRAMS = ("areal-agents", "make", "python", "pip", "tensorboard", "cd")
"""A line that starts with one of these is a command, in whatever block it stands."""
_SHELLS = ("bash", "console", "sh")
_FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")


@dataclass(frozen=True, slots=True)
class Block:
    """A code block: fenced, with its language, or indented (language "")."""

    page: str
    line: int
    """Of its first line of content, from 1."""
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name in a first line such as ``# my_envs.py``: the block is that whole file."""
        found = _FILE.match(self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    page: str
    line: int
    words: tuple[str, ...]
    folder: str = "."
    """Where the ``cd`` lines before it, in its block, lead to."""

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(sorted({w.partition("=")[0] for w in self.words if w.startswith("--")}))

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.words)}"


def blocks(page: str) -> list[Block]:
    """All code blocks of a page, in order."""
    found: list[Block] = []
    lines = PAGES[page].splitlines()
    i = 0
    while i < len(lines):
        if lines[i].lstrip().startswith("```"):
            language, start = lines[i].strip("` \t"), i + 1
            i = next(k for k in range(start, len(lines)) if lines[k].lstrip().startswith("```"))
            found.append(Block(page, start + 1, language, "\n".join(lines[start:i]) + "\n"))
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            start = i
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1].strip()):
                i += 1
            text = "\n".join(line[4:] for line in lines[start : i + 1]).rstrip()
            found.append(Block(page, start + 1, "", text + "\n"))
        i += 1
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block. Raises ValueError where a shell block has a line that is none."""
    folder, joined = ".", block.text.replace("\\\n", "  ")
    answered = block.language == "console" and any(line.startswith("$ ") for line in joined.splitlines())
    for number, line in enumerate(joined.splitlines()):
        text = line.removeprefix("$ ").strip()
        program = text.partition(" ")[0].rpartition("/")[2]
        shown = not text or text.startswith("#") or (answered and not line.startswith("$ "))
        if program not in PROGRAMS or (answered and not line.startswith("$ ")):
            if block.language in _SHELLS and not shown:
                raise ValueError(f"{block} line {number + 1}: {line!r} is no command that test_docs knows how to run")
            continue
        words = shlex.split(text, comments=True)
        if program == "cd":
            folder = str(Path(folder, words[1]))
        else:
            yield Command(block.page, block.line + number, (program, *words[1:]), folder)


def inline_code(page: str) -> list[str]:
    """What stands between single backticks, code blocks left out."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)


def section(page: str, heading: str) -> str:
    """The text below a heading up to the next one of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(heading)}$\n(.*?)(?=^#{{1,2}} |\Z)", PAGES[page], re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{page} has no heading {heading!r}")
    return found[2]


def first_cells(text: str) -> list[str]:
    """The first cell's code of every table row that starts with one."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def links(page: str) -> list[tuple[str, str]]:
    """(path, anchor) of every relative link and image."""
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    return [(path, anchor) for path, _, anchor in (t.partition("#") for t in targets if "://" not in t)]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in heads}
