"""What README.md and docs/ claim, compared with the code: settings, messages, tables, links, the map of files.

``test_docs`` runs their snippets and commands, and compares the page on metrics with those of a run.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from areal_agents import settings
from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.cli.commands import Command
from areal_agents.conformance.check import CHECKS
from areal_agents.errors import ConfigError
from areal_agents.settings.describe import parameters
from areal_agents.settings.describe import sections as setting_sections
from areal_agents.settings.describe import settings as known_settings
from areal_agents.settings.evaluation import SHORT
from areal_agents.tool import tool
from areal_agents.trainer.resume import MAY_CHANGE, USED_BY
from tests import doc_blocks
from tests.doc_blocks import PAGES, ROOT

COLLECTIONS = ("envs", "tools", "sandboxes")


def test_commands_in_the_text_are_known() -> None:
    classes = {a.__metadata__[0].name: a.__origin__ for a in Command.__args__}
    for page in PAGES:
        for code in doc_blocks.inline_code(page):
            words = code.replace("…", "").split()
            if words[:1] != ["areal-agents"] or len(words) == 1:
                continue
            assert words[1] in classes, f"{page}: `{code}`"
            fields = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(classes[words[1]])}
            settable = {f"--{key}" for key in known_settings()} if words[1] in ("train", "demo", "eval") else set()
            if words[1] == "eval":
                settable |= {"--" + name.replace("_", "-") for name in SHORT}
            flags = {w.strip("[]").partition("=")[0] for w in words if w.startswith(("--", "[--"))} - {"--help"}
            assert flags <= fields | settable, f"{page}: `{code}`"


def test_settings_in_the_text_exist_and_take_the_values_given() -> None:
    sections = {key.partition(".")[0] for key in known_settings() if "." in key}
    seen = 0
    for page in PAGES:
        for code in doc_blocks.inline_code(page):
            found = re.fullmatch(rf"({'|'.join(sections)})\.([\w.]+)(?: = (.+))?", code)
            if found is None or code.endswith((".py", ".jsonl", ".toml")):
                continue
            key, seen = f"{found[1]}.{found[2]}", seen + 1
            chosen, _, name = key.rpartition(".")
            kinds = REGISTRIES[chosen].names() if chosen in REGISTRIES else []
            owners = [kind for kind in kinds if name in parameters(chosen, kind)]
            assert key in known_settings() or key in setting_sections() or owners or (kinds and name == "kind"), (
                f"{page}: {code}"
            )
            if found[3] and re.fullmatch(r"-?[\d.e-]+|\"[^…]*\"|true|false|\[[\d., ]+\]", found[3]):  # no placeholder
                partner = [f"--{chosen}", owners[0]] if owners else []
                settings.load(None, [*partner, f"--{key}", found[3]])
    assert seen > 50
    with pytest.raises(ConfigError):  # the test can fail
        settings.load(None, ["--algorithm.advantage", "gae"])


def test_the_choices_of_an_algorithm_can_be_written_into_a_file_as_the_page_has_them(tmp_path: Path) -> None:
    rows = re.findall(
        r"^\| .+? \| (`.+`) \|$", doc_blocks.section("docs/configure-a-run.md", "Algorithm"), re.MULTILINE
    )
    assert len(rows) > 5
    for i, row in enumerate(rows):
        file = tmp_path / f"{i}.toml"
        file.write_text("\n".join(re.findall(r"`([^`]+)`", row)))
        settings.load(file)


@cache
def messages() -> str:
    """Every text in the code but docstrings, one a line; what is put in at run time is the character U+0000."""
    found: list[str] = []
    for folder in ("areal_agents", "sandboxes", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings are no messages
            for node in (n for n in ast.walk(tree) if id(n) not in prose):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [p.value if isinstance(p, ast.Constant) and isinstance(p.value, str) else "\0" for p in parts]
                if any(t != "\0" for t in texts):
                    found.append("".join(texts).replace("\n", " "))
    return "\n".join(found)


def test_errors_quoted_in_troubleshooting_are_those_of_the_code() -> None:
    text = PAGES["docs/troubleshooting.md"].split("## Symptoms without a message")[0]
    quoted = doc_blocks.first_cells(text)
    assert len(quoted) > 40
    for message in quoted:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.search(pattern, messages()), f"no such message in the code: {message}"


def test_events_are_documented() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "areal_agents").rglob("*.py"))
    kinds = set(re.findall(r"\b_?event\(\s*\"(\w+)\"", source))
    page = "docs/read-the-metrics.md"
    assert set(doc_blocks.first_cells(doc_blocks.section(page, "events.jsonl: what happened"))) == kinds


def test_tables_list_what_the_code_has() -> None:
    page = "docs/check-an-environment.md"
    listed = doc_blocks.first_cells(PAGES[page].split("## The reward audit")[0])
    assert listed == list(CHECKS)
    options = doc_blocks.first_cells(PAGES["docs/write-a-tool.md"].split("## What a tool returns")[0])
    parameters = inspect.signature(tool).parameters.values()
    assert set(options) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    always, unused = doc_blocks.section("docs/resume.md", "Changing settings").split("The second kind")
    cells = re.findall(r"^\| (`.+?) \|", always, re.MULTILINE)
    changeable = {c.replace("*", "") for cell in cells for c in re.findall(r"`([^`]+)`", cell)}
    assert changeable == set(MAY_CHANGE) - {"out"}
    rows = re.findall(r"^\| the first .+? \| (`.+`) \|$", unused, re.MULTILINE)
    assert {c.replace("*", "") for row in rows for c in re.findall(r"`([^`]+)`", row)} == set(USED_BY)


def test_links_lead_somewhere() -> None:
    count = 0
    for page in PAGES:
        for path, anchor in doc_blocks.links(page):
            count += 1
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page}: {path}"
            if anchor:
                assert anchor in doc_blocks.anchors(str(target.resolve().relative_to(ROOT))), f"{page}: {path}#{anchor}"
    assert count > 20


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short(page: str) -> None:
    assert len(PAGES[page].splitlines()) < 200
    assert (
        page in ("README.md", "docs/index.md")
        or page.startswith("docs/decisions")
        or Path(page).name in PAGES["docs/index.md"]
    )


def test_the_readmes_environment_is_complete_in_under_30_lines() -> None:
    (code,) = [b.text for b in doc_blocks.blocks("README.md") if b.language == "python"]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) < 30


def test_the_map_names_every_room_and_contract_and_no_other() -> None:
    page = PAGES["docs/layout.md"]
    lines = page.split("areal_agents/ ")[1].split("    envs/ ")[0].splitlines()
    named = {word for line in lines[1:] for word in re.split(r" {2,}", line.strip())[0].split()}
    package = ROOT / "areal_agents"
    rooms = {f"{p.parent.name}/" for p in package.glob("*/__init__.py") if not p.parent.is_symlink()}
    contracts = {p.stem for p in package.glob("*.py") if not p.name.startswith("__")}
    assert named == rooms | contracts


def test_the_map_names_every_file_and_no_other() -> None:
    rows = re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", doc_blocks.section("docs/layout.md", "Every file"), re.MULTILINE)
    listed = [f"{room}/{name}" for room, names in rows for name in names.split(" · ")]
    package = ROOT / "areal_agents"
    folders = [*(p for p in package.iterdir() if p.is_dir() and not p.is_symlink()), *map(ROOT.joinpath, COLLECTIONS)]
    files = [p for folder in folders for p in folder.rglob("*.py") if not p.name.startswith("__")]
    there = [str(p.with_suffix("").relative_to(package if package in p.parents else ROOT)) for p in files]
    assert sorted(listed) == sorted(name for name in there if not name.startswith("cli/templates/"))


def test_the_order_of_rooms_on_the_page_is_the_one_that_is_checked() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    shown = PAGES["docs/layout.md"].split("## Who imports whom")[1].split("## Where to add one")[0]
    lines = [line.strip() for line in shown.splitlines() if line.startswith("    ")]
    assert [set(re.split(r" · | ", line)) for line in lines] == [
        set(re.split(r" [:|] ", layer)) for layer in contract["layers"]
    ]
