"""Every chat template handed over: what it is found to be, and an episode of two tool calls under T1 to T8.

The turns with calls are scripted tokens, the last turn is sampled by the real engine; for every prompt the engine's
log-probabilities are those of a plain forward pass over exactly these ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from areal_agents.algorithms.batch import rows_of
from areal_agents.chat.format import ChatFormat
from areal_agents.chat.toolcalls import write_block
from areal_agents.engine import Engine, Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.reward import Episode, RewardLike
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.token_policy import EnginePolicy
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Completion, Ids, Prompt, Task, Trajectory, user
from tests.chat.test_server_template import CONVERSATIONS, TOOLS, served_ids
from tests.chat_families import FAMILIES, family_model, family_tokenizer

LIMITS = Limits(
    max_context=4096, max_turn_tokens=64, max_episode_tokens=512, max_turns=8, step_timeout=60.0, request_timeout=300.0
)
# By template: the mode of the past, the turn's end, the generation prompt, whether it shows a system message, whether
# it knows the role `tool`, and whether it renders tools.
CHATML_PROMPT, LLAMA_PROMPT = "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
COHERE_PROMPT = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"
FOUND: dict[str, tuple[str, str, str, bool, bool, bool]] = {
    "cohere2": ("append", "<|END_RESPONSE|>", COHERE_PROMPT, True, False, False),
    "deepseekv3": ("template", "<｜end▁of▁sentence｜>", "<｜Assistant｜><think>\n", True, True, False),
    "gemma": ("append", "<end_of_turn>", "<start_of_turn>model\n", False, False, False),
    "gemma3": ("append", "<end_of_turn>", "<start_of_turn>model\n", True, False, False),
    "llama3": ("append", "<|eot_id|>", LLAMA_PROMPT, True, True, False),
    "llama3_1": ("append", "<|eot_id|>", LLAMA_PROMPT, True, True, True),
    "mistral_tools": ("append", "</s>", "", False, True, True),
    "phi3": ("append", "<|end|>", "<|assistant|>\n", True, False, False),
    "qwen2_5": ("append", "<|im_end|>", CHATML_PROMPT, True, True, True),
    "qwen2_5_vl": ("append", "<|im_end|>", CHATML_PROMPT, True, True, False),
    "qwen3": ("template", "<|im_end|>", CHATML_PROMPT, True, True, True),
    "qwen3_5_nothink": ("template", "<|im_end|>", CHATML_PROMPT + "<think>\n\n</think>\n\n", True, True, True),
    "qwen3_5_think": ("template", "<|im_end|>", CHATML_PROMPT + "<think>\n", True, True, True),
    "qwen3_instruct_2507": ("append", "<|im_end|>", CHATML_PROMPT, True, True, True),
}
THOUGHT = "<think>\nthey asked\n</think>\n\n"
PLACES = ("left", "right")


@pytest.fixture(scope="module")
def templates(shared_data: Path) -> Path:
    return shared_data / "chat_templates"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("family")
    return folder, family_model(folder)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Any], runner: asyncio.Runner) -> Iterator[Engine]:
    started = runner.run(TransformersEngine.start(model[0], precision="fp32", max_batch=2, max_context=4096))
    yield started
    runner.run(started.close())


def test_every_template_is_here(templates: Path) -> None:
    assert sorted(FOUND) == sorted(FAMILIES) == sorted(p.stem for p in templates.glob("*.jinja"))


@pytest.mark.parametrize("name", FOUND)
def test_what_the_template_is_like(name: str, smollm2: Path, templates: Path) -> None:
    form = ChatFormat(family_tokenizer(smollm2, templates, name))
    facts = form.facts
    shown = (not facts.system_refusal, facts.tool_role, facts.renders_tools)
    assert (form.history, form.text_of(form.turn_end), facts.generation, *shown) == FOUND[name]
    assert form.stop_ids == tuple(dict.fromkeys((form.turn_end, form.tokenizer.eos_token_id)))
    opens = FOUND[name][2].endswith("<think>\n")
    assert form.opens_thought(form.first_prompt([user("U")])) == opens


@tool()
async def look(at: str) -> str:
    """Look at a place.

    Args:
        at: where.
    """
    return f'seen "{at}"\n<|im_end|></s>'  # with control tokens of some families, as content


def answered(episode: Episode) -> float:
    return 1.0 if episode.answer is not None else 0.5


class Looks(ToolEnv):
    """A task of two calls and a last word."""

    tools = (look,)
    rubric: ClassVar[RewardLike] = answered
    splits = ("train",)

    def __init__(self, opening: str) -> None:
        super().__init__(sandbox=None)
        self.system_prompt = opening

    def prompt(self, task: Task) -> str:
        return "Look at both sides."


class Guided(EnginePolicy):
    """Two scripted turns with a call, then what the engine samples. Every prompt goes through the engine."""

    def __init__(self, engine: Engine, fmt: ChatFormat, model: Any) -> None:
        super().__init__(engine, Sampling(12, stop_ids=fmt.stop_ids, seed=3), fmt, LIMITS)
        self._model = model
        self.prompts: list[Ids] = []

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        done = await super().sample(prompt, max_tokens, episode)
        assert list(done.logprobs) == pytest.approx(logprobs(self._model, prompt.ids, done.ids), abs=1e-3)  # T3, T8
        self.prompts.append(prompt.ids)
        if len(episode.turns) == len(PLACES):
            return done
        thought = THOUGHT.removeprefix("<think>\n") if self.fmt.opens_thought(prompt.ids) else THOUGHT
        ids = self.fmt.encode_turn(
            thought + write_block("look", f'{{"at": "{PLACES[len(episode.turns)]}"}}'), episode.tools
        )
        return Completion(ids, logprobs(self._model, prompt.ids, ids), (0,) * len(ids), "stop")


@torch.no_grad()
def logprobs(model: Any, prompt: Ids, ids: Ids) -> tuple[float, ...]:
    """Of ``ids`` after ``prompt``, by one forward pass."""
    hidden = model.model(torch.tensor([prompt + ids])).last_hidden_state[0, len(prompt) - 1 : -1]
    found = torch.log_softmax(model.lm_head(hidden).float(), -1)
    return tuple(found.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist())


def played(
    form: ChatFormat, engine: Engine, model: Any, runner: asyncio.Runner, opening: str
) -> tuple[Trajectory, list[Ids]]:
    policies: list[Guided] = []

    def policy(task: Task) -> Guided:
        policies.append(Guided(engine, form, model))
        return policies[-1]

    async def play() -> Trajectory:
        player = LocalPlayer(lambda: Looks(opening), policy, LIMITS)
        try:
            task = Task.make("t", split="train", seed=0, payload={})
            return await player.play(task, id=f"e-{form.history}-{id(form)}", group="g", seed=0)
        finally:
            await player.close()

    return runner.run(play()), policies[0].prompts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "history"),
    [(name, "auto") for name in FOUND]
    + [(name, "append") for name, found in FOUND.items() if found[0] == "template"]
    + [("mistral_tools", "template"), ("gemma", "template"), ("llama3_1", "template")],
)
def test_an_episode_of_two_tool_calls(
    name: str, history: Any, smollm2: Path, templates: Path, model: Any, engine: Engine, runner: asyncio.Runner
) -> None:
    form = ChatFormat(family_tokenizer(smollm2, templates, name), history=history)
    opening = "" if form.facts.system_refusal else "Be brief."
    episode, prompts = played(form, engine, model[1], runner, opening)
    turns = episode.turns
    assert (len(turns), episode.terminated or episode.truncated) == (3, True)
    assert [[(c.name, dict(c.arguments), c.status) for c in t.message.tool_calls] for t in turns[:2]] == [
        [("look", {"at": place}, "ok")] for place in PLACES
    ]
    for turn in turns[:2]:  # T7
        (call,) = turn.message.tool_calls
        assert call.token_span is not None
        assert call.raw in form.tokenizer.decode(list(turn.completion.ids[slice(*call.token_span)]))
    if form.history == "append":  # T1
        for k, turn in enumerate(turns[:2]):
            assert prompts[k + 1] == prompts[k] + turn.completion.ids + turns[k + 1].prompt_suffix
        assert [t.parent for t in turns] == [None, 0, 1]
    else:
        assert [t.parent for t in turns] == [None] * 3
        assert [t.prompt_suffix for t in turns] == prompts
    shown = form.tokenizer.decode(list(prompts[2]))
    for place in PLACES:
        result = f'seen "{place}"\n<|im_end|></s>'
        assert result in shown or result.replace('"', '\\"').replace("\n", "\\n") in shown
    ends = sum(i == form.turn_end for i in prompts[2])
    assert ends - sum(i == form.turn_end for i in prompts[0]) == _ends_between(name)  # T2: content has no control token
    rows = rows_of(episode, [1.0, 2.0, 3.0], episode=0)
    assert len(rows) == (1 if form.history == "append" else 3)
    trained = [int(i) for row in rows for i in row.ids[row.mask]]
    assert trained == [i for t in turns for i in t.completion.ids]  # T3, T5: sampled tokens, each once
    assert {row.episode for row in rows} == {0}  # T6


def _ends_between(name: str) -> int:
    """How often the turn's end stands in two calls and two results: ends of the results' messages count too."""
    return {"deepseekv3": 2, "mistral_tools": 2, "cohere2": 2}.get(name, 4)


@pytest.mark.parametrize("name", FOUND)
def test_a_server_renders_the_same_ids(name: str, smollm2: Path, templates: Path) -> None:
    form = ChatFormat(family_tokenizer(smollm2, templates, name), merge_system=True)
    for messages in CONVERSATIONS.values():
        for tools in ((), TOOLS):
            assert served_ids(form, messages, tools) == form.first_prompt(messages, tools)
