"""Chat messages ⇄ token ids: a tokenizer, its chat template and a tool-call format.

    messages ──first_prompt──▶ ids ──engine──▶ sampled ids ──parse──▶ AssistantMessage
                                │                  │
                                └── next prompt = prompt ‖ sampled ‖ suffix(new messages)      (T1)

Sampled ids are never decoded and encoded again: ``Conversation`` only appends. The suffix is the difference of
two renderings of a dummy conversation that has a system message (T2).

A control token's text inside content stays plain text (``areal_agents.chat.token_codec``).

Not covered: images (the template must accept them), and tokenizers without a Rust backend.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from jinja2 import TemplateError as JinjaError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from areal_agents.chat.token_codec import Codec
from areal_agents.chat.toolcalls import CLOSE, OPEN, THINK, find_blocks, message_of, parse_text
from areal_agents.errors import ModelError, TemplateError
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Finish,
    Ids,
    Message,
    messages_to_json,
)

__all__ = ["ChatFormat", "ChatMessage", "History", "ToolLike", "parse_text"]

History = Literal["append", "template"]
ChatMessage = Message | AssistantMessage
_MARK = "Zq7 sentinel"  # letters, a digit and a space: no template trims or rewrites it
_DUMMY = ({"role": "system", "content": "S."}, {"role": "user", "content": "U."})


class ToolLike(Protocol):
    """Anything that describes a tool to the model, as ``areal_agents.tool.ToolSpec`` does."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, Any]: ...


class ChatFormat:
    """A tokenizer with its chat template and tool-call format.

    It is pure: it holds no conversation and no engine.

    ``stop_ids`` are the ids that end an assistant turn. By default they are the one that the template writes after
    assistant content, and the tokenizer's eos.

    ``history`` is "template" where the template rewrites its past (drops ``<think>`` from earlier turns, say), else
    "append". A caller who wants past thinking kept under such a template passes ``history="append"``.
    """

    history: History
    stop_ids: tuple[int, ...]
    renders_tools: bool
    """The template renders ``tools`` itself; otherwise the system message carries the schemas."""
    accepts_tool_role: bool
    """The template renders role ``tool``; otherwise results travel in a user message."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tool_format: Literal["hermes"] = "hermes",
        stop_ids: Sequence[int] | None = None,
        history: History | None = None,
    ) -> None:
        """Find out, once, what the tokenizer and its template are like.

        Args:
            tokenizer: has a Rust backend and a chat template.
            tool_format: how the model writes its tool calls.
            stop_ids: None takes the default.
            history: None asks the template.

        Raises:
            TemplateError: where the template cannot keep rules T1 to T4. It names the rule and the remedy.
        """
        if tool_format != "hermes":
            raise TemplateError(f'tool_format {tool_format!r} is unknown: use "hermes"')
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise TemplateError("the tokenizer has no Rust backend (tokenizer.json): convert it to a fast tokenizer")
        if not tokenizer.chat_template:
            raise TemplateError("the tokenizer has no chat template: use an instruction-tuned model or set one")
        self.tokenizer = tokenizer
        before, after = self._assistant_frame()
        self._codec = Codec(tokenizer.backend_tokenizer, frame=before + after)
        self._turn_end = self._codec.encode_rendered(after, {})[0]
        eos = tokenizer.eos_token_id
        found = (self._turn_end,) if eos is None or eos == self._turn_end else (self._turn_end, int(eos))
        self.stop_ids = found if stop_ids is None else tuple(stop_ids)
        self.thinks_first = self._generation_prompt().rstrip().endswith(THINK)
        self.renders_tools = self._probe_tools()
        self.accepts_tool_role = self._probe_tool_role()
        self.history = history or self._probe_history()
        self._check_ids()

    @classmethod
    def load(cls, model: str | Path) -> ChatFormat:
        """Load the format of a local model folder.

        Raises ModelError where no tokenizer can be loaded from it.
        """
        if not Path(model).is_dir():
            raise ModelError(f"{model} is not a folder: pull the model first and pass its local folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"no tokenizer in {model}: {error}") from error
        return cls(tokenizer)

    # ── messages to ids ──────────────────────────────────────────────────────────────────────────────────────────

    def first_prompt(self, messages: Sequence[ChatMessage], tools: Sequence[ToolLike] = ()) -> Ids:
        """Return the ids of a whole conversation with its tools, the generation prompt included."""
        rows = self._rows(messages)
        specs = [_schema(t) for t in tools] if self.renders_tools else None
        if tools and not self.renders_tools:
            rows = _with_section(rows, _tools_section(tools))
        rows, held = self._codec.hold(rows)
        if specs:
            specs, held = self._codec.hold(specs, held)
        return self._codec.encode_rendered(self._render(rows, tools=specs or None, generate=True), held)

    def suffix(self, messages: Sequence[ChatMessage], previous: Completion) -> Ids:
        """Return the ids between ``previous``'s last sampled token and the next turn's first (T2).

        They start with the turn's end token where ``previous`` lacks it (a length stop, or another stop id; T4). Then
        comes what the template writes between turns, ``messages``, and the generation prompt.
        """
        rows, held = self._codec.hold(self._rows(messages))
        dummy = [*_DUMMY, {"role": "assistant", "content": _MARK}]
        base, full = self._render(dummy), self._render([*dummy, *rows], generate=True)
        cut = base.index(_MARK) + len(_MARK)
        if full[:cut] != base[:cut]:
            raise TemplateError(
                "T2: the template renders earlier messages differently when later ones follow, so a suffix cannot be "
                'added to sampled tokens: use ChatFormat(..., history="template")'
            )
        ids = self._codec.encode_rendered(full[cut:], held)
        closed = bool(previous.ids) and previous.ids[-1] == self._turn_end
        return ids[1:] if closed else ids

    def encode_turn(self, text: str) -> Ids:
        """Encode a scripted assistant turn, of a demonstration or an expert.

        Returns the content's ids and the turn's end id.
        """
        return (*self._codec.encode(text), self._turn_end)

    # ── ids to messages ──────────────────────────────────────────────────────────────────────────────────────────

    def parse(self, completion_ids: Ids, finish: Finish) -> AssistantMessage:
        """Read the message that sampled ids say.

        It has the text, and tool calls with status and token span (T7). Never raises.
        """
        ids = completion_ids[:-1] if completion_ids and completion_ids[-1] in self.stop_ids else completion_ids
        text = self._codec.decode(ids)
        blocks = find_blocks(text, thinking=self.thinks_first)
        spans = self._codec.token_spans(ids, [(b.start, b.end) for b in blocks]) if blocks else []
        return replace(message_of(text, finish, blocks, spans), in_thought=self.thinks_first)

    # ── rendering and encoding ───────────────────────────────────────────────────────────────────────────────────

    def _render(self, rows: Sequence[Mapping[str, Any]], *, tools: Any = None, generate: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(r) for r in rows], tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except (JinjaError, TypeError, ValueError, KeyError) as error:
            roles = " ".join(str(r["role"]) for r in rows)
            raise TemplateError(
                f"the chat template cannot render the roles [{roles}]: {error}. Use a template that accepts them, or "
                "change the environment's messages"
            ) from error
        return str(text)

    def _rows(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """Turn messages into rows for the template.

        Results travel as user messages where the template does not know role ``tool``.
        """
        rows: list[dict[str, Any]] = []
        wrapped = False
        for message in messages:
            if isinstance(message, AssistantMessage):
                row = messages_to_json([Message("assistant", message.parts)])[0]
            else:
                row = messages_to_json([message])[0]
            wrap = row["role"] == "tool" and not self.accepts_tool_role
            if wrap:
                row = {"role": "user", "content": f"<tool_response>\n{row['content']}\n</tool_response>"}
            if wrap and wrapped:  # one user message for all results: such templates want alternating roles
                rows[-1]["content"] += "\n" + row["content"]
            else:
                rows.append(row)
            wrapped = wrap
        return rows

    # ── what the tokenizer and its template are like, found once ─────────────────────────────────────────────────

    def _assistant_frame(self) -> tuple[str, str]:
        """Render an assistant message, and return the text before and after its content."""
        rows = [*_DUMMY, {"role": "assistant", "content": _MARK}, {"role": "user", "content": "V."}]
        text = self._render(rows)
        if text.count(_MARK) != 1:
            raise TemplateError(
                f"T2: the template renders assistant content {text.count(_MARK)} times, not once and verbatim: use a "
                "template that does"
            )
        before, after = text.split(_MARK)
        added = self.tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        if not any(after.startswith(t.content) for t in added):
            raise TemplateError(
                f"T4: after assistant content the template writes {after[:20]!r}, which starts with no special token: "
                "turns must end on a token id; use a template that ends them with one"
            )
        return before, after

    def _generation_prompt(self) -> str:
        base, full = self._render(_DUMMY), self._render(_DUMMY, generate=True)
        if not full.startswith(base) or full == base:
            raise TemplateError("T4: the template ignores add_generation_prompt: use a template that supports it")
        return full[len(base) :]

    def _probe_tools(self) -> bool:
        spec = {
            "type": "function",
            "function": {"name": "zq7_tool", "description": "", "parameters": {"type": "object", "properties": {}}},
        }
        try:
            return "zq7_tool" in self._render(_DUMMY, tools=[spec])
        except TemplateError:
            return False

    def _probe_tool_role(self) -> bool:
        rows = [*_DUMMY, {"role": "assistant", "content": "A."}, {"role": "tool", "content": _MARK, "name": "t"}]
        try:
            return _MARK in self._render(rows)
        except TemplateError:
            return False

    def _probe_history(self) -> History:
        """Find out whether the template rewrites its past.

        "append" means that a past turn, thinking included, renders as its prompt, its text and the suffix did.
        """
        for content in (_MARK, f"<think>\nwhy\n</think>\n\n{_MARK}"):
            rows = [*_DUMMY, {"role": "assistant", "content": content}, {"role": "user", "content": "V."}]
            past = self._render(_DUMMY, generate=True) + content
            if not self._render(rows, generate=True).startswith(past):
                return "template"
        return "append"

    def _check_ids(self) -> None:
        rows = [*_DUMMY, {"role": "assistant", "content": _MARK}, {"role": "user", "content": " two\n\n lines "}]
        text = self._render(rows, generate=True)
        if self._codec.encode_rendered(text, {}) != self._codec.encode_whole(text):
            raise TemplateError(
                "T2: this tokenizer encodes text depending on what precedes it (a prefix-space rule), "
                'so appended ids would differ from a whole rendering: set "prepend_scheme": "never" in '
                "tokenizer.json or use a byte-level tokenizer"
            )


def _schema(tool: ToolLike) -> dict[str, Any]:
    parameters = dict(tool.parameters)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def _tools_section(tools: Sequence[ToolLike]) -> str:
    """Write the Hermes section for templates that ignore tools.

    It is short, because small models read it on CPUs.
    """
    lines = [json.dumps(_schema(t)["function"], ensure_ascii=False, separators=(", ", ": ")) for t in tools]
    call = '{"name": ..., "arguments": {...}}'
    return "\n".join(["<tools>", *lines, "</tools>", f"To call a tool, write {OPEN}{call}{CLOSE}"])


def _with_section(rows: list[dict[str, Any]], section: str) -> list[dict[str, Any]]:
    if rows and rows[0]["role"] == "system":
        first = {**rows[0], "content": f"{rows[0]['content']}\n\n{section}"}
        return [first, *rows[1:]]
    return [{"role": "system", "content": section}, *rows]
