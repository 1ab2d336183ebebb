"""`areal-agents serve` with real vLLM: the ids of ChatFormat, tool calls, evaluation, and no process left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers

from areal_agents.algorithms.batch import Row
from areal_agents.chat.format import ChatFormat
from areal_agents.chat.toolcalls import parse_text
from areal_agents.cli.main import main
from areal_agents.engine import Sampling
from areal_agents.engines.openai.client import OpenAIChat
from areal_agents.engines.openai.messages import request_messages, request_tools
from areal_agents.engines.openai.teacher import ServedTeacher
from areal_agents.engines.vllm.cpu_build import is_cpu_build
from areal_agents.engines.vllm.server import free_port
from areal_agents.errors import ConfigError
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.players import Server
from areal_agents.rewards import Budget, Panel, pointwise
from areal_agents.served_model import ServedModel
from areal_agents.settings.config import ModelConfig, RolloutConfig, TrainConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.teacher import require_teacher
from areal_agents.types import user
from tests.chat.test_server_template import CONVERSATIONS, TOOLS
from tests.chat_server import Hang, Json, Step, chat_server, completion
from tests.processes import MARKER, marked, wait_gone
from tests.rewards.judges.scripted import episode as judged
from tests.tiny_models import forward_logprobs, save_tiny
from tests.tiny_tokenizer import CHATML, tiny

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

ASKED = "use a tool"
CALLS = (
    'two: <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
)
START_SECONDS = 200.0
END_SECONDS = 40.0


@dataclass
class Process:
    """A server, its output as far as it came, and the mark of all its processes."""

    popen: subprocess.Popen[str]
    url: str
    mark: str
    lines: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line)
            if "Ctrl-C ends it." in line:
                self.ready.set()
        self.ready.set()

    def output(self) -> str:
        return "".join(self.lines)


def served_model(folder: Path, *, teach: bool = True) -> Path:
    """A Llama with heads of 32 (vLLM's CPU kernels refuse 16) and the in-memory tokenizer; random, or also taught."""
    torch.manual_seed(0)
    tokenizer = tiny(CHATML)
    end = tokenizer.eos_token_id
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    save_tiny(folder, taught(model, tokenizer) if teach else model)
    tokenizer.save_pretrained(folder)
    return folder


def taught(model: Any, tokenizer: Any) -> Any:
    """``model``, which has learned to answer ASKED with CALLS, whatever it says to anything else."""
    prompt = list(ChatFormat(tokenizer).first_prompt((user(ASKED),), TOOLS))
    answer = [*tokenizer.encode(CALLS, add_special_tokens=False), tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        if loss.item() < 0.01:
            return model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the model did not learn its answer: loss {loss.item():.3g}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model(tmp_path_factory.mktemp("served") / "model")


@contextlib.contextmanager
def serving(model: Path, mark: str) -> Iterator[Process]:
    """The command on a free port, with its processes marked; everything is gone afterwards."""
    port = free_port("127.0.0.1", 0)
    command = [
        sys.executable, "-m", "areal_agents", "serve", "--model", str(model), "--name", "tiny", "--port", str(port),
        "--precision", "fp32", "--max-context", "1000", "--threads", "1",
    ]  # fmt: skip
    popen = subprocess.Popen(
        command, env={**os.environ, MARKER: mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running = Process(popen, f"http://127.0.0.1:{port}", mark)
    reader = threading.Thread(target=running.read, daemon=True)
    reader.start()
    try:
        yield running
    finally:
        popen.send_signal(signal.SIGINT)  # an orderly end, which frees shared memory
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(END_SECONDS)
        for pid in {*marked(mark), *([popen.pid] if popen.poll() is None else [])}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        popen.wait(END_SECONDS)
        reader.join(5)
        assert popen.stdout is not None
        popen.stdout.close()


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Process]:
    with serving(model, f"serve-{os.getpid()}") as running:
        if not running.ready.wait(START_SECONDS) or running.popen.poll() is not None:
            pytest.fail(f"the server did not start:\n{running.output()[-4000:]}")
        yield running


def test_the_server_renders_the_ids_of_the_chat_format(server: Process) -> None:
    fmt = ChatFormat(tiny(CHATML))
    assert f"--model openai:tiny --url {server.url}/v1" in server.output()
    with httpx.Client(trust_env=False, timeout=30) as client:
        for tools in ((), TOOLS):
            for messages in CONVERSATIONS.values():
                body = {"model": "tiny", "messages": request_messages(messages), "add_generation_prompt": True}
                if tools:
                    body["tools"] = request_tools(tools)
                answer = client.post(f"{server.url}/tokenize", json=body)
                assert answer.status_code == 200, answer.text
                assert tuple(answer.json()["tokens"]) == fmt.first_prompt(messages, tools)


def test_a_reply_and_an_evaluation(server: Process, tmp_path: Path) -> None:
    fmt = ChatFormat(tiny(CHATML))

    async def talk() -> None:
        async with OpenAIChat("tiny", base_url=f"{server.url}/v1", timeout=60, deadline=60) as chat:
            reply = await chat.reply((user("hello"),), TOOLS, Sampling(12, temperature=0.0, seed=1))
            assert reply.prompt_tokens == len(fmt.first_prompt((user("hello"),), TOOLS))
            assert reply.completion_tokens is not None
            assert 1 <= reply.completion_tokens <= 12
            assert reply.message.finish == ("length" if reply.completion_tokens == 12 else "stop")
            assert reply.model == "tiny"
            again = await chat.reply((user("hello"),), TOOLS, Sampling(12, temperature=0.0, seed=2))
            assert again.message == reply.message

    asyncio.run(asyncio.wait_for(talk(), 120))
    report = asyncio.run(
        asyncio.wait_for(
            evaluate(
                "tests.chat_envs:Sums", model=ModelConfig(path="openai:tiny", max_context=900), n=2,
                rollout=RolloutConfig(max_turn_tokens=8, max_turns=2), server=Server(f"{server.url}/v1"),
                out=tmp_path / "out",
            ),
            120,
        )
    )  # fmt: skip
    assert (report.n, report.attempts, report.infra_rate) == (2, 2, 0.0)
    assert report.served == f"tiny at {server.url}/v1/chat/completions"
    saved = [record.trajectory for record in read_records(tmp_path / "out", kind="eval")]
    assert len(saved) == 2
    assert all(t.sampled_tokens > 0 and not t.turns[0].completion.ids for t in saved)


def test_sampled_tool_calls_are_those_that_training_would_read(server: Process) -> None:
    async def talk() -> None:
        async with OpenAIChat("tiny", base_url=f"{server.url}/v1", timeout=60, deadline=60) as chat:
            message = await chat.chat((user(ASKED),), TOOLS, Sampling(100, temperature=0.0))
        assert (message.finish, message.text.split("<tool_call>")[0].strip()) == ("stop", "two:")
        ours = parse_text(CALLS).tool_calls
        assert [(c.name, c.arguments, c.status) for c in message.tool_calls] == [
            (c.name, c.arguments, c.status) for c in ours
        ]
        assert [c.arguments for c in ours] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]

    asyncio.run(asyncio.wait_for(talk(), 120))


def test_a_message_that_may_hold_no_call_ends_where_one_would_begin(server: Process) -> None:
    """The model was never told of a tool, and writes calls all the same: it knows nothing else."""
    body: Json = {"model": "tiny", "messages": [{"role": "user", "content": ASKED}], "max_tokens": 60}
    tools = [{"type": "function", "function": {"name": "noop", "parameters": {"type": "object"}}}]

    def said(**more: Any) -> list[Json]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            asked = ({**body, "seed": seed, **more} for seed in range(8))
            return [client.post("/v1/chat/completions", json=ask).json()["choices"][0] for ask in asked]

    free, bound = said(), said(tools=tools, tool_choice="none")
    assert "<tool_call>" in "".join(c["message"]["content"] for c in free)
    assert sum(c["stop_reason"] == "<tool_call>" and c["finish_reason"] == "stop" for c in bound) >= 1
    assert "<tool_call>" not in "".join(c["message"]["content"] or "" for c in bound)


def test_a_panel_of_judges_of_which_this_one_answers(server: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is down, one silent, one talks nonsense. This random model is held to the line, which is all that it says."""
    monkeypatch.setattr("areal_agents.rewards.judges.panel.draw_tag", lambda texts: "0123abcd")
    line = {"structured_outputs": {"regex": "SCORES 0123abcd: quality=[1-5]"}}
    real = ServedModel("tiny", f"{server.url}/v1", extra=line)
    down = ServedModel("tiny", f"http://127.0.0.1:{free_port('127.0.0.1', 0)}/v1", max_retries=0)

    def answers(body: Json) -> Step:
        return Hang() if body["model"] == "slow" else completion("quality=5")

    with chat_server(answers) as others:
        rest = {name: ServedModel(name, others.url, max_retries=0, deadline=1.0) for name in ("slow", "garbage")}
        panel = Panel(
            {"real": real, "down": down, **rest}, quorum=1, deadline=100.0, budget=Budget(calls=20),
            sampling=Sampling(40, temperature=0.0),
        )  # fmt: skip
        reward = pointwise(panel, "Is it right?")
        found, again = (asyncio.run(reward(judged("12", id=id))) for id in ("a", "b"))  # the second from the cache
    assert found.score in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.components["judge.real"] == found.score == again.score
    assert (found.components["judges"], found.components["judges_failed"]) == (1.0, 3.0)
    assert panel.spent.tokens > 500  # of the prompt, as vLLM counts them
    assert panel.failed == {"down": 2, "slow": 2, "garbage": 2}


def test_seeded_prompts_with_more_tokens_than_a_step_takes(server: Process) -> None:
    """9912 tokens; `areal-agents eval` sends a seed with every request."""

    async def talk() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=100) as client:
            bodies = [
                {"model": "tiny", "prompt": [3 + i, *range(3, 120)] * 6, "seed": i, "max_tokens": 2} for i in range(14)
            ]
            answers = await asyncio.gather(*(client.post(f"{server.url}/v1/completions", json=b) for b in bodies))
        assert [answer.status_code for answer in answers] == [200] * 14, server.output()[-4000:]

    asyncio.run(talk())


def test_a_teacher_scores_the_students_tokens(server: Process, model: Path, tmp_path: Path) -> None:
    """What vLLM says of a prompt, /tokenize included, against a forward pass of transformers."""
    teacher = {"model": "tiny", "url": f"{server.url}/v1"}
    config = TrainConfig.model_validate(
        {"model": {"path": str(model), "max_context": 900}, "algorithm": {"teacher": teacher}}
    )
    longer = config.model_copy(update={"model": ModelConfig(path=str(model), max_context=1 << 14)})
    other = tiny(CHATML)
    other.add_tokens(["in"])  # of the same size as before: the vocabularies alone would not tell
    copied = tmp_path / "other"
    shutil.copytree(model, copied)
    other.save_pretrained(copied)
    unlike = config.model_copy(update={"model": ModelConfig(path=str(copied), max_context=900)})
    rng, known = np.random.default_rng(0), len(tiny(CHATML))
    rows = []
    for n in (40, 7, 200):
        mask = np.arange(n) >= n // 2
        zeros = np.zeros(n, np.float32)
        ids = rng.integers(0, known, n)
        rows.append(Row(ids, mask, zeros, np.zeros(n, np.int64), np.where(mask, 0, -1), zeros, 0))

    async def ask() -> list[Any]:
        await require_teacher(config)
        with pytest.raises(ConfigError, match="must take one more than"):
            await require_teacher(longer)
        with pytest.raises(ConfigError, match="has another tokenizer than the student"):
            await require_teacher(unlike)
        return list(await ServedTeacher(config.algorithm.teacher, known=known).logprobs(rows))

    found = asyncio.run(asyncio.wait_for(ask(), 120))
    weights = transformers.AutoModelForCausalLM.from_pretrained(model)
    for row, said in zip(rows, found, strict=True):
        want = forward_logprobs(weights, tuple(row.ids.tolist()))[len(row) // 2 - 1 :]
        assert np.abs(said[row.mask] - want.numpy()).max() < 2e-4
        assert not said[~row.mask].any()


def test_ctrl_c_ends_it_and_leaves_no_process_memory_or_file(server: Process) -> None:
    """The last that uses the server: it ends it."""
    pids = marked(server.mark)
    assert len(pids) >= 5  # the command, its guard, the server, the engine, its worker
    assert server.popen.pid in pids
    assert [pid for pid in pids if b"process_group_reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (folder,) = {s for pid in pids for s in variables(pid) if s.startswith("VLLM_RPC_BASE_PATH=")}
    sockets = Path(folder.partition("=")[2])
    assert [path for path in sockets.iterdir() if path.is_socket()]
    before = set(Path(tempfile.gettempdir()).glob("vllm_dist_*"))  # of other servers
    memory = {line.split()[-1] for pid in pids for line in mapped(pid) if "/dev/shm/" in line}
    assert memory
    server.popen.send_signal(signal.SIGINT)
    assert server.popen.wait(END_SECONDS) == 0, server.output()[-4000:]
    assert wait_gone(pids, END_SECONDS) == []
    assert marked(server.mark) == []
    assert [path for path in memory if Path(path).exists()] == []
    assert not sockets.exists()
    assert set(Path(tempfile.gettempdir()).glob("vllm_dist_*")) <= before


def variables(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


def mapped(pid: int) -> list[str]:
    """Files that a process maps, one a line; deleted ones are not there any more."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if line.count("/") and not line.endswith("(deleted)")]


def test_an_argument_that_vllm_refuses_is_one_sentence(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("areal_agents.utils.precision.cpu_flags", lambda: frozenset({"avx2"}))
    asked = ["serve", "--model", str(model), "--port", "0", "--precision", "bf16", "--vllm-args=--max-num-seqss 4"]
    assert main(asked) == 2
    out, err = capfd.readouterr()
    if is_cpu_build():
        assert out.count("note: --precision is bf16, which this processor computes in software") == 1
    assert "error: --vllm-args: unrecognized arguments: --max-num-seqss; did you mean --max-num-seqs?" in err
    assert err.count("\n") < 10, err


def test_the_servers_processes_end_with_a_command_that_is_killed(model: Path) -> None:
    """Killed while the engine starts, when four processes exist: guard, server, engine core, their resource tracker."""
    with serving(model, f"killed-{os.getpid()}") as running:
        end = time.monotonic() + START_SECONDS
        while len(pids := [p for p in marked(running.mark) if p != running.popen.pid]) < 4:
            assert time.monotonic() < end, running.output()[-4000:]
            assert running.popen.poll() is None, running.output()[-4000:]
            time.sleep(0.05)
        running.popen.kill()
        running.popen.wait(END_SECONDS)
        assert wait_gone(pids, END_SECONDS) == []
