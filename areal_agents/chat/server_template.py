"""The chat template with which another server renders a conversation as ``ChatFormat`` does.

    OpenAI messages ──prelude──▶ the rows that ChatFormat gives its template ──the tokenizer's own template──▶ text

The prelude puts tool calls back into the assistant's text, in the model's own tool format (``chat/server_calls.py``).
It puts tools into the system message where the tokenizer's template ignores them (the first user message where it knows
no system role), and results into user messages where it does not know the role ``tool``. It sets the user's variables
of the template. The text between two calls is lost in any OpenAI message.

Not covered: a control token's text inside content. ``ChatFormat`` keeps it plain text (``chat/token_codec.py``). A
server encodes the whole rendering at once, and takes it for the token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.server_calls import calls_of
from areal_agents.errors import TemplateError

# Names start with areal_: the template that follows may use any other. `-` at both ends of every tag: no white space of
# the prelude is written. The last tag has none at its end: the one newline after it goes with trim_blocks, as set by
# transformers and every server that uses it, and the template begins at the start of a line, as it did.
_ROWS = """\
{%- set areal_ns = namespace(rows=[], joined=false, text='', tools=[], section='') -%}
{%- for areal_m in messages -%}
  {%- set areal_ns.text = areal_m['content'] if areal_m['content'] is string else '' -%}
  {%- for areal_call in areal_m['tool_calls'] or [] if areal_m['role'] == 'assistant' -%}
    {%- set areal_f = areal_call['function'] -%}
    {%- set areal_args = areal_f['arguments'] or {} -%}
    {%- set areal_args = areal_args if areal_args is string else areal_args | tojson -%}
CALL  {%- endfor -%}
  {%- if areal_m['role'] == 'tool' and WRAP -%}
    {%- set areal_ns.text = '<tool_response>\\n' ~ areal_ns.text ~ '\\n</tool_response>' -%}
    {%- if areal_ns.joined -%}
      {%- set areal_ns.text = areal_ns.rows[-1]['content'] ~ '\\n' ~ areal_ns.text -%}
      {%- set areal_ns.rows = areal_ns.rows[:-1] -%}
    {%- endif -%}
    {%- set areal_ns.rows = areal_ns.rows + [{'role': 'user', 'content': areal_ns.text}] -%}
    {%- set areal_ns.joined = true -%}
  {%- else -%}
    {%- set areal_row = {'role': areal_m['role'], 'content': areal_ns.text} -%}
    {%- if areal_m['tool_call_id'] and areal_m['role'] != 'assistant' -%}
      {%- set areal_row = dict(areal_row, tool_call_id=areal_m['tool_call_id']) -%}
    {%- endif -%}
    {%- if areal_m['name'] and areal_m['role'] != 'assistant' -%}
      {%- set areal_row = dict(areal_row, name=areal_m['name']) -%}
    {%- endif -%}
    {%- set areal_ns.rows = areal_ns.rows + [areal_row] -%}
    {%- set areal_ns.joined = false -%}
  {%- endif -%}
{%- endfor -%}
{%- for areal_tool in tools or [] -%}
  {%- set areal_f = areal_tool['function'] -%}
  {%- set areal_f = {'name': areal_f['name'], 'description': areal_f['description'] or '',
      'parameters': areal_f['parameters'] or {'type': 'object', 'properties': {}}} -%}
  {%- set areal_ns.tools = areal_ns.tools + [{'type': 'function', 'function': areal_f}] -%}
  {%- set areal_ns.section = areal_ns.section ~ (areal_f | tojson) ~ '\\n' -%}
{%- endfor -%}
"""
_SECTION = """\
{%- if areal_ns.tools -%}
  {%- set areal_ns.section = '<tools>\\n' ~ areal_ns.section
      ~ '</tools>\\nTo call a tool, write ' ~ USAGE -%}
{%- endif -%}
{%- set tools = none -%}
"""
# For a template that shows a system message.
_IN_SYSTEM = """\
{%- if areal_ns.section -%}
  {%- if areal_ns.rows and areal_ns.rows[0]['role'] == 'system' -%}
    {%- set areal_row = dict(areal_ns.rows[0], content=areal_ns.rows[0]['content'] ~ '\\n\\n' ~ areal_ns.section) -%}
    {%- set areal_ns.rows = [areal_row] + areal_ns.rows[1:] -%}
  {%- else -%}
    {%- set areal_ns.rows = [{'role': 'system', 'content': areal_ns.section}] + areal_ns.rows -%}
  {%- endif -%}
{%- endif -%}
"""
# For a template that shows none.
_IN_USER = """\
{%- set areal_given = areal_ns.rows -%}
{%- set areal_ns.rows = [] -%}
{%- set areal_ns.text = '' -%}
{%- for areal_m in areal_given -%}
  {%- if areal_m['role'] == 'system' -%}
    {%- if not MERGE -%}{{- raise_exception('This model knows no system message') -}}{%- endif -%}
    {%- set areal_ns.text = areal_ns.text ~ areal_m['content'] ~ '\\n\\n' -%}
  {%- elif areal_m['role'] == 'user' -%}
    {%- set areal_ns.text = areal_ns.text ~ (areal_ns.section ~ '\\n\\n' if areal_ns.section else '') -%}
    {%- set areal_ns.rows = areal_ns.rows + [dict(areal_m, content=areal_ns.text ~ areal_m['content'])] -%}
    {%- set areal_ns.text = '' -%}
    {%- set areal_ns.section = '' -%}
  {%- else -%}
    {%- set areal_ns.rows = areal_ns.rows + [areal_m] -%}
  {%- endif -%}
{%- endfor -%}
{%- set areal_ns.text = areal_ns.text ~ areal_ns.section -%}
{%- if areal_ns.text -%}
  {%- set areal_ns.rows = areal_ns.rows + [{'role': 'user', 'content': areal_ns.text.removesuffix('\\n\\n')}] -%}
{%- endif -%}
"""
_ALTERNATING = """\
{%- set areal_given = areal_ns.rows -%}
{%- set areal_ns.rows = [] -%}
{%- for areal_m in areal_given -%}
  {%- if areal_ns.rows and areal_m['role'] == 'user' and areal_ns.rows[-1]['role'] == 'user' -%}
    {%- set areal_ns.text = areal_ns.rows[-1]['content'] ~ '\\n\\n' ~ areal_m['content'] -%}
    {%- set areal_ns.rows = areal_ns.rows[:-1] + [dict(areal_ns.rows[-1], content=areal_ns.text)] -%}
  {%- else -%}
    {%- set areal_ns.rows = areal_ns.rows + [areal_m] -%}
  {%- endif -%}
{%- endfor -%}
"""
_TOOLS = "{%- set tools = areal_ns.tools if areal_ns.tools else none -%}\n{%- set areal_ns.section = '' -%}\n"
_MESSAGES = "{%- set messages = areal_ns.rows %}\n"


def served_template(fmt: ChatFormat) -> str:
    """Build the Jinja chat template with which a server's ids, with tools, are those of ``fmt.first_prompt``.

    Raises TemplateError for a variable of the template whose value Jinja cannot write.
    """
    prelude = _ROWS + (_TOOLS if fmt.renders_tools else _SECTION)
    prelude += _IN_USER if fmt.facts.system_refusal else _IN_SYSTEM
    prelude += _ALTERNATING if fmt.facts.alternates else ""
    prelude = prelude.replace("WRAP", _literal(not fmt.accepts_tool_role)).replace("MERGE", _literal(fmt.merge_system))
    macros, call = calls_of(fmt.tool_format)
    prelude = macros + prelude.replace("CALL", call).replace("USAGE", _literal(fmt.tool_format.usage))
    variables = "".join(f"{{%- set {name} = {_literal(v)} -%}}\n" for name, v in fmt.template.variables.items())
    return prelude + variables + _MESSAGES + fmt.template.source


def _literal(value: Any) -> str:
    """Write a value as Jinja does.

    Raises TemplateError for one that Jinja has no literal for.
    """
    match value:
        case None | bool():
            return str(value).lower()
        case int() | float():
            return f"({value!r})"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list() | tuple():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case Mapping():
            return "{" + ", ".join(f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    raise TemplateError(f"model.template_variables: {value!r} of type {type(value).__name__} has no Jinja literal")
