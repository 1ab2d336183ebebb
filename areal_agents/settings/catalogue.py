"""The catalogue of algorithms, read off the registries and the functions' docstrings.

A docstring of an algorithm is: a first line that says what it does, its formula indented, paragraphs, among them one
that begins with ``Bias:`` and one that begins with ``Use it:``, and arXiv numbers wherever papers are named.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from areal_agents.algorithms.registry import REGISTRIES, Registry
from areal_agents.errors import ConfigError
from areal_agents.settings.describe import help_lines, parameters, settings, shown_default
from areal_agents.settings.presets import PRESETS

_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
_SECTIONS = ("Args:", "Raises:", "Returns")
Entry = dict[str, Any]


def catalogue(name: str = "") -> list[Entry]:
    """Describe every algorithm and preset that can be chosen, or those called ``name``, as plain JSON values.

    An algorithm has ``setting``, ``name``, ``summary``, ``formula``, ``papers``, ``bias``, ``use`` and ``parameters``
    (each with ``name``, ``accepts``, ``default`` and ``meaning``). One of a package that cannot be imported has an
    ``error`` instead. A preset has ``setting = "algorithm"`` and ``settings``. Raises ConfigError where none is called
    ``name``.
    """
    found = [
        _entry(registry, kind) for registry in REGISTRIES.values() for kind in registry.names() if name in ("", kind)
    ]
    found += [_preset(kind) for kind in PRESETS if name in ("", kind)]
    if not found:
        raise ConfigError(_unknown(name))
    return found


def algorithms_text(name: str = "") -> str:
    """Describe every algorithm and preset that can be chosen, or those called ``name`` with their docstrings whole.

    One of a package that cannot be imported is named with its error. Raises ConfigError where none is called ``name``.
    """
    lines: list[str] = []
    for registry in REGISTRIES.values():
        kinds = [kind for kind in registry.names() if name in ("", kind)]
        lines += ["", f"[{registry.key}]", *(line for kind in kinds for line in _lines_of(registry, kind, bool(name)))]
        if not kinds:
            del lines[-2:]
    chosen = [preset for preset in PRESETS if name in ("", preset)]
    if chosen:
        lines += ["", "presets (algorithm = NAME)"]
        lines += [f"  {preset:<12} {PRESETS[preset].summary}" for preset in chosen]
    if name and chosen:
        lines += [f"    --{key} {_shown(value)}" for key, value in flat(PRESETS[name].settings)]
    if not lines:
        raise ConfigError(_unknown(name))
    return "\n".join(lines[1:])


def _lines_of(registry: Registry, kind: str, whole: bool) -> list[str]:
    try:
        found, text = parameters(registry.key, kind), inspect.getdoc(registry.function(kind)) or ""
    except ConfigError as error:
        return [f"  {kind}  {error}"]
    lines = [f"  {line}" for line in text.splitlines()] if whole else []
    head = kind if whole else f"{kind:<12} {text.partition(chr(10))[0]}"
    return [f"  {head}", *lines, *(f"  {line}" for setting in found.values() for line in help_lines(setting))]


def _unknown(name: str) -> str:
    known = dict.fromkeys([*(kind for registry in REGISTRIES.values() for kind in registry.names()), *PRESETS])
    return f"there is no algorithm {name!r}: there are {', '.join(known)}"


def _entry(registry: Registry, kind: str) -> Entry:
    head = {"setting": registry.key, "name": kind}
    try:
        function, own = registry.function(kind), parameters(registry.key, kind)
    except ConfigError as error:
        return {**head, "error": str(error)}
    text = inspect.getdoc(function) or ""
    return {
        **head,
        "summary": text.partition("\n")[0],
        "formula": formula_of(text),
        "papers": list(dict.fromkeys(_ARXIV.findall(text))),
        "bias": paragraph(text, "Bias:"),
        "use": paragraph(text, "Use it:"),
        "parameters": [
            {
                "name": s.name,
                "accepts": s.expects,
                "default": None if s.info.is_required() else shown_default(s.default),
                "meaning": s.info.description or "",
            }
            for s in own.values()
        ],
    }


def _preset(name: str) -> Entry:
    p = PRESETS[name]
    return {
        "setting": "algorithm", "name": name, "summary": p.summary, "papers": _ARXIV.findall(p.paper),
        "settings": dict(flat(p.settings)),
    }  # fmt: skip


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tables by their dotted keys."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def formula_of(text: str) -> str:
    """Return the indented lines of a docstring that stand before its sections, without their indentation."""
    lines = _prose(text)
    return "\n".join(line.strip() for line in lines if line.startswith("    ") and line.strip())


def paragraph(text: str, head: str) -> str:
    """Return the paragraph that begins with ``head``, without it and on one line, or nothing."""
    for block in "\n".join(_prose(text)).split("\n\n"):
        if block.startswith(head):
            return " ".join(block.removeprefix(head).split())
    return ""


def _prose(text: str) -> Sequence[str]:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line.startswith(_SECTIONS)), len(lines))
    return lines[1:end]


TITLES = {
    "algorithm.advantage": "Advantages",
    "algorithm.loss": "Losses",
    "algorithm.correction": "Off-policy corrections",
    "algorithm.mask": "Off-policy masks",
}


def page() -> str:
    """Write ``docs/algorithms.md``: a table for each setting that chooses an algorithm, ours alone, and the presets."""
    lines = [_HEAD.rstrip(), ""]
    for key, registry in REGISTRIES.items():
        lines += [
            f"## {TITLES[key]} (`{key}`)",
            "",
            "| Name | Formula | Papers | Bias | Use it |",
            "|---|---|---|---|---|",
        ]
        default = settings()[key].default.kind
        for kind in registry.builtin():
            e = _entry(registry, kind)
            name = f"`{kind}`" + (" (default)" if kind == default else "")
            papers = ", ".join(e["papers"])
            cells = [name, e["formula"].replace("\n", "; ") or e["summary"], papers, e["bias"], e["use"]]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("")
    lines += ["## Presets (`algorithm = NAME`)", "", "| Name | What it is | Papers | Settings |", "|---|---|---|---|"]
    for name in PRESETS:
        e = _preset(name)
        said = ", ".join(f"`{k.removeprefix('algorithm.')} = {_shown(v)}`" for k, v in e["settings"].items())
        lines.append(f"| `{name}` | {e['summary']} | {', '.join(e['papers'])} | {said} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else shown_default(value)


_HEAD = """# Algorithms

This page is written by `python -m areal_agents.settings.catalogue`, from the functions' own docstrings. The same with
every parameter and its default: `areal-agents algorithms [NAME] [--json]`. How they make one number to minimise:
[The objective](objective.md); which to take: [Advantages](advantages.md). One of your own:
[Add an algorithm](add-an-algorithm.md).

Symbols: μ is the policy that sampled a token, p the proximal policy, π the current one; ρ = p/μ, r = π/p (or π/μ where
there is no p), u = π/μ. Trajectory i of a group of G has K_i turns with rewards r_{i,k}, k from 0; R_i = Σ_k r_{i,k}
and G_{i,k} = Σ_{j≥k} γ^{j−k} r_{i,j}. V is a critic's value. Papers are arXiv numbers.
"""

if __name__ == "__main__":
    print(page(), end="")
