r"""The place in a judge's prompt that holds somebody else's text, and that the text cannot close.

    answer ─▶ harmless (control tokens, invisible characters) ─▶ capped ─▶ <<<ANSWER 3f…>>> … <<<END ANSWER 3f…>>>

A slot's tag is drawn after the text was written, and drawn again where the text has it. So no text can name the tag of
its slot, and with it neither the slot's end nor the line that a judge's score stands on.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TAG_BYTES = 4
"""Of randomness. A text is written before its tag is drawn, so the tag only has to be absent from it."""
MAX_CHARS = 24_000
_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f\ufeff]"
)
"""Control characters, marks that turn the direction of text, and tag characters, which show as nothing."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_NO_WIDTH = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200d\u2060-\u2065\u206a-\u206f\u3164\ufe00-\ufe0f\uffa0"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
"""Characters of no width, which a tokenizer may drop (Unicode's Default_Ignorable_Code_Point)."""
_HIDDEN = re.compile(rf"(?<=[\x00-\x7f＜﹤｜]){_NO_WIDTH}|{_NO_WIDTH}(?=[\x00-\x7f＞﹥｜])")
"""They join letters of some scripts and parts of emoji, and have no business beside an ASCII character."""
_CONTROL = re.compile(
    # <|im_start|>, DeepSeek's <｜User｜>, and what some tokenizers turn into these
    r"[<＜﹤](?=[|｜])"
    # <s>, <bos>, <start_of_turn>, <think>, <tool_call>, <unused7>, …
    r"|<(?=/?(?:s|bos|eos|pad|unk|mask|cls|sep|think|thinking|tool_?calls?|tool_response|(?:start|end)_of_\w+"
    r"|(?:unused|extra_id_|reserved_)\w*|sop|eop|bom|fim_\w+)\s*>)"
    # <<SYS>> and this module's own marks
    r"|<(?=<<)|<(?=</?SYS>>)"
    # [INST], [/INST], [SYSTEM_PROMPT], [TOOL_CALLS], [gMASK], …
    r"|\[(?-i:(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CALL_ID|ARGS|THINK|IMG\w*"
    r"|BOS|EOS|PAD|UNK|CLS|SEP|MASK|gMASK|sMASK)\]))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Content:
    """A text that may stand in a slot, and how many of its characters are left out."""

    text: str
    left_out: int = 0


def content(text: str, *, max_chars: int = MAX_CHARS) -> Content:
    """Make somebody else's text fit for a slot: harmless, and no longer than ``max_chars``.

    Where it is longer its middle is left out, and a line there says how much.
    """
    harmless = _harmless(text)
    if len(harmless) <= max_chars:
        return Content(harmless)
    head, tail = (max_chars + 1) // 2, max_chars // 2
    left_out = len(harmless) - head - tail
    note = f"\n[… {left_out} characters are left out here …]\n"
    return Content(harmless[:head] + note + harmless[len(harmless) - tail :], left_out)


def _harmless(text: str) -> str:
    """Break control tokens up by a space, and take out what cannot be seen or sent."""
    text = _SURROGATES.sub("\ufffd", _LINE_ENDS.sub("\n", text))
    return _CONTROL.sub(lambda mark: mark.group()[0] + " ", _HIDDEN.sub("", _UNSEEN.sub("", text)))


def draw_tag(texts: Mapping[str, Content], draw: Callable[[int], str] = secrets.token_hex) -> str:
    """Return a tag that occurs in none of ``texts``, in no spelling."""
    whole = "\n".join(c.text for c in texts.values()).lower()
    while True:
        tag = draw(TAG_BYTES).lower()
        if tag not in whole:
            return tag


def sealed(name: str, body: Content, tag: str) -> str:
    """Return the slot called ``name`` with its text inside."""
    return f"<<<{name} {tag}>>>\n{body.text}\n<<<END {name} {tag}>>>"
