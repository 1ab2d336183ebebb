"""`areal-agents check --model`: what it reports, and what it calls a problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.options import ChatOptions
from areal_agents.cli.main import main
from areal_agents.conformance.model_report import ModelReport, check_model
from tests import tiny_tokenizer as tiny_
from tests.tiny_models import save_tiny, tiny_chat_model, tiny_model
from tests.tiny_tokenizer import tiny


def looked_at(folder: Path, template: str, **options: Any) -> ModelReport:
    """The report of a tokenizer alone."""
    tiny(template).save_pretrained(folder)
    return check_model(folder, ChatOptions(**options), engine="transformers")


def test_a_model_that_can_be_trained(tmp_path: Path) -> None:
    report = check_model(tiny_chat_model(tmp_path), engine="transformers")
    assert (report.passed, report.problems, report.notes) == (True, [], [])
    facts = report.facts
    end = tiny().eos_token_id
    assert (facts["history"], facts["family"], facts["system_role"], facts["tool_role"]) == (
        "append", "llama", True, True,
    )  # fmt: skip
    assert facts["stop_ids"] == [
        {
            "id": end,
            "text": "<|im_end|>",
            "from": "the template's end of a turn; the tokenizer's eos; generation_config.json",
        }
    ]
    assert facts["thinking"] == {"first_prompt": "none", "switches": {}, "after_a_result": "none"}
    assert facts["tool_format"] == "hermes"
    assert facts["tools_shown"] == "in the system message"
    assert sorted(report.rules) == ["T1", "T2", "T3", "T4", "T7"]
    assert json.loads(json.dumps(report.to_json()))["passed"] is True
    assert str(report).startswith(f"{tmp_path}: can be trained\n")


def test_what_a_thinking_model_is_told(tmp_path: Path) -> None:
    facts = looked_at(tmp_path, tiny_.SWITCH).facts
    assert facts["thinking"] == {
        "first_prompt": "none",
        "switches": {"enable_thinking": {"true": "none", "false": "empty"}},
        "after_a_result": "none",
    }
    assert facts["template_variables"] == {"reads": ["enable_thinking"], "set": {}}
    off = looked_at(tmp_path, tiny_.SWITCH, template_variables={"enable_thinking": False}).facts
    assert off["thinking"]["first_prompt"] == "empty"
    assert off["template_variables"]["set"] == {"enable_thinking": False}
    assert looked_at(tmp_path, tiny_.OPENS_THINKING).facts["thinking"]["first_prompt"] == "opens"
    opens_once = tiny_.OPENS_THINKING.replace(
        "<think>\n' }}", "' + ('' if messages[-1].role == 'tool' else '<think>') }}"
    )
    found = looked_at(tmp_path, opens_once).facts["thinking"]
    assert (found["first_prompt"], found["after_a_result"]) == ("opens", "none")


def test_the_past(tmp_path: Path) -> None:
    auto = looked_at(tmp_path, tiny_.THINKING)
    assert auto.facts["history"] == "template"
    assert auto.rules["T1"] == "each prompt is rendered whole, and each turn is a sample of its own"
    assert auto.notes == [
        "the template renders earlier thinking anew once more messages follow",
        'each turn is a sample of its own, with a whole prompt: model.history = "append" is cheaper',
        "there is no config.json: the tokenizer alone was looked at, not the model",
    ]
    append = looked_at(tmp_path, tiny_.THINKING, history="append")
    assert (append.passed, append.facts["history"]) == (True, "append")
    assert 'which model.history = "append" does not follow' in append.notes[0]


def test_roles_that_the_template_lacks(tmp_path: Path) -> None:
    report = looked_at(tmp_path, tiny_.NO_SYSTEM)
    assert report.passed
    assert (report.facts["system_role"], report.facts["tools_shown"]) == (False, "in the first user message")
    assert "model.merge_system = true puts it into the first user message" in report.notes[0]
    assert report.notes[1] == "no role for tool results: they travel in a user message"
    assert "is merged" in looked_at(tmp_path, tiny_.NO_SYSTEM, merge_system=True).notes[0]


@pytest.mark.parametrize(
    ("template", "options", "reason"),
    [
        (tiny_.NO_TURN_END, {}, "T4: after assistant content"),
        (tiny_.NO_GENERATION_PROMPT, {}, "T4: the template ignores add_generation_prompt"),
        (tiny_.CHATML, {"template_variables": {"enable_thinking": False}}, "it reads none"),
        ("{% for m in messages %}", {}, "no valid Jinja"),
    ],
)
def test_what_training_would_refuse(tmp_path: Path, template: str, options: dict[str, Any], reason: str) -> None:
    report = looked_at(tmp_path, template, **options)
    assert not report.passed
    assert reason in report.problems[0]
    assert report.to_json()["problems"] == report.problems
    assert "CANNOT be trained" in str(report)


def test_an_engine_that_does_not_compute_the_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, tiny_model("llama", hidden_act="gelu"))
    tiny().save_pretrained(tmp_path)
    report = check_model(tmp_path, engine="transformers")
    assert report.problems == [
        "engine.kind = 'transformers': the transformers engine computes silu activations, this llama model has gelu"
    ]
    assert report.facts["history"] == "append"
    assert check_model(tmp_path, engine="vllm").passed


def test_end_ids_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 90000]}')
    report = looked_at(tmp_path, tiny_.CHATML)
    assert "the tokenizer has no token for the end ids [90000]" in report.notes
    assert [s["id"] for s in report.facts["stop_ids"]][1:] == [5, 90000]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    tiny(tiny_.SWITCH).save_pretrained(good)
    tiny(tiny_.NO_TURN_END).save_pretrained(bad)
    assert main(["check", "--model", str(good), "--json", "--template-variables", "enable_thinking=false"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["passed"], said["template_variables"]["set"]) == (True, {"enable_thinking": False})
    assert main(["check", "--model", str(good), "--json", "--template-variables", "thinking=false"]) == 1
    assert "did you mean enable_thinking?" in json.loads(capsys.readouterr().out)["problems"][0]
    assert main(["check", "--model", str(bad)]) == 1
    assert "PROBLEM: T4" in capsys.readouterr().out
    assert main(["check", "--model", str(tmp_path / "absent"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"]
    assert main(["check", "areal/Arithmetic-v0", "--model", str(good)]) == 2
    assert main(["check", "--model", str(good), "--template-variables", "enable_thinking"]) == 2
    assert "write NAME=VALUE" in capsys.readouterr().err
