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
# A list of calls follows the text at once, without white space between.
_RSTRIP = "    {%- if loop.first -%}{%- set areal_ns.text = areal_ns.text.rstrip() -%}{%- endif -%}\n"
# Whether anything but thoughts stands before the first call, kept in a flag that is free at this place.
_SPEAKS = """\
    {%- if loop.first -%}
      {%- set areal_ns.joined = areal_ns.text.split('</think>')[-1].strip() != '' -%}
    {%- endif -%}
"""
_NAME, _QUOTED = "areal_f['name']", "(areal_f['name'] | tojson)"


def calls_of(form: ToolFormat) -> tuple[str, str]:
    """Return the Jinja that comes before the messages, and the piece for one call."""
    match form:
        case hermes.Hermes():
            return "", _hermes(form)
        case qwen_xml.QwenXml():
            return "", _qwen_xml()
        case glm.Glm():
            return "", _glm(form)
        case mistral.MistralArgs():
            return "", _RSTRIP + _add(_text(mistral.OPEN), _NAME, _text(mistral.ARGS), "areal_args")
        case mistral.Mistral():
            return "", _RSTRIP + _add(
                _at_first(mistral.OPEN + "[", ", "), _json_call("arguments"), "(']' if loop.last else '')"
            )
        case deepseek.DeepSeek():
            return "", _deepseek(form)
        case llama_json.LlamaJson():
            tag = f"({_text(llama_json.TAG)} if areal_ns.joined else '')"
            return "", _RSTRIP + _SPEAKS + _add(f"({tag} if loop.first else '; ')", _json_call("parameters"))
        case pythonic.Pythonic():
            return _PYTHON, _pythonic()
        case gemma.Gemma():
            call = f"areal_written({_NAME}, areal_given)"
            fence = f"{gemma.FENCE}tool_code\n"
            return _PYTHON, _OBJECT + _add(_at_first(fence, f"\n{fence}"), call, _text(f"\n{gemma.FENCE}"))
    raise AssertionError(f"the tool format {form.name} has no Jinja")


def _hermes(form: hermes.Hermes) -> str:
    line = "\n" if form.lines else ""
    opening = hermes.OPEN + line
    return _add(_at_first(opening, "\n" + opening), _json_call("arguments"), _text(line + hermes.CLOSE))


def _qwen_xml() -> str:
    opening = f"{qwen_xml.OPEN}\n{qwen_xml.FUNCTION}"
    listed = "areal_v is mapping or (areal_v is sequence and areal_v is not string)"
    parameter = _add(
        _text(qwen_xml.PARAMETER), "areal_k", _text(">\n"), f"(areal_v | tojson if {listed} else areal_v ~ '')",
        _text(f"\n{qwen_xml.UNPARAMETER}\n"),
    )  # fmt: skip
    closing = f"{qwen_xml.UNFUNCTION}\n{qwen_xml.CLOSE}"
    return _tags(_add(_at_first(opening, "\n" + opening), _NAME, _text(">\n")), parameter, closing)


def _glm(form: glm.Glm) -> str:
    line = "\n" if form.lines else ""
    parameter = _add(
        _text(glm.KEY), "areal_k", _text(glm.UNKEY + line + glm.VALUE),
        "(areal_v if areal_v is string else areal_v | tojson)", _text(glm.UNVALUE + line),
    )  # fmt: skip
    return _tags(_add(_at_first(glm.OPEN, "\n" + glm.OPEN), _NAME, _text(line)), parameter, glm.CLOSE)


def _deepseek(form: deepseek.DeepSeek) -> str:
    plain = isinstance(form, deepseek.DeepSeekV31)
    opening = deepseek.OPEN + ("" if plain else f"function{deepseek.SEP}")
    before = deepseek.SEP if plain else f"\n{deepseek.FENCE}json\n"
    after = ("" if plain else f"\n{deepseek.FENCE}") + deepseek.CLOSE
    end = f"({_text(deepseek.END)} if loop.last else '')"
    first = _at_first(deepseek.BEGIN + opening, form.between + opening)
    return _RSTRIP + _add(first, _NAME, _text(before), "areal_args", _text(after), end)


def _pythonic() -> str:
    opened = f"({_text(llama_json.START)} if areal_ns.joined else '')"
    closed = f"({_text(llama_json.END)} if areal_ns.joined else '')"
    first = f"({opened} ~ '[' if loop.first else ', ')"
    last = f"(']' ~ {closed} if loop.last else '')"
    return _RSTRIP + _OBJECT + _SPEAKS + _add(first, f"areal_written({_NAME}, areal_given)", last)


def _tags(opening: str, parameter: str, closing: str) -> str:
    """Return the piece of a format with a pair of tags for each parameter."""
    loop = "    {%- for areal_k in areal_given -%}\n    {%- set areal_v = areal_given[areal_k] -%}\n"
    return _OBJECT + opening + loop + parameter + "    {%- endfor -%}\n" + _add(_text(closing))


def _add(*parts: str) -> str:
    return f"    {{%- set areal_ns.text = areal_ns.text ~ {' ~ '.join(parts)} -%}}\n"


def _at_first(first: str, later: str) -> str:
    return f"({_text(first)} if loop.first else {_text(later)})"


def _json_call(key: str) -> str:
    parts = [_text('{"name": '), _QUOTED, _text(f', "{key}": '), "areal_args", _text("}")]
    return " ~ ".join(parts)


def _text(text: str) -> str:
    """Write a Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
