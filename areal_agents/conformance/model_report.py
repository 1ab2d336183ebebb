"""What a model's tokenizer, chat template and configuration are like, and whether it can be trained.

    folder ─▶ ChatFormat (T1, T2, T4) ─▶ a rehearsed episode of two tool calls ─▶ the engine's own look ─▶ ModelReport

A problem is what training would refuse the model for. A note is what somebody who trains it should know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_agents.chat.options import ChatOptions
from areal_agents.chat.thinking import UNTHINK
from areal_agents.engine_kind import KindName, engine_kind
from areal_agents.errors import ArealError, ModelError, TemplateError
from areal_agents.models import resolve
from areal_agents.settings.config import ModelConfig
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion, Ids, Message, system, tool_result, user


@dataclass
class ModelReport:
    """What was found out about one model."""

    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    """By name: plain values. Empty where the chat format was refused."""
    rules: dict[str, str] = field(default_factory=dict)
    """T1 to T4 and T7: how each is kept."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why training would be refused."""

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return ``{"model", "passed", FACT…, "rules", "notes", "problems"}``."""
        tail = {"rules": self.rules, "notes": self.notes, "problems": self.problems}
        return {"model": self.model, "passed": self.passed, **self.facts, **tail}

    def __str__(self) -> str:
        lines = [f"{self.model}: {'can be trained' if self.passed else 'CANNOT be trained'}"]
        lines += [f"  {name.replace('_', ' '):<20} {_words(value)}" for name, value in self.facts.items()]
        lines += [f"  {rule:<20} {text}" for rule, text in self.rules.items()]
        lines += [f"  note: {text}" for text in self.notes]
        lines += [f"  PROBLEM: {text}" for text in self.problems]
        return "\n".join(lines)


def check_model(model: str | Path, options: ChatOptions | None = None, *, engine: KindName) -> ModelReport:
    """Look at a model as training would.

    Args:
        model: a folder, or a name as ``model.path`` takes it. A folder without ``config.json`` is a tokenizer alone.
        options: the choices of ``[model]``.
        engine: the engine that would sample.

    Raises nothing: what is wrong stands in the report.
    """
    report = ModelReport(str(model))
    options = options or ChatOptions()
    folder = Path(model)
    if not folder.is_dir() or (folder / "config.json").exists():
        try:
            folder = resolve(str(model))
        except ModelError as error:
            report.problems.append(str(error))
            if not folder.is_dir():
                return report
    try:
        _look_at_format(folder, options, report)
    except (TemplateError, ModelError) as error:
        report.problems.append(str(error))
    _look_at_engine(folder, engine, report)
    return report


def _look_at_format(folder: Path, options: ChatOptions, report: ModelReport) -> None:
    from areal_agents.chat.format import ChatFormat, end_ids  # transformers is heavy

    form = ChatFormat.load(folder, options)
    facts, template = form.facts, form.template
    named = end_ids(folder)
    eos = form.tokenizer.eos_token_id
    sources: dict[int, list[str]] = {i: [] for i in form.stop_ids}
    sources[form.turn_end].append("the template's end of a turn")
    if eos is not None:
        sources[int(eos)].append("the tokenizer's eos")
    for i in named:
        sources[i].append("generation_config.json")
    report.facts = {
        "tool_format": form.tool_format.name,
        "tools_shown": "by the template" if form.renders_tools else f"in the {_place(form)}",
        "history": form.history,
        "thinking": _thinking(form, options),
        "stop_ids": [{"id": i, "text": form.text_of(i), "from": "; ".join(sources[i])} for i in form.stop_ids],
        "generation_prompt": facts.generation,
        "system_role": not facts.system_refusal,
        "tool_role": facts.tool_role,
        "template_variables": {"reads": list(template.reads), "set": dict(template.variables)},
    }
    report.notes += _notes(form, options)
    _rehearse(form, report)
    report.rules = _rules(form)


def _place(form: Any) -> str:
    return "first user message" if form.facts.system_refusal else "system message"


def _thinking(form: Any, options: ChatOptions) -> dict[str, Any]:
    """Say what the first prompt does about thoughts, and which variables of the template change that."""
    from areal_agents.chat.format import ChatFormat

    switches: dict[str, Any] = {}
    for name in form.template.reads:
        if "think" not in name.lower():
            continue
        found = {}
        for value in (True, False):
            variables = {**options.template_variables, name: value}
            try:
                other = ChatFormat(form.tokenizer, tool_format=options.tool_format, template_variables=variables)
                found[str(value).lower()] = _first_thought(other)
            except TemplateError as error:
                found[str(value).lower()] = f"refused: {error}"
        switches[name] = found
    return {"first_prompt": _first_thought(form), "switches": switches}


def _first_thought(form: Any) -> str:
    return _thought_at_end(form, form.first_prompt([user("U.")]))


def _thought_at_end(form: Any, prompt: Ids) -> str:
    """Say ``opens``, ``empty`` or ``none``: what the end of a prompt writes of a thought."""
    if form.opens_thought(prompt):
        return "opens"
    return "empty" if form.tokenizer.decode(list(prompt[-64:])).rstrip().endswith(UNTHINK) else "none"


def _notes(form: Any, options: ChatOptions) -> list[str]:
    facts, template = form.facts, form.template
    notes = []
    if facts.rewrites:
        kept = "" if form.history == "template" else ', which model.history = "append" does not follow'
        notes.append(f"the template renders {facts.rewrites} anew once more messages follow{kept}")
    if form.history == "template":
        notes.append('each turn is a sample of its own, with a whole prompt: model.history = "append" is cheaper')
    if facts.moves_tools and form.history == "append":
        notes.append("the template moves its list of tools to later user messages: the first message has one instead")
    if facts.system_refusal:
        remedy = "is merged into the first user message" if options.merge_system else (
            "is refused; model.merge_system = true puts it into the first user message"
        )  # fmt: skip
        notes.append(f"no system role ({facts.system_refusal}): an environment's system message {remedy}")
    if not facts.tool_role:
        notes.append("no role for tool results: they travel in a user message")
    if template.lacks:
        notes.append(f"the template reads {', '.join(template.lacks)}, which the tokenizer does not have")
    if "strftime_now" in template.source:
        notes.append("the template writes today's date: prompts differ from day to day")
    unknown = [i for i in form.stop_ids if not form.text_of(i)]
    if unknown:
        notes.append(f"the tokenizer has no token for the end ids {unknown}")
    return notes


def _rules(form: Any) -> dict[str, str]:
    exact = form.history == "append"
    end = form.text_of(form.turn_end)
    others = [form.text_of(i) for i in form.stop_ids if i != form.turn_end]
    return {
        "T1": "the next prompt is the last one, the sampled tokens and the new messages"
        if exact
        else "each prompt is rendered whole, and each turn is a sample of its own",
        "T2": "what follows a turn is what the template writes there, encoded as in a whole conversation",
        "T3": "log-probabilities are those of the sampled tokens, from the engine",
        "T4": f"{end!r} ends a turn, and follows where a turn was cut"
        + (f" or ended with {', '.join(map(repr, others))}" if others else ""),
        "T7": f"calls are told, written and read as {form.tool_format.name}: {form.tool_format.usage!r}",
    }


def _rehearse(form: Any, report: ModelReport) -> None:
    """Play two tool calls through the format, and note what the token rules are broken by."""
    from areal_agents.chat.conversation import Conversation
    from areal_agents.chat.toolcalls import write_block

    tool = ToolSpec("look", "Look at something.", {"type": "object", "properties": {"at": {"type": "string"}}})
    opening: list[Message] = [user("Look at both.")]
    if not form.facts.system_refusal or form.merge_system:
        opening.insert(0, system("Be brief."))
    talk = Conversation(form, opening, [tool])
    for k, place in enumerate(("left", "right")):
        before = talk.prompt.ids
        ids = form.encode_turn(write_block("look", json.dumps({"at": place})), [tool], before)
        message = talk.add_completion(Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop"))
        if [(c.name, c.status, dict(c.arguments)) for c in message.tool_calls] != [("look", "ok", {"at": place})]:
            report.problems.append(f"T7: the call {message.text!r} is not read back as it was written")
            return
        talk.add_observation([tool_result(f"seen {place}", call=message.tool_calls[0])])
        report.facts["thinking"]["after_a_result"] = _thought_at_end(form, talk.prompt.ids)
        if form.history == "append" and talk.prompt.ids[: len(before) + len(ids)] != before + ids:
            report.problems.append(f"T1: prompt {k + 2} does not extend the one before it")
        if f"seen {place}" not in form.tokenizer.decode(list(talk.prompt.ids)):
            report.problems.append(f"T2: the result of call {k + 1} is not in the next prompt")


def _look_at_engine(folder: Path, engine: KindName, report: ModelReport) -> None:
    if not (folder / "config.json").exists():
        report.notes.append("there is no config.json: the tokenizer alone was looked at, not the model")
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        report.facts["family"] = str(config.get("model_type", "")) if isinstance(config, dict) else ""
        engine_kind(engine).prepare(folder, ModelConfig().max_context)
    except (ArealError, OSError, ValueError) as error:
        report.problems.append(f"engine.kind = {engine!r}: {error}")


def _words(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return value if value.isprintable() and value else repr(value)
        case [*items]:
            return ", ".join(map(_words, items)) or "none"
        case {"id": i, "text": text, "from": source}:
            return f"{i} {text!r} ({source})"
        case dict():
            return "; ".join(f"{k}: {_words(v)}" for k, v in value.items()) or "none"
    return str(value)
