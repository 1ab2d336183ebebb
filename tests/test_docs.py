"""README.md and docs/: every snippet and every command is run; the metrics of a run are those that are documented.

How each block is treated:

- ``python``: executed, warnings being errors; a block that starts with ``# name.py`` is that file, importable by what
  follows on every page. ``print(x)  # → text``: the text must be what is printed.
- ``toml``: loaded by ``settings.load``; ``# pyproject.toml`` is compared with the registry.
- ``sql``: run by DuckDB on the small run's files. ``json``: parsed.
- ``text`` and indented blocks without a command: illustrations.
- commands (a line that starts with one of ``doc_blocks.PROGRAMS``): see ``RUN``. Any other language, and any other line
  in a shell block, fails.

Commands run in this process through ``cli.main``, in a folder that holds the pages' files, on a tiny random model. A
run called ``runs/NAME`` there is a copy of one real small training run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import runpy
import shutil
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from packaging.requirements import Requirement

from areal_agents import registry, settings
from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.cli.main import _parse, main
from areal_agents.env import Expert
from areal_agents.evaluation.report import EvalReport
from areal_agents.evaluation.suite import SUITE_GROUP, is_suite, load_suite
from areal_agents.reward import Episode, judge
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.types import AssistantMessage, Info, Observation, Task, user
from tests import doc_blocks
from tests.chat_server import chat_server, completion
from tests.doc_blocks import PAGES, ROOT, Block, Command
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model

pytestmark = pytest.mark.slow
BLOCKS = [b for page in PAGES for b in doc_blocks.blocks(page)]
COMMANDS = [c for b in BLOCKS for c in doc_blocks.commands(b)]
FILES = {b.file: b.text for b in BLOCKS if b.file and b.language in ("python", "toml")}
CHEAP = (
    "--steps", "1", "--rollout.groups", "1", "--rollout.group_size", "2", "--rollout.concurrency", "4",
    "--rollout.max_turn_tokens", "8", "--rollout.max_turns", "2", "--model.max_context", "512", "--eval.n", "2",
    "--warm_start.demonstrations", "0",
)  # fmt: skip
"""Appended to a training that is run: the last word on a setting holds."""
PRELUDES = {
    "docs/objective.md": "import torch\nfrom areal_agents.algorithms.losses import ppo, token_mean\n"
    "from areal_agents.algorithms.offpolicy import bypass\n"
    "logprobs_T = torch.full((4,), -1.0, requires_grad=True)\nbehaviour_T = torch.full((4,), -1.1)\n"
    "advantages_T = torch.ones(4)\nmask_T = torch.ones(4, dtype=torch.bool)\nsampled_tokens_of_the_whole_batch = 4\n",
    "docs/python.md": "import shutil\nfor name in ('from-python', 'limited'):\n    shutil.rmtree(f'runs/{name}')\n",
}
"""What a page's snippets take for granted."""


class Spelled(Letters):
    """Letters with demonstrations, and an answer in each payload for rewards that read one."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        payloads = [{"word": f"{split} {i}", "question": f"{split} {i}", "answer": str(i)} for i in range(8)]
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload=p) for i, p in enumerate(payloads)]

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield "abc"
        yield "def"

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = await super().astep(action)
        return observation, reward, terminated, truncated, info | {"components": {"letters": reward}}


@dataclass
class Workshop:
    """A tiny model, a small run on it, and one working folder a page."""

    root: Path
    model: Path
    run: Path
    done: set[tuple[str, ...]] = field(default_factory=set)
    """Commands that were run. The next one like it is only parsed; for ``train`` and ``eval``: with the same flags."""

    def folder(self, page: str) -> Path:
        """The page's own: all pages' files, and a copy of the run under each name that the page uses."""
        out = self.root / re.sub(r"\W", "_", page)
        if out.exists():
            return out
        out.mkdir()
        for name, text in FILES.items():
            assert name is not None
            (out / name).write_text(text, encoding="utf-8")
        for name in sorted(set(re.findall(r"\bruns/([\w-]+)", PAGES[page]))):
            copy = out / "runs" / name
            shutil.copytree(self.run, copy)
            text = (copy / "config.toml").read_text().replace(str(self.run), f"runs/{name}")
            (copy / "config.toml").write_text(text)
        return out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The run has all that a run can have: a warm start, evaluations between steps, checkpoints."""
    from areal_agents.trainer.loop import train

    root = tmp_path_factory.mktemp("docs")
    model = tiny_chat_model(root / "model")
    sizes = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps(sizes))
    tree = {
        "steps": 2, "out": root / "run", "model": {"path": str(model), "max_context": 512},
        "env": {"id": "tests.test_docs:Spelled"}, "engine": {"precision": "fp32"}, "learner": {"precision": "fp32"},
        "rollout": {"groups": 2, "group_size": 2, "concurrency": 8, "max_turn_tokens": 8},
        "warm_start": {"demonstrations": 2}, "eval": {"n": 2, "every": 1}, "checkpoint": {"every": 1},
    }  # fmt: skip
    asyncio.run(train(TrainConfig.model_validate(tree), console=False))
    return Workshop(root, model, root / "run")


@pytest.fixture
def here(request: pytest.FixtureRequest, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """The page's folder is the working folder and importable; what was imported from it is forgotten afterwards."""
    folder = workshop.folder(request.node.callspec.params["page"])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("HF_HOME", str(workshop.root / "hf"))
    yield workshop
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(workshop.root)):
            del sys.modules[name]


# --- snippets ------------------------------------------------------------------------------------------------------


def test_every_block_has_a_language_that_is_run() -> None:
    known = {"python", "sql", "toml", "json", "text", "bash", "console", "sh", ""}
    assert not [f"{b}: {b.language}" for b in BLOCKS if b.language not in known]
    named = [(b.file, b.text) for b in BLOCKS if b.file and b.file != "pyproject.toml"]
    assert len({name for name, _ in named}) == len(set(named)), "two blocks are files of one name: rename one"
    assert len([b for b in BLOCKS if b.language == "python"]) > 10


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.page == p and b.language == "python" for b in BLOCKS)])
def test_python_blocks_run(page: str, here: Workshop) -> None:
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(PRELUDES.get(page, ""), names)
    for block in (b for b in BLOCKS if b.page == page and b.language == "python"):
        if block.file:
            importlib.import_module(Path(block.file).stem)
            continue
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec", dont_inherit=True)
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("error")
            exec(code, names)
        expected = re.findall(r"# → (.*)", block.text)
        assert not expected or printed.getvalue().splitlines() == expected, f"{block} prints something else"


@pytest.mark.parametrize("page", ["docs/judges.md"])
def test_the_judges_ask_servers(page: str, here: Workshop) -> None:
    judged = importlib.import_module("judged")
    task = Task.make("t", split="train", seed=0, payload={"answer": "12"})
    episodes = [Episode(task, (user("3 · 4?"),), answer, (), "answer") for answer in ("12", "13, sorry")]

    def reply(body: Any) -> Any:
        assert body["model"] == "judge"
        prompt = body["messages"][0]["content"]
        line = prompt.splitlines()[-1]
        right = "\n12\n<<<END ANSWER" in prompt or "\n12\n<<<END FIRST" in prompt
        return completion(line.replace("=N", "=5" if right else "=1").replace(" X", " FIRST" if right else " SECOND"))

    async def ask(panel: Any) -> tuple[list[float], float, list[float]]:
        single = judged.pointwise(panel, judged.LOOKED_AT)
        scores = [(await judge(single, episode)).score for episode in episodes]
        against = await judge(judged.pairwise(panel, judged.LOOKED_AT, reference="answer"), episodes[1])
        return scores, against.score, [v.score for v in await judged.ranked(panel, judged.LOOKED_AT)(episodes)]

    with chat_server(reply) as one, chat_server(reply) as other:
        assert asyncio.run(ask(judged.panel_at(one.url, other.url))) == ([1.0, 0.0], 0.0, [1.0, 0.0])
    assert len(one.requests) == len(other.requests) == 2 + 2  # the group's match is the pair's: from the cache


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.page == p and b.language == "sql" for b in BLOCKS)])
def test_sql_blocks_run(page: str, here: Workshop) -> None:
    duckdb = pytest.importorskip("duckdb")
    results = [duckdb.sql(b.text).fetchall() for b in BLOCKS if b.page == page and b.language == "sql"]
    assert any(results), "every query comes out empty"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("toml", "json")], ids=str)
def test_toml_and_json_blocks_load(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        json.loads(block.text)
    elif block.file == "pyproject.toml":
        groups = {registry.ENTRY_POINT_GROUP, SUITE_GROUP, *(r.group for r in REGISTRIES.values())}
        assert set(tomllib.loads(block.text)["project"]["entry-points"]) <= groups
    else:
        (tmp_path / "block.toml").write_text(block.text)
        assert settings.load(tmp_path / "block.toml") != TrainConfig()


# --- commands ------------------------------------------------------------------------------------------------------


def needs_sandbox(env_id: str) -> bool:
    return any(t.needs_sandbox for t in registry.spec(env_id).env_class().tools)


def replaced(words: list[str], **values: str) -> list[str]:
    """``words`` with the values of some flags replaced, and those flags that are missing added."""
    out = list(words)
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if flag in out:
            out[out.index(flag) + 1] = value
        else:
            out += [flag, value]
    return out


def _train(command: Command, w: Workshop) -> list[str] | None:
    """Loaded always. Run: what README shows, and what is resumed (the copied run goes on for a third step)."""
    parsed, overrides = _parse(list(command.words[1:]))
    config = settings.load(parsed.config or None, overrides)
    registry.spec(config.env.id).require_arguments(config.env.kwargs)
    if parsed.resume and str(w.model) in (Path(parsed.config).read_text() if parsed.config else ""):
        return [*command.words[1:], "--steps", "3"]
    if command.page != "README.md" or needs_sandbox(config.env.id) or parsed.config:
        return None
    shutil.rmtree(config.out, ignore_errors=True)  # a copy of the small run lies there
    return [*command.words[1:], "--model.path", str(w.model), *CHEAP]


def _demo(command: Command, w: Workshop) -> None:
    """Loaded: it takes minutes."""
    _, overrides = _parse(list(command.words[1:]))
    settings.load("demo", overrides)


def _eval(command: Command, w: Workshop) -> list[str] | None:
    """Run on two tasks; with the tiny model, where the page's is no folder. Comparisons as they stand.

    Only parsed where it goes on with another one, the model is a server's, or the environment needs a sandbox and this
    machine has no bubblewrap.
    """
    parsed, overrides = _parse(list(command.words[1:]))
    if parsed.compare is not None or parsed.power is not None:
        return list(command.words[1:])
    if is_suite(parsed.env):  # tests/evaluation/test_suites.py plays some
        load_suite(parsed.env)
        return None
    if parsed.resume is not None:  # tests/evaluation/test_unfinished.py goes on with some
        return None
    config = parsed.settings(overrides)
    # A server: tests/engines/openai/test_client.py evaluates one. vLLM: tests/engines/vllm.
    if parsed.url or config.engine.kind == "vllm":
        return None
    if needs_sandbox(config.env.id) and shutil.which("bwrap") is None:
        return None
    if registry.spec(config.env.id).sandbox:  # an engine: tests/sandboxes plays those
        return None
    model = config.model.path if Path(config.model.path).is_dir() else str(w.model)
    small = replaced(list(command.words[1:]), model=model, n="2", max_turn_tokens="8", max_turns="2")
    return replaced(small, out=f"out-{command.line}")


def _check(command: Command, w: Workshop) -> list[str] | None:
    """Run with the tiny tokenizer; parsed where a sandbox is needed: tests/envs/test_registered.py checks those.

    Parsed where a sandbox is what is checked: tests/sandboxes/test_suite.py does.
    """
    parsed, _ = _parse(list(command.words[1:]))
    if parsed.sandbox or parsed.all or any(needs_sandbox(id) for id in parsed.env):
        return None
    rows = ({"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40))
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "documents.jsonl" in command.words:
        runpy.run_path("documents.py")  # writes it
    return replaced(list(command.words[1:]), tokenizer=str(w.model))


def _model(command: Command, w: Workshop) -> list[str] | None:
    """Parsed; a pull would download."""
    return None if "pull" in command.words else list(command.words[1:])


def _sandbox(command: Command, w: Workshop) -> None:
    """Parsed: tests/cli/test_sandbox.py runs those."""


def _serve(command: Command, w: Workshop) -> None:
    """Parsed: it needs vLLM, and tests/engines/vllm starts it."""


def _resize(command: Command, w: Workshop) -> None:
    """Parsed: it needs a run that trains, as in tests/trainer/test_resize.py."""


def _as_it_stands(command: Command, w: Workshop) -> list[str]:
    return list(command.words[1:])


def _finetune(command: Command, here: Workshop) -> list[str] | None:
    """Run with the tiny model on the small run or the page's own rows. What goes on with another one is parsed."""
    if "--resume" in command.words:
        return None
    talk, pair = (json.loads(b.text) for b in BLOCKS if b.page == "docs/sft.md" and b.language == "json")
    rows = [{**pair, "prompt": f"{i}?", "completion": str(i)} for i in range(9)]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [talk, *rows]))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [pair, *rows]))
    small = replaced(list(command.words[1:]), model=str(here.model), out=f"out-{command.line}", max_context="1024")
    if "--min-reward" in small:
        small = replaced(small, min_reward="0")
    of_run = small[0] == "dpo" and not any(word.endswith(".jsonl") for word in small)
    return replaced(small, min_gap="0.000001") if of_run else small


def _verify(command: Command, here: Workshop) -> list[str]:
    """The rows that the page shows."""
    row = {"gold": "1/2", "pred": "so \\boxed{0.5}", "slot": "boxed", "options": {"precision": 2}}
    Path("answers.jsonl").write_text(json.dumps(row) + "\n")
    return list(command.words[1:])


RUN: dict[str, Callable[[Command, Workshop], list[str] | None]] = {
    "train": _train, "demo": _demo, "eval": _eval, "check": _check, "model": _model, "serve": _serve,
    "envs": _as_it_stands, "init": _as_it_stands, "rescore": _as_it_stands, "replay": _as_it_stands, "resize": _resize,
    "show": _as_it_stands, "plot": _as_it_stands, "algorithms": _as_it_stands, "verify": _verify,
    "sandbox": _sandbox, "sft": _finetune, "dpo": _finetune,
}  # fmt: skip
"""By subcommand: what is run in a command's place; None: the parser and the settings have seen it, that is all."""


@pytest.mark.parametrize(("page", "command"), [(c.page, c) for c in COMMANDS if c.words[0] == "areal-agents"], ids=str)
def test_commands_run(page: str, command: Command, here: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    os.chdir(command.folder)
    words = RUN[command.words[1]](command, here)
    key = (command.words[1], *command.flags) if command.words[1] in ("train", "eval") else command.words
    if words is None or key in here.done:
        _parse(list(command.words[1:]))
        return
    here.done.add(key)
    code = main(words)
    assert code == 0, f"areal-agents {' '.join(words)} ended with {code}:\n{''.join(capsys.readouterr())}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] != "areal-agents"], ids=str)
def test_other_commands_exist(command: Command) -> None:
    program, *words = command.words
    if program == "make":
        targets = [w for w in words if "=" not in w]
        assert all(re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for t in targets)
    elif program == "pip":
        _installable(words)
    elif program == "python" and words[0] != "-m":
        source = (ROOT / words[0]).read_text()
        assert all(flag in source for flag in command.flags)
    else:
        assert shutil.which(words[1] if program == "python" else program, path=Path(sys.executable).parent)


def _installable(words: list[str]) -> None:
    """What ``pip install`` names is this package, with extras that it has; what is uninstalled is somebody else's."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    if words[0] == "uninstall":
        return
    assert words[0] == "install"
    for word in (w for w in words[1:] if not w.startswith("-")):
        name = "areal-agents" + word[1:] if word.startswith(".") else word
        assert Requirement(name).extras <= extras | {"test"}  # test: of a package that `init` makes


# --- metrics, and Gymnasium ------------------------------------------------------------------------------------------


def _pattern(name: str) -> str:
    if name.endswith("/NAME"):
        return re.escape(name.removesuffix("NAME")) + ".+"
    return re.sub(r"(?<=[_/])[A-Z](?=_|$)", r"\\d+", re.escape(name))


@pytest.mark.parametrize(
    ("heading", "kinds"), [("`train`: one row a step", "train"), ("`eval/LABEL`: held-out tasks", "eval/.+"),
                           ("`warm_start`: one row a batch of demonstrations", "warm_start")]
)  # fmt: skip
def test_metrics_and_their_page_agree(heading: str, kinds: str, workshop: Workshop) -> None:
    rows = [row for row in read_metrics(workshop.run) if re.fullmatch(kinds, row["kind"])]
    written = {name for row in rows for name in row} - {"kind", "step", "time"}
    page = "docs/evaluate.md" if kinds.startswith("eval") else "docs/read-the-metrics.md"
    documented = doc_blocks.first_cells(doc_blocks.section(page, f"Kind {heading}"))
    assert len(documented) == len(set(documented))
    patterns = [_pattern(name) for name in documented]
    assert not sorted(n for n in written if not any(re.fullmatch(p, n) for p in patterns)), "not documented"
    if kinds.startswith("eval"):  # these are left out of a row where they have no value
        written |= {f.name for f in dataclasses.fields(EvalReport)}
    assert not [p for p in patterns if not any(re.fullmatch(p, n) for n in written)], "documented, but never written"
    labels = set(re.findall(r"eval/(\w+?)(?:_\d+)?$", "\n".join(r["kind"] for r in rows), re.MULTILINE))
    assert labels <= {"before", "warm_start", "step", "after_rl"}


@pytest.mark.parametrize("page", ["README.md"])
def test_gymnasium_makes_the_readmes_environment_too(page: str, here: Workshop) -> None:
    env = gymnasium.make("my_envs:my/Scales-v0").unwrapped
    assert isinstance(env, importlib.import_module("my_envs").Scales)
    observation, _ = env.reset(seed=0)
    dogs = int(re.findall(r"\d+", observation[-1].text)[0])
    _, reward, terminated, _, _ = env.step(rf"\boxed{{{20 * dogs}}}")
    assert (reward, terminated) == (1.0, True)
    env.close()
