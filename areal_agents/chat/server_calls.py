"""How each tool format writes a server's calls, as Jinja for ``chat/server_template.py``.

Each piece stands in a loop over the calls of one message, and adds to ``areal_ns.text``. ``areal_f`` is a call's
function, and ``areal_args`` its arguments as JSON text. It writes what ``ToolFormat.write_message`` does.
"""

from __future__ import annotations

from areal_agents.chat.tool_formats import deepseek, gemma, glm, hermes, llama_json, mistral, pythonic, qwen_xml
from areal_agents.chat.tool_formats.base import ToolFormat

# Formats that write single values need the object. vLLM and others give it to the template.
_OBJECT = """\
    {%- if areal_f['arguments'] is string and areal_f['arguments'].strip() not in ('', '{}') -%}
      {{- raise_exception('the arguments of a call must be an object') -}}
    {%- endif -%}
    {%- set areal_given = {} if areal_f['arguments'] is string else areal_f['arguments'] or {} -%}
"""
_PYTHON = """\
{%- macro areal_python(areal_v) -%}
  {%- if areal_v is string -%}{{- areal_v | tojson -}}
  {%- elif areal_v is mapping -%}
    {{- '{' -}}
    {%- for areal_k in areal_v -%}
      {{- (', ' if not loop.first else '') ~ (areal_k | tojson) ~ ': ' ~ areal_python(areal_v[areal_k]) -}}
    {%- endfor -%}
    {{- '}' -}}
  {%- elif areal_v is sequence -%}
    {{- '[' -}}
    {%- for areal_item in areal_v -%}{{- (', ' if not loop.first else '') ~ areal_python(areal_item) -}}{%- endfor -%}
    {{- ']' -}}
  {%- else -%}{{- areal_v ~ '' -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro areal_written(areal_name, areal_given) -%}
  {{- areal_name ~ '(' -}}
  {%- for areal_k in areal_given -%}
    {{- (', ' if not loop.first else '') ~ areal_k ~ '=' ~ areal_python(areal_given[areal_k]) -}}
  {%- endfor -%}
  {{- ')' -}}
{%- endmacro -%}
"""
_SPEAKS = "{%- set areal_speaks = areal_ns.text.split('</think>')[-1].strip() != '' -%}\n"


def _add(expression: str) -> str:
    return f"    {{%- set areal_ns.text = areal_ns.text ~ {expression} -%}}\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _tags(separator: str, opening: str, closing: str, tool_call: str, value: str) -> str:
    """Return the piece of a format with one pair of tags a parameter."""
    loop = "    {%- for areal_k in areal_given -%}\n    {%- set areal_v = areal_given[areal_k] -%}\n"
    parameter = _add(value)
    first = _add(f"('' if loop.first else {_quoted(separator)}) ~ {opening}")
    return _OBJECT + first + loop + parameter + "    {%- endfor -%}\n" + _add(closing or tool_call)


def calls_of(form: ToolFormat) -> tuple[str, str]:
    """Return the Jinja that comes before the messages, and the piece for one call."""
    rstrip = "    {%- if loop.first -%}{%- set areal_ns.text = areal_ns.text.rstrip() -%}{%- endif -%}\n"
    nl = "\\n"
    match form:
        case hermes.Hermes():
            line = nl if form.lines else ""
            return "", _add(
                f"('' if loop.first else '{nl}') ~ '{hermes.OPEN}{line}{{\"name\": ' ~ (areal_f['name'] | tojson)"
                f" ~ ', \"arguments\": ' ~ areal_args ~ '}}{line}{hermes.CLOSE}'"
            )
        case qwen_xml.QwenXml():
            listed = "areal_v is mapping or (areal_v is sequence and areal_v is not string)"
            shown = f"(areal_v | tojson if {listed} else areal_v ~ '')"
            return "", _tags(
                "\n",
                f"'{qwen_xml.OPEN}{nl}{qwen_xml.FUNCTION}' ~ areal_f['name'] ~ '>{nl}'",
                f"'{qwen_xml.UNFUNCTION}{nl}{qwen_xml.CLOSE}'",
                "",
                f"'{qwen_xml.PARAMETER}' ~ areal_k ~ '>{nl}' ~ {shown} ~ '{nl}{qwen_xml.UNPARAMETER}{nl}'",
            )
        case glm.Glm():
            line = nl if form.lines else ""
            return "", _tags(
                "\n",
                f"'{glm.OPEN}' ~ areal_f['name'] ~ '{line}'",
                f"'{glm.CLOSE}'",
                "",
                f"'{glm.KEY}' ~ areal_k ~ '{glm.UNKEY}{line}{glm.VALUE}'"
                f" ~ (areal_v if areal_v is string else areal_v | tojson) ~ '{glm.UNVALUE}{line}'",
            )
        case mistral.MistralArgs():
            return "", rstrip + _add(f"'{mistral.OPEN}' ~ areal_f['name'] ~ '{mistral.ARGS}' ~ areal_args")
        case mistral.Mistral():
            return "", rstrip + _add(
                f"('{mistral.OPEN}[' if loop.first else ', ') ~ '{{\"name\": ' ~ (areal_f['name'] | tojson)"
                " ~ ', \"arguments\": ' ~ areal_args ~ '}' ~ (']' if loop.last else '')"
            )
        case deepseek.DeepSeek():
            head = "" if isinstance(form, deepseek.DeepSeekV31) else f"function{deepseek.SEP}"
            fence = "" if isinstance(form, deepseek.DeepSeekV31) else deepseek.FENCE
            before = f"{nl}{fence}json{nl}" if fence else deepseek.SEP
            after = f"{nl}{fence}" if fence else ""
            return "", rstrip + _add(
                f"('{deepseek.BEGIN}' if loop.first else {_quoted(form.between)}) ~ '{deepseek.OPEN}{head}'"
                f" ~ areal_f['name'] ~ '{before}' ~ areal_args ~ '{after}{deepseek.CLOSE}'"
                f" ~ ('{deepseek.END}' if loop.last else '')"
            )
        case llama_json.LlamaJson():
            return "", rstrip + "    {%- if loop.first -%}" + _SPEAKS + "{%- set areal_ns.text = areal_ns.text ~ (" + (
                f"'{llama_json.TAG}' if areal_speaks else '') -%}}{{%- endif -%}}\n"
            ) + _add(
                "('' if loop.first else '; ') ~ '{\"name\": ' ~ (areal_f['name'] | tojson)"
                " ~ ', \"parameters\": ' ~ areal_args ~ '}'"
            )
        case pythonic.Pythonic():
            return _PYTHON, rstrip + _OBJECT + "    {%- if loop.first -%}" + _SPEAKS + (
                "{%- set areal_ns.joined = areal_speaks -%}{%- endif -%}\n"
            ) + _add(
                f"(('{llama_json.START}' if areal_ns.joined else '') ~ '[' if loop.first else ', ')"
                " ~ areal_written(areal_f['name'], areal_given)"
                f" ~ (']' ~ ('{llama_json.END}' if areal_ns.joined else '') if loop.last else '')"
            )
        case gemma.Gemma():
            return _PYTHON, _OBJECT + _add(
                f"('' if loop.first else '{nl}') ~ '{gemma.FENCE}tool_code{nl}'"
                f" ~ areal_written(areal_f['name'], areal_given) ~ '{nl}{gemma.FENCE}'"
            )
    raise AssertionError(form.name)
