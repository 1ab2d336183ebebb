"""A tokenizer's chat template: its rendering, with the user's variables, and the variables that it reads."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from areal_agents.errors import TemplateError

# What a rendering is given in any case, so nobody may set it.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """The chat template of a tokenizer, with the values that the user gave its variables."""

    variables: Mapping[str, Any]
    """What the user set."""
    reads: tuple[str, ...]
    """The variables that a user may set, sorted."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None) -> None:
        """Read the template.

        Raises TemplateError where there is none, where it is no Jinja, or where it reads no variable of that name.
        """
        if not tokenizer.chat_template:
            raise TemplateError("the tokenizer has no chat template: use an instruction-tuned model or set one")
        self._tokenizer = tokenizer
        given = tokenizer.chat_template
        self.sources: tuple[str, ...] = tuple(given.values()) if isinstance(given, Mapping) else (str(given),)
        special = set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) | set(tokenizer.special_tokens_map)
        read = {name for source in self.sources for name in _undeclared(source)}
        self.lacks = sorted(name for name in read & special if name not in tokenizer.special_tokens_map)
        """Special tokens that the template reads and the tokenizer does not have."""
        self.reads = tuple(sorted(read - special - set(_GIVEN)))
        self.variables = dict(variables or {})
        for name in self.variables:
            self._require_read(name)

    def render(self, rows: Sequence[Mapping[str, Any]], *, tools: Any = None, generate: bool = False) -> str:
        """Render a conversation to text.

        Args:
            rows: the messages, each with ``role`` and ``content``.
            tools: their JSON schemas, or None.
            generate: whether the generation prompt follows.

        Raises:
            TemplateError: with the template's own reason and the remedy.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(r) for r in rows], tools=tools, tokenize=False, add_generation_prompt=generate, **self.variables
            )
        except _ERRORS as error:
            roles = " ".join(str(r["role"]) for r in rows)
            lacks = f" (the tokenizer has no {' and no '.join(self.lacks)}: set it)" if self.lacks else ""
            raise TemplateError(
                f"the chat template cannot render the roles [{roles}]: {error}{lacks}. Use a template that accepts "
                "them, or change the environment's messages"
            ) from error
        return str(text)

    def _require_read(self, name: str) -> None:
        if name in self.reads:
            return
        near = difflib.get_close_matches(name, self.reads, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        known = f"it reads {', '.join(self.reads)}" if self.reads else "it reads none"
        raise TemplateError(f"model.template_variables.{name}: the chat template reads no such variable: {hint}{known}")


class _Generation(jinja2.ext.Extension):
    """The tag ``generation`` of transformers, which marks the assistant's text and writes nothing itself."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_JINJA = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_JINJA.globals |= {"raise_exception": None, "strftime_now": None}  # functions that transformers gives every template


def _undeclared(source: str) -> set[str]:
    """Return the names that a template takes from outside.

    Jinja also reports a name that is first set inside a branch or a loop. Such a name is the template's own unless it
    asks whether the name is defined.
    """
    try:
        tree = _JINJA.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error
    names = list(tree.find_all(jinja2.nodes.Name))
    own = {n.name for n in names if n.ctx != "load"}
    asked = set(_asked(tree)) - {n for m in tree.find_all(jinja2.nodes.Macro) for n in _asked(m) if n in _arguments(m)}
    return {name for name in jinja2.meta.find_undeclared_variables(tree) if name not in own or name in asked}


def _asked(tree: jinja2.nodes.Node) -> list[str]:
    """Return the names in ``tree`` that are asked whether they are defined."""
    return [
        test.node.name
        for test in tree.find_all(jinja2.nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, jinja2.nodes.Name)
    ]


def _arguments(macro: jinja2.nodes.Macro) -> set[str]:
    return {argument.name for argument in macro.args}
