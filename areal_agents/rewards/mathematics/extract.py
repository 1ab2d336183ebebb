r"""The slot of a text in which its answer stands.

    answer      the whole text
    boxed       the last \boxed{…}, or several that are joined by commas, "and" or "or"
    final_line  the last line that is not empty, after "answer:"
    tool        the whole text, which an answer tool was called with
    text        anywhere in prose. Rewards never read it, because a model that writes every number would be right

All of it is linear in the length of the text.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from areal_agents.reward import boxed_spans

Slot = Literal["answer", "boxed", "final_line", "tool", "text"]
SLOTS: tuple[str, ...] = get_args(Slot)
REWARD_SLOTS = ("boxed", "tool", "final_line")
_AROUND = (
    (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("<answer>", "</answer>"), ("$$", "$$"), ("$", "$"),
)  # fmt: skip
_NEAR = 70
_JOINT = re.compile(r"[,;]|\b(?:and|or)\b")
_TAIL = re.compile(r"[\s$}]{0,4}(?:\\?%|percent(?:age)?\b|pct\b|\\text\{\s*(?:percent|pct)\s*\})")
_SAID = re.compile(
    r"(?:####|final\s+answer(?:\s+is)?|(?:the|my)\s+answer\s+is|answer\s*(?:is|:)|antwort\s*:)\s*[:=]?\s*",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"(?<!\\)\$\$?((?:[^$\\]|\\.){1,2000}?)(?<!\\)\$\$?|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL
)
_NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?(?:e[-+]?\d+)?(?:\s?(?:%|percent\b|°))?", re.IGNORECASE
)
_SENTENCE = re.compile(r"(?<!\d)\.(?:\s|$)|\.\s+(?=[A-Z\[(])|[\n!?]|\.$")
_SAYS = re.compile(r"^.{0,40}?\banswer\b[*_\s]*(?:is\b)?[*_\s]*[:=]?[*_\s]*", re.IGNORECASE)
_UNBRACED = re.compile(r"\\boxed\s{1,8}([^\s${}\\]{1,64})")
_CUT = re.compile(r"<\|[a-z_]{1,20}\|>")


def extract(text: str, slot: Slot) -> str | None:
    """Find the answer of ``text`` in ``slot``. None where there is none."""
    match slot:
        case "answer" | "tool":
            found: str | None = text
        case "boxed":
            found = boxed_answer(text)
        case "final_line":
            lines = [line for line in text.splitlines() if line.strip()]
            found = _SAYS.split(lines[-1])[-1] if lines else None
        case "text":
            found = _anywhere(text)
        case _:
            raise ValueError(f"unknown slot {slot!r}: there are {', '.join(SLOTS)}")
    return bare(found) if found is not None and bare(found) else None


def gold_answer(text: str) -> str:
    """Find the answer of a gold text: its box, what it calls the final answer, or all of it."""
    marked = text.rpartition("####")
    if marked[1] and marked[2].strip() and "\n" not in marked[2].strip():
        return bare(marked[2])  # the last line of a GSM8K solution
    boxed = boxed_answer(text, cut=True)
    if boxed is not None:
        return bare(boxed)
    if _SAID.search(text):
        said = _anywhere(text)
        if said is not None:
            return bare(said)
    return bare(text)


def bare(text: str) -> str:
    """Strip what typesetting puts around an answer: dollars, \\(…\\), **…**, <answer>…</answer>, a full stop."""
    text = text.strip()
    before = None
    while text != before:
        before = text
        for opened, closed in (
            (r"\(", r"\)"),
            (r"\[", r"\]"),
            ("**", "**"),
            ("`", "`"),
            ("<answer>", "</answer>"),
            ("$$", "$$"),
            ("$", "$"),
        ):
            if len(text) > len(opened) + len(closed) - 1 and text.startswith(opened) and text.endswith(closed):
                inside = text[len(opened) : len(text) - len(closed)]
                if opened not in inside or opened == closed == "**":
                    text = inside.strip()
        text = text.strip()
        if text.startswith("##"):
            text = text.lstrip("#").strip()
        if text.endswith("**") and text.count("**") == 1:
            text = text.removesuffix("**")
        if text.endswith(".") and not text.endswith("..."):
            text = text[:-1].rstrip()
    return text


def boxed_answer(text: str, *, cut: bool = False) -> str | None:
    """Join the last boxes of a text, as far as only a few words such as "and" stand between them.

    ``cut`` reads a box that is not closed too. A model that was cut off in its box has not answered.
    """
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")
    text = text.replace(r"\fbox{", r"\boxed{")
    spans = boxed_spans(text)
    if not spans and r"\boxed{" not in text:
        bare_box = _UNBRACED.findall(text)
        return bare_box[-1] if bare_box else None
    if not spans:
        start = text.rfind(r"\boxed{") if cut else -1
        return None if start < 0 else text[text.index("{", start) + 1 :]
    parts: list[str] = []
    following: int | None = None
    for start, end in reversed(spans):
        content = text[start:end].strip()
        if following is not None:
            between = text[end + 1 : following]
            if len(between) > _NEAR or (len(between) > 9 and not _JOINT.search(between)):
                break
        tail = _TAIL.match(text, end + 1)
        said = content + (r"\%" if tail and not content.endswith("%") else "")
        if not parts or parts[-1] != said:
            parts.append(said)
        following = text.rfind("\\", 0, start)
    return ", ".join(reversed(parts))


def _anywhere(text: str) -> str | None:
    text = _CUT.split(text)[0]
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    said = list(_SAID.finditer(text))
    if said:
        rest = text[said[-1].end() :]
        sentence = _SENTENCE.split(rest, maxsplit=1)[0]
        after = list(re.finditer(r"\b(?:is|was)\b", sentence))
        if after and re.search(r"\d", sentence[after[-1].end() :]):  # the number of points of f(x) is 19
            rest = rest[after[-1].end() :]
            sentence = sentence[after[-1].end() :]
        found = _MATH.search(rest)
        if found is not None and found.start() <= len(sentence):
            return _last_side(next(group for group in found.groups() if group))
        if sentence.strip():
            return sentence
    formulas, numbers = list(_MATH.finditer(text)), list(_NUMBER.finditer(text))
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return _last_side(next(group for group in formulas[-1].groups() if group))
    return numbers[-1].group() if numbers else None


def _last_side(formula: str) -> str:
    """Take what a computation ends with: 1 + 1 = 2 says 2."""
    if re.search(r"[<>]|\\[lg]e|\\begin", formula):
        return formula
    return re.split(r"(?<![<>!])=", formula)[-1]
