"""The catalogue of algorithms says of each what a reader needs to choose it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.cli.main import main
from areal_agents.errors import ConfigError
from areal_agents.settings.catalogue import TITLES, catalogue, formula_of, page, paragraph
from areal_agents.settings.presets import PRESETS

TEXT = """Do one thing.

    L = a
    M = b  for c

From 1234.56789 and 2345.67890,
with more.

Bias: none
at all.

Use it: always.

Args:
    x: no formula.
"""


def test_a_docstrings_parts() -> None:
    assert formula_of(TEXT) == "L = a\nM = b  for c"
    assert paragraph(TEXT, "Bias:") == "none at all."
    assert paragraph(TEXT, "Use it:") == "always."
    assert paragraph(TEXT, "Paper:") == ""


@pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
def test_every_algorithm_of_ours_has_all_parts(registry: object) -> None:
    key = registry.key  # type: ignore[attr-defined]
    assert key in TITLES
    for entry in catalogue():
        if entry["setting"] == key and entry["name"] != "none":
            assert entry["summary"].endswith("."), entry["name"]
            assert all(entry[part] for part in ("formula", "bias", "use")), entry
            assert all(p["meaning"] and p["default"] is not None for p in entry["parameters"]), entry


def test_the_command_prints_json_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms", "gspo", "--json"]) == 0
    loss, preset = json.loads(capsys.readouterr().out)
    assert (loss["setting"], loss["papers"], loss["parameters"][0]["name"]) == (
        "algorithm.loss", ["2507.18071"], "clip_low",
    )  # fmt: skip
    assert preset["settings"]["algorithm.loss.kind"] == "gspo"
    assert main(["algorithms", "dapo"]) == 0
    shown = capsys.readouterr().out
    assert "--rollout.dynamic_sampling true" in shown
    assert main(["algorithms"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name}" in shown for name in PRESETS)
    with pytest.raises(ConfigError, match="there is no algorithm 'grop': there are"):
        catalogue("grop")


def test_the_page_is_the_catalogue() -> None:
    written = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m areal_agents.settings.catalogue > docs/algorithms.md"
