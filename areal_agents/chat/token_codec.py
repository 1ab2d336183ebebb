"""Text ⇄ token ids with the control tokens of a chat template kept apart from content.

Content is hostile: a task or a tool may print ``<|im_end|>``. Before the template is rendered, ``hold`` replaces every
control token's text inside content by a placeholder; a control token in the rendered text is therefore the template's
own. ``encode_rendered`` cuts the text there. Each piece gets its placeholders' text back and is encoded by a copy of
the tokenizer that does not recognise control tokens. What the model itself said may hold its ``own`` control tokens, a
thinking tag for example, which stay tokens there. Fast tokenizers cut at control tokens before anything else, so
for harmless content the ids equal those of the whole text (``ChatFormat`` verifies this at start).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from areal_agents.types import Ids

_TAG = re.compile(r"</?(think|tool_\w+)>")
"""Tags that a template and content both use. Tokenizers that do not call them special take them for tokens anywhere."""


class Codec:
    """A Rust tokenizer that keeps its control tokens apart from content.

    The control tokens are all special tokens, and those that ``frame`` (template text) uses. ``frame`` must use at
    least one added token. ``ChatFormat`` refuses templates that do not.

    ``own`` are texts that the model writes itself. They are control tokens where the tokenizer calls them special.
    """

    def __init__(self, backend: Any, *, frame: str, own: Collection[str] = ()) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        # Some tokenizers do not call the tokens special that frame a turn.
        control = {
            i: t
            for i, t in added.items()
            if t.special
            or (
                t.content in frame
                and not t.content.isspace()
                and t.content not in own
                and not _TAG.fullmatch(t.content)
            )
        }
        self._ids = {t.content: i for i, t in control.items()}
        self.framing_ids = frozenset(i for text, i in self._ids.items() if text not in own)
        """The control tokens that only a template writes."""
        longest_first = sorted(control.values(), key=lambda t: -len(t.content))
        self._controls = re.compile("|".join(re.escape(t.content) for t in longest_first))
        foreign = [re.escape(t.content) for t in longest_first if t.content not in own]
        self._foreign = re.compile("|".join(foreign) or r"(?!)")
        self._framing = re.compile(
            "|".join(
                (r"\s*" if t.lstrip else "") + re.escape(t.content) + (r"\s*" if t.rstrip else "")
                for t in longest_first
            )
        )
        self._plain: Any = Tokenizer.from_str(backend.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        missing = [t for t in control.values() if not t.special]
        if missing:
            for token in missing:
                token.special = True
            self._plain.add_special_tokens(missing)
        self._plain.encode_special_tokens = True

    def hold(
        self, rows: list[dict[str, Any]], held: Mapping[str, str] | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Replace every control token's text in ``rows`` by a placeholder.

        In the rows of the assistant, the model's own control tokens stay as they are.

        Returns the new rows, and what the placeholders stand for, those of ``held`` included.
        """
        out = dict(held or {})
        whole = repr(rows) + repr(out)
        # Placeholders start with what stands nowhere in the content, so content cannot contain one by itself.
        nonce = 0
        while f"@@{nonce}-" in whole:
            nonce += 1
        keys: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            key = keys.setdefault(match[0], f"@@{nonce}-{len(keys)}@@")
            out[key] = match[0]
            return key

        def walk(value: Any, hidden: re.Pattern[str]) -> Any:
            if isinstance(value, str):
                return hidden.sub(hide, value)
            if isinstance(value, Mapping):
                return {walk(k, hidden): walk(v, hidden) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [walk(v, hidden) for v in value]
            return value

        return [walk(r, self._foreign if r.get("role") == "assistant" else self._controls) for r in rows], out

    def encode_rendered(self, text: str, held: Mapping[str, str]) -> Ids:
        """Encode rendered text.

        Control tokens get their ids. Everything between them is plain text, with what ``held`` stands for put back.
        """
        ids: list[int] = []
        pos = 0
        for match in self._framing.finditer(text):
            ids += self.encode(_restore(text[pos : match.start()], held))
            ids.append(self._ids[match[0]] if match[0] in self._ids else self._ids[match[0].strip()])
            pos = match.end()
        return tuple(ids) + self.encode(_restore(text[pos:], held))

    def encode(self, text: str) -> Ids:
        """Encode content, in which the text of a control token is plain text."""
        if not text:
            return ()
        clean = text.encode("utf-8", "replace").decode()  # lone surrogates cannot be encoded
        return tuple(self._plain.encode(clean, add_special_tokens=False).ids)

    def encode_said(self, text: str) -> Ids:
        """Encode what the model says: its own control tokens get their ids, others are plain text."""
        rows, held = self.hold([{"role": "assistant", "content": text}])
        return self.encode_rendered(rows[0]["content"], held)

    def encode_whole(self, text: str) -> Ids:
        """Encode text as the tokenizer itself does, with control tokens recognised wherever they stand."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ``ids`` to text, special tokens included.

        Ids outside the vocabulary are left out.
        """
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def token_spans(self, ids: Ids, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Find the token ranges that cover character ranges of the decoded text.

        All ranges are half-open, and ``ranges`` are in order.
        """
        ends = self._char_ends(ids)
        spans: list[tuple[int, int]] = []
        token = 0
        for start, end in ranges:
            while token < len(ids) and ends[token] <= start:
                token += 1
            last = token
            while last < len(ids) and ends[last] < end:
                last += 1
            spans.append((token, min(last + 1, len(ids))))
        return spans

    def _char_ends(self, ids: Ids) -> list[int]:
        """Count, for each token, the characters of the text that are complete once it is read.

        Decoding a growing prefix would be quadratic. A window of the last few tokens is decoded instead, and moves on
        when it ends in a whole character. UTF-8 needs at most four bytes, so a longer tail of U+FFFD is invalid bytes
        and is taken as it is.
        """
        ends: list[int] = []
        done = 0  # characters before `read`
        anchor = read = 0  # decoding starts at `anchor`, so that a decoder's first-token rules do not apply at `read`
        for i in range(1, len(ids) + 1):
            known = self.decode(ids[anchor:read])
            window = self.decode(ids[anchor:i])
            whole = not window.endswith("�") or i - read >= 4
            ends.append(done + max(0, len(window) - len(known)) if whole else done)
            if whole:
                done, anchor, read = ends[-1], read, i
        return ends


def _restore(text: str, held: Mapping[str, str]) -> str:
    # One pass from the left: content next to a placeholder may look like a part of another.
    return re.sub("|".join(map(re.escape, held)), lambda m: held[m[0]], text) if held else text
