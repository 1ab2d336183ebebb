"""The register of cases, and the place that each is given: a folder, models, the command line."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from areal_agents.chat.format import parse_text
from areal_agents.cli.main import main
from areal_agents.env import AgentEnv
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Message, Task, Trajectory

CASES: dict[str, Callable[[Place], None]] = {}
Settings = Mapping[str, object]
ENVS = "tests.reports.envs"


def case(id: str) -> Callable[[Callable[[Place], None]], Callable[[Place], None]]:
    """Register the function that carries out case ``id``."""

    def register(function: Callable[[Place], None]) -> Callable[[Place], None]:
        assert id not in CASES, f"{id} has two functions"
        CASES[id] = function
        return function

    return register


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    out: str
    err: str
    code: int

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass(frozen=True)
class Place:
    """Where a case is carried out.

    ``folder`` is empty and the case's own; ``shared`` holds the models that cases made, for all of them.
    """

    folder: Path
    shared: Path
    smollm2: Path
    """The embedded model, whose tokenizer is every family's here."""
    templates: Path
    """The chat templates of model families."""

    def cli(self, *argv: object, code: int | None = 0) -> Said:
        """Run one command of the command line in this process. ``code`` None: any."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = main([str(a) for a in argv])
        said = Said(out.getvalue(), err.getvalue(), found)
        assert code is None or found == code, f"exit code {found}\n{said.out}\n{said.err}"
        return said

    def tokenizer(self, template: str, *control: str, end: str, begin: str = "") -> PreTrainedTokenizerFast:
        """The embedded model's tokenizer with a family's template and control tokens.

        Args:
            template: name of one of the templates, or a template.
            control: the family's control tokens beside ``end`` and ``begin``.
            end: its eos token.
            begin: its bos token.
        """
        tokenizer: Any = AutoTokenizer.from_pretrained(self.smollm2)
        tokenizer.add_special_tokens({"additional_special_tokens": [t for t in (*control, end, begin) if t]})
        tokenizer.eos_token, tokenizer.pad_token = end, end
        tokenizer.bos_token = begin or None
        file = self.templates / f"{template}.jinja"
        tokenizer.chat_template = file.read_text() if "{" not in template else template
        found: PreTrainedTokenizerFast = tokenizer
        return found

    def model(self, name: str, tokenizer: PreTrainedTokenizerFast, *, kind: str = "llama") -> Path:
        """A folder with random weights of two small layers, and ``tokenizer``."""
        folder = self.shared / name
        if folder.exists():
            return folder
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            kind,
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def tiny(self) -> Path:
        """A random model that trains in a second a step."""
        from tests.tiny_models import tiny_chat_model

        folder = self.shared / "tiny"
        return folder if folder.exists() else tiny_chat_model(folder)

    def train(self, env: str, settings: Settings | None = None, *argv: object, code: int | None = 0) -> Said:
        """``areal-agents train`` of the tiny model on one of ``envs.py``, with few and short episodes, into ``run``."""
        small = {
            "env.id": f"{ENVS}:{env}", "model.path": self.tiny(), "model.max_context": 512, "out": self.run,
            "engine.precision": "fp32", "learner.precision": "fp32", "rollout.groups": 1, "rollout.group_size": 2,
            "rollout.concurrency": 8, "rollout.max_turn_tokens": 4, "eval.n": 2, "eval.baseline": "false", "steps": 1,
        } | dict(settings or {})  # fmt: skip
        return self.cli("train", *_options(small), *argv, code=code)

    def eval(self, env: str, settings: Settings, *argv: object, code: int | None = 0) -> Said:
        """``areal-agents eval`` on one of ``envs.py``, into ``run``."""
        return self.cli("eval", f"{ENVS}:{env}", "--out", self.run, *_options(settings), *argv, code=code)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [r for r in rows if not kind or r["kind"] == kind]

    def episodes(self, kind: str) -> list[Trajectory]:
        return [r.trajectory for r in read_records(self.run, kind=kind)]

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "report.json").read_text())
        return found


def _options(settings: Settings) -> list[object]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run ``work`` to its end, which a hang does not reach."""
    return asyncio.run(asyncio.wait_for(work, 300))


def play(env: AgentEnv, task: Task, said: Sequence[str]) -> list[list[Message]]:
    """The messages that ``env`` shows: the first ones, and after each text of ``said``."""

    async def episode() -> list[list[Message]]:
        try:
            shown = [list((await env.areset(seed=0, options={"task": task}))[0])]
            for text in said:
                observation, *_ = await env.astep(parse_text(text))
                shown.append(list(observation))
            return shown
        finally:
            await env.aclose()

    found: list[list[Message]] = run(episode())
    return found


def call_text(name: str, arguments: str) -> str:
    """A tool call as a Hermes model writes it. ``arguments`` is JSON text."""
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
