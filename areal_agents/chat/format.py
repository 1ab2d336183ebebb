"""Chat messages ⇄ token ids: a tokenizer, its chat template and a tool-call format.

    messages ──first_prompt──▶ ids ──engine──▶ sampled ids ──parse──▶ AssistantMessage
                                │                  │
                                └── next prompt = prompt ‖ sampled ‖ suffix(new messages)      (T1)

Sampled ids are never decoded and encoded again: ``Conversation`` only appends. The suffix is what the template writes
after an assistant's content in a dummy conversation (T2).

A control token's text inside content stays plain text (``areal_agents.chat.token_codec``). What the template is like
is in ``areal_agents.chat.template_facts``.

Not covered: images (the template must accept them), and tokenizers without a Rust backend.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from areal_agents.chat.options import ChatOptions, History
from areal_agents.chat.rows import ChatMessage, RowMaker
from areal_agents.chat.template import ChatTemplate
from areal_agents.chat.template_facts import MARK, look_at, result, said
from areal_agents.chat.thinking import THINK, UNTHINK, thought_is_open
from areal_agents.chat.token_codec import Codec
from areal_agents.chat.tool_formats import AUTO
from areal_agents.chat.tool_formats.base import ToolFormat
from areal_agents.chat.tool_formats.detection import chosen_format, verify, written_format
from areal_agents.chat.tool_formats.harmony import REFUSAL, is_harmony
from areal_agents.chat.toolcalls import ToolLike, blocks_of, message_of, parse_text, rewrite, rewritten, schemas_of
from areal_agents.errors import ModelError, TemplateError
from areal_agents.types import AssistantMessage, Completion, Finish, Ids

__all__ = ["ChatFormat", "ChatMessage", "History", "ToolLike", "parse_text"]

_SHOWN = "Zq7 shown"
_SECTION = "Zq7 section"
_NEAR_END = 64
"""Tokens at a prompt's end in which the answer's opening stands."""


class ChatFormat:
    """A tokenizer with its chat template and tool-call format.

    It is pure: it holds no conversation and no engine.

    ``stop_ids`` are the ids that end an assistant turn. By default they are the one that the template writes after
    assistant content, the tokenizer's eos, and those that the model's generation config names.

    ``history`` is "template" where the template rewrites its past (drops ``<think>`` from earlier turns, say), else
    "append". A caller who wants past thinking kept under such a template passes ``history="append"``.
    """

    history: History
    turn_end: int
    """The id that the template writes after assistant content."""
    stop_ids: tuple[int, ...]
    tool_format: ToolFormat
    """How calls are written: the model is told it, its text is parsed in it, and experts speak it (T7)."""
    renders_tools: bool
    """The template describes the tools itself, in ``tool_format``. Otherwise the first message describes them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tool_format: str = AUTO,
        stop_ids: Sequence[int] | None = None,
        end_ids: Sequence[int] = (),
        history: Literal["auto", "append", "template"] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        merge_system: bool = False,
    ) -> None:
        """Find out, once, what the tokenizer and its template are like.

        Args:
            tokenizer: has a Rust backend and a chat template.
            tool_format: the name of how the model writes its tool calls. "auto" asks the template.
            stop_ids: None takes the default.
            end_ids: ids that end a turn too, as the model's generation config says.
            history: None and "auto" ask the template.
            template_variables: values of the template's own variables, in every rendering.
            merge_system: put a system message into the first user message where the template knows no system role.

        Raises:
            TemplateError: where the template cannot keep rules T1 to T4 and T7. It names the rule and the remedy.
        """
        if history not in (None, "auto", "append", "template"):
            raise TemplateError(f'history {history!r} is unknown: use "auto", "append" or "template"')
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise TemplateError("the tokenizer has no Rust backend (tokenizer.json): convert it to a fast tokenizer")
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_variables)
        if is_harmony(self.template.source):  # before its other rules are looked at: this is the reason
            raise TemplateError(REFUSAL)
        added = [t.content for t in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()]
        self.facts = facts = look_at(self.template, [t for t in added if not t.isspace()])
        frame = facts.before + facts.after + facts.generation + facts.tool_frame
        self._find_tool_format(tool_format, added)
        # What the model writes itself, as tokens where the tokenizer has such.
        own = (THINK, UNTHINK, *self.tool_format.control)
        self._codec = Codec(tokenizer.backend_tokenizer, frame=frame, own=own)
        self.merge_system = merge_system
        self._rows = RowMaker(facts, merge_system=merge_system)
        self.turn_end = self._codec.encode_rendered(facts.after.lstrip(), {})[0]
        eos = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        found = tuple(dict.fromkeys((self.turn_end, *eos, *end_ids)))
        self.stop_ids = found if stop_ids is None else tuple(stop_ids)
        self.history = facts.history if history in (None, "auto") else history  # type: ignore[assignment]
        if facts.moves_tools and self.history == "append":
            self.renders_tools = False  # what was shown once stays where it stood (T1)
        self._shown_roles: set[str] = set()
        self._check_ids()

    @property
    def accepts_tool_role(self) -> bool:
        """The template renders role ``tool``; otherwise results travel in a user message."""
        return self.facts.tool_role

    @classmethod
    def load(cls, model: str | Path, options: ChatOptions | None = None) -> ChatFormat:
        """Load the format of a local model folder.

        Raises ModelError where no tokenizer can be loaded from it.
        """
        options = options or ChatOptions()
        if not Path(model).is_dir():
            raise ModelError(f"{model} is not a folder: pull the model first and pass its local folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
        except Exception as error:  # boundary: transformers and tokenizers raise errors of any type for a broken file
            raise ModelError(f"no tokenizer in {model}: {error}") from error
        return cls(
            tokenizer,
            end_ids=end_ids(Path(model)),
            tool_format=options.tool_format,
            history=options.history,
            template_variables=options.template_variables,
            merge_system=options.merge_system,
        )

    def _find_tool_format(self, asked: str, added: Sequence[str]) -> None:
        """Choose how calls are written, so that what is rendered and what is parsed are one format."""
        facts = self.facts
        end = facts.after.lstrip()
        tail = max((t for t in added if end.startswith(t)), key=len)
        written = written_format(self.template.render, facts.head, facts.before, tail)
        self.tool_format = chosen_format(written, asked, renders_tools=facts.renders_tools)
        verify(self.tool_format)
        told = written.format is not None and written.format.name == self.tool_format.name
        self.renders_tools = facts.renders_tools and told

    # ── messages to ids ──────────────────────────────────────────────────────────────────────────────────────────

    def first_prompt(self, messages: Sequence[ChatMessage], tools: Sequence[ToolLike] = ()) -> Ids:
        """Return the ids of a whole conversation with its tools, the generation prompt included.

        Raises TemplateError where the template cannot show the messages.
        """
        specs, held = self._codec.hold([_schema(t) for t in tools])
        own = rewritten(messages, self.tool_format, tools)
        if self.renders_tools or not specs:
            rows, held = self._codec.hold(self._rows.conversation(own), held)
            return self._codec.encode_rendered(self.template.render(rows, tools=specs or None, generate=True), held)
        # The section is put in after the rendering: its markup is the model's own, and so are the control tokens in it.
        place = _SECTION
        while place in repr(messages):
            place += "q"
        rows, held = self._codec.hold(self._rows.conversation(own, place), held)
        section = self.tool_format.section([s["function"] for s in specs])
        text = self.template.render(rows, generate=True)
        if place not in text:
            raise TemplateError("T7: the chat template shows the tools' description nowhere: use another template")
        return self._codec.encode_rendered(text.replace(place, section), held)

    def suffix(self, messages: Sequence[ChatMessage], previous: Completion) -> Ids:
        """Return the ids between ``previous``'s last sampled token and the next turn's first (T2).

        They start with the turn's end token where ``previous`` lacks it (a length stop, or another stop id; T4). Then
        comes what the template writes between turns, ``messages``, and the generation prompt.

        Raises TemplateError where the template cannot show the messages there.
        """
        rows, held = self._codec.hold(self._rows.following(messages))
        mark = MARK
        while mark in repr(rows):
            mark += "q"
        tail = self._tail(mark, rows)
        for row in rows:
            self._require_shown(str(row["role"]))
        ids = self._codec.encode_rendered(tail.lstrip(), held)
        last = previous.ids[-1] if previous.ids else None
        if last not in self.stop_ids:
            return ids
        for i, written in enumerate(ids):
            if written == last:
                return ids[i + 1 :]
            if written not in self._codec.framing_ids:
                break
        return ids

    def _tail(self, mark: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """Render ``rows`` after an assistant's turn, and return what stands after its content, the mark."""
        text = self.template.render([*self.facts.dummy, said(mark), *rows], generate=True)
        before, found, tail = text.partition(mark)
        # Who asks for "append" takes the past as it was sampled, whatever the template would make of it.
        kept = self.facts.history == "template" or before == self.facts.begun
        if not (found and kept):
            raise TemplateError(
                "T2: the template renders earlier messages differently when later ones follow, so a suffix cannot be "
                'added to sampled tokens: set model.history = "template"'
            )
        return tail

    def _require_shown(self, role: str) -> None:
        """Refuse a role that the template does not show after an assistant's turn, where its message would be lost."""
        if role in self._shown_roles or role == "assistant":
            return
        row = result(_SHOWN) if role == "tool" else {"role": role, "content": _SHOWN}
        if _SHOWN not in self._tail(MARK, [row]):
            raise TemplateError(
                f"T2: the template does not show a {role} message where it stands, after an assistant's turn: change "
                'the environment\'s messages, or set model.history = "template"'
            )
        self._shown_roles.add(role)

    def encode_turn(self, text: str, tools: Sequence[ToolLike] = (), prompt: Ids = ()) -> Ids:
        """Encode a scripted assistant turn, of a demonstration or an expert.

        Calls in it are Hermes blocks, and are written as the model writes them. A thought that ``prompt`` opened is
        closed first.

        Returns the content's ids and the turn's end id. Raises TemplateError for calls that ``tool_format`` cannot say.
        """
        said = rewrite(self._after_thought(text, prompt), self.tool_format, tools)
        return (*self._codec.encode_said(said), self.turn_end)

    def encode_said(self, text: str, prompt: Ids = ()) -> Ids:
        """Encode an assistant's turn as it stands, of a data set. Calls in it are already in ``tool_format``.

        A thought that ``prompt`` opened is closed first. Returns the content's ids and the turn's end id.
        """
        return (*self._codec.encode_said(self._after_thought(text, prompt)), self.turn_end)

    def _after_thought(self, text: str, prompt: Ids) -> str:
        """Close the thought that ``prompt`` opened, where ``text`` does not go on with it."""
        if not self.opens_thought(prompt):
            return text
        if text.lstrip().startswith(THINK):
            return text.lstrip().removeprefix(THINK).removeprefix("\n")
        return text if UNTHINK in text else f"\n{UNTHINK}\n\n{text}"

    # ── ids to messages ──────────────────────────────────────────────────────────────────────────────────────────

    def opens_thought(self, prompt: Ids) -> bool:
        """Say whether a prompt ends inside a thought, so that the answer to it begins there.

        It depends on the prompt: a template may open ``<think>`` after a question and not after a tool's result.
        """
        start = len(prompt)
        while start > 0 and len(prompt) - start < _NEAR_END and prompt[start - 1] not in self._codec.framing_ids:
            start -= 1
        text = self._codec.decode(prompt[start:])
        # Content may stand there too where no control token separates it from the answer.
        return thought_is_open(text) and (self._separates or text.rstrip().endswith(THINK))

    def text_of(self, id: int) -> str:
        """Return the text of one token, empty for an id outside the vocabulary."""
        return self._codec.decode((id,))

    def parse(
        self, completion_ids: Ids, finish: Finish, prompt: Ids = (), tools: Sequence[ToolLike] = ()
    ) -> AssistantMessage:
        """Read the message that sampled ids say.

        It has the text, and tool calls with status and token span (T7). Never raises.

        Args:
            completion_ids: what was sampled.
            finish: how its sampling ended.
            prompt: what it answers.
            tools: what it may call. Formats without types need their schemas.
        """
        ids = completion_ids[:-1] if completion_ids and completion_ids[-1] in self.stop_ids else completion_ids
        text = self._codec.decode(ids)
        opened = self.opens_thought(prompt)
        blocks = blocks_of(text, self.tool_format, schemas_of(tools), thinking=opened)
        spans = self._codec.token_spans(ids, [(b.start, b.end) for b in blocks]) if blocks else []
        message = message_of(text, finish, blocks, spans, self.tool_format)
        return replace(message, in_thought=True) if opened else message

    # ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_ids(self) -> None:
        rows = [*self.facts.head, said(MARK), {"role": "user", "content": " two\n\n lines "}]
        text = self.template.render(rows, generate=True)
        ids = self._codec.encode_rendered(text, {})
        if ids != self._codec.encode_whole(text):
            raise TemplateError(
                "T2: this tokenizer encodes text depending on what precedes it (a prefix-space rule), "
                'so appended ids would differ from a whole rendering: set "prepend_scheme": "never" in '
                "tokenizer.json or use a byte-level tokenizer"
            )
        ends = self._codec.encode_rendered(text.rpartition("lines")[2], {})
        self._separates = any(i in self._codec.framing_ids for i in ends)


def end_ids(model: Path) -> tuple[int, ...]:
    """Read the ids that end a turn from a model's ``generation_config.json``, where it has one.

    Raises ModelError for a file that cannot be read.
    """
    file = model / "generation_config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    found = () if given is None else tuple(given) if isinstance(given, list) else (given,)
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in found):
        raise ModelError(f"{file}: eos_token_id is {given!r}: it must be a token id or a list of them")
    return found


def _schema(tool: ToolLike) -> dict[str, Any]:
    parameters = dict(tool.parameters)
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }
