"""A tokenizer's chat template: its rendering, with the user's variables, and the variables that it reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
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

    source: str
    """The template itself. Of several, the one for tools: a conversation must not begin in one and go on in another."""
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
        self.source = _one_of(tokenizer.chat_template)
        special = set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) | set(tokenizer.special_tokens_map)
        read = _undeclared(self.source)
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
                [dict(r) for r in rows],
                chat_template=self.source,
                tools=tools,
                tokenize=False,
                add_generation_prompt=generate,
                **self.variables,
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


def _one_of(given: object) -> str:
    if not isinstance(given, Mapping):
        return str(given)
    for name in ("tool_use", "default"):
        if name in given:
            return str(given[name])
    raise TemplateError(
        f"the tokenizer has the chat templates {', '.join(map(str, given))}, and none is called default: save it with "
        "the one to use"
    )


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

    Jinja also reports a name that is set inside a branch or a loop. Such a name is the template's own where it is set
    before it is used.
    """
    try:
        tree = _JINJA.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error
    first: dict[str, str] = {}
    for name, use in _uses(tree, frozenset()):
        first.setdefault(name, use)
    return {name for name in jinja2.meta.find_undeclared_variables(tree) if first.get(name) == "load"}


def _uses(node: jinja2.nodes.Node, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield each name in the order in which it is used, with ``load`` or ``store``. ``own`` are a macro's arguments."""
    if isinstance(node, jinja2.nodes.Name):
        if node.name not in own:
            yield node.name, node.ctx
        return
    children = list(node.iter_child_nodes())
    match node:
        case jinja2.nodes.Assign():
            children = [node.node, node.target]
        case jinja2.nodes.For():
            children.remove(node.iter)
            children.insert(0, node.iter)
        case jinja2.nodes.Macro() | jinja2.nodes.CallBlock():
            own |= {argument.name for argument in node.args}
    for child in children:
        yield from _uses(child, own)
