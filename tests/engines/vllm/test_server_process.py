"""What `areal-agents serve` starts, checks and says; the server itself is tested in test_server.py."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import areal_agents
from areal_agents.chat.format import ChatFormat
from areal_agents.chat.tool_formats import FORMATS
from areal_agents.cli.main import main
from areal_agents.engines.process_group_reaper import members
from areal_agents.engines.vllm.cpu_build import CPU_WORKER
from areal_agents.engines.vllm.server import (
    Serving,
    arguments,
    base_url,
    calls_begin,
    environment,
    free_port,
    serve,
    usage_text,
    write_files,
)
from areal_agents.engines.vllm.server_process import NoCalls, sentence, without_calls
from areal_agents.errors import ConfigError
from tests.processes import until, wait_gone
from tests.tiny_tokenizer import CHATML, SWITCH, tiny


def serving(**changes: Any) -> Serving:
    return replace(Serving(Path("/m"), "runs/demo/model"), **changes)


def test_the_command_line_and_its_files(tmp_path: Path) -> None:
    line = arguments(serving(precision="fp32", arguments=("--max-num-seqs", "4")), tmp_path, cpu=True)
    assert line[:2] == ["-m", "areal_agents.engines.vllm.server_process"]
    given = dict(itertools.pairwise(line))
    assert (given["--host"], given["--port"], given["--dtype"]) == ("127.0.0.1", "8000", "float32")
    assert (given["--served-model-name"], given["--tool-call-parser"]) == ("runs/demo/model", "hermes")
    assert "--enforce-eager" in line
    assert "--exclude-tools-when-tool-choice-none" in line
    assert given["--middleware"] == f"{NoCalls.__module__}.{NoCalls.__name__}"
    assert given["--worker-cls"] == CPU_WORKER
    assert line[-2:] == ["--max-num-seqs", "4"]
    assert "--enforce-eager" not in arguments(serving(), tmp_path, cpu=False)
    fmt = ChatFormat(tiny(CHATML))
    write_files(fmt, tmp_path)
    assert json.loads((Path(given["--generation-config"]) / "generation_config.json").read_text()) == {
        "eos_token_id": list(fmt.stop_ids)
    }
    assert Path(given["--chat-template"]).read_text().endswith(CHATML)
    write_files(ChatFormat(tiny(SWITCH), end_ids=[5], template_variables={"enable_thinking": False}), tmp_path)
    assert "{%- set enable_thinking = false -%}" in Path(given["--chat-template"]).read_text()
    config = json.loads((Path(given["--generation-config"]) / "generation_config.json").read_text())
    assert config == {"eos_token_id": [*fmt.stop_ids, 5]}


def test_the_environment_has_the_key_and_the_command_line_does_not() -> None:
    base = {"PATH": "/bin", "KEY": "sk-1"}
    files = Path("f")
    env = environment(serving(api_key_env="KEY", threads=2), files, base, cpu=True)
    assert (env["VLLM_API_KEY"], env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("sk-1", "nobind", "2")
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["PATH"], env["VLLM_RPC_BASE_PATH"]) == ("1", "/bin", "f")
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(serving(), files, base, cpu=False)
    assert "sk-1" not in " ".join(arguments(serving(api_key_env="KEY"), files, cpu=False))
    with pytest.raises(ConfigError, match="variable NONE is not set"):
        environment(serving(api_key_env="NONE"), files, base, cpu=True)


def test_what_is_told() -> None:
    text = usage_text(serving(host="0.0.0.0", port=81, name="it's", api_key_env="KEY"))
    assert "curl http://127.0.0.1:81/v1/chat/completions" in text
    assert '-H "Authorization: Bearer $KEY"' in text
    assert "--url http://127.0.0.1:81/v1 --api-key-env KEY" in text
    assert """--model 'openai:it'"'"'s'""" in text
    assert base_url(serving(host="::1")) == "http://[::1]:8000"


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}.*--port"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0


_SERVER = """
import pathlib, signal, subprocess, sys, time
def on_term(*_):
    pathlib.Path("asked").touch()
    if sys.argv[1] == "obeys":
        pathlib.Path("in order").touch()
        sys.exit()
signal.signal(signal.SIGTERM, on_term)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
assert sys.stdin.read() == ""
pathlib.Path("up").touch()
while True:
    time.sleep(600)
"""
_COMMAND = """
import asyncio, os, pathlib, sys
from areal_agents.engines.vllm.server import StopSignals, guarded
async def run():
    command, grace = ["-S", *sys.argv[2:]], float(sys.argv[1])
    async with guarded(command, os.environ, pathlib.Path("files"), StopSignals(), grace) as process:
        print(process.pid, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
asyncio.run(run())
"""


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "ended"])
@pytest.mark.parametrize(("server", "grace"), [("obeys", 60), ("ignores", 3)])
def test_the_server_ends_with_its_command(tmp_path: Path, server: str, grace: int, killed: bool) -> None:
    """In order where it obeys SIGTERM, else after the grace, its children with it; a killed command's files go too."""
    (tmp_path / "files").mkdir()
    popen = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, str(grace), "-c", _SERVER, server], cwd=tmp_path, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(areal_agents.__file__).parents[1])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with popen:
        assert popen.stdout is not None
        assert popen.stdin is not None
        group = int(popen.stdout.readline())
        asyncio.run(until((tmp_path / "up").exists))
        assert len(pids := members(group)) == 3  # the server, its guard, its child
        if killed:
            popen.kill()
        else:
            popen.stdin.write("\n")
            popen.stdin.flush()
        assert wait_gone(pids, 30) == []
        assert (tmp_path / "asked").exists()
        assert (tmp_path / "in order").exists() == (server == "obeys")
        assert (tmp_path / "files").exists() != killed
    assert popen.returncode == (-signal.SIGKILL if killed else 0)


def test_without_vllm_the_command_to_install_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    with pytest.raises(ConfigError, match=r'pip install "areal-agents\[vllm\]"'):
        asyncio.run(serve(serving()))
    assert main(["serve", "--model", "x"]) == 1
    assert 'pip install "areal-agents[vllm]"' in capsys.readouterr().err


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "x", "--port", "-1"]) == 2
    assert "--port is -1" in capsys.readouterr().err
    assert main(["serve", "--model", "x", "--vllm-args='"]) == 2
    assert "No closing quotation" in capsys.readouterr().err
    for moved in ("--port 9", "--host=::", "--ssl-keyfile f", "--uds s"):
        assert main(["serve", "--model", "x", f"--vllm-args=--max-num-seqs 4 {moved}"]) == 2
        assert "use serve's own --host and --port" in capsys.readouterr().err


def test_what_needs_no_model_is_refused_before_one_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json" if name == "vllm" else name))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "--model", "/nowhere/model", "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["serve", "--model", "/nowhere/model", "--port", "0", "--api-key-env", "AREAL_NO_SUCH_KEY"]) == 1
    assert "variable AREAL_NO_SUCH_KEY is not set" in capsys.readouterr().err


BEGINS: dict[str, list[Any]] = {"stop": ["<tool_call>"], "stop_token_ids": [7]}


@pytest.mark.parametrize(
    ("request_", "stop", "ids"),
    [
        ({"tool_choice": "none"}, ["<tool_call>"], [7]),
        ({"tool_choice": "none", "stop": "x"}, ["x", "<tool_call>"], [7]),
        ({"tool_choice": "none", "stop": ["x"], "stop_token_ids": [7, 8]}, ["x", "<tool_call>"], [7, 8]),
        ({"tool_choice": "none", "stop": None, "include_stop_str_in_output": True}, ["<tool_call>"], [7]),
    ],
)
def test_a_request_without_calls_ends_at_what_begins_one(request_: dict[str, Any], stop: Any, ids: Any) -> None:
    found = json.loads(without_calls(json.dumps(request_).encode(), BEGINS))
    assert found == {"tool_choice": "none", "stop": stop, "stop_token_ids": ids, "include_stop_str_in_output": False}


@pytest.mark.parametrize(
    "body", [b'{"tool_choice": "auto"}', b'{"a": 1}', b"[1]", b"{bad", b"\xff", b'{"tool_choice": "none", "stop": 5}']
)
def test_any_other_request_reaches_vllm_as_it_came(body: bytes) -> None:
    assert without_calls(body, BEGINS) == body


def test_a_request_in_pieces_reaches_vllm_as_one_with_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_SERVE_CALLS_BEGIN", json.dumps(BEGINS))
    pieces = [{"type": "http.request", "body": part, "more_body": more}
              for part, more in ((b'{"tool_choice"', True), (b': "none"}', False))]  # fmt: skip
    seen: list[Any] = []

    async def receive() -> Any:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([dict(scope["headers"]), await receive(), await receive()])

    async def send(message: Any) -> None:
        raise AssertionError("nothing is sent here")

    scope = {"type": "http", "path": "/v1/chat/completions", "headers": [(b"content-length", b"24"), (b"a", b"b")]}
    asyncio.run(NoCalls(app)(scope, receive, send))
    headers, body, after = seen
    assert headers == {b"a": b"b", b"content-length": str(len(body["body"])).encode()}
    assert (json.loads(body["body"])["stop"], after) == (["<tool_call>"], {"type": "http.disconnect"})


def test_what_begins_a_call_is_ended_at_by_text_and_by_control_token() -> None:
    fmt = ChatFormat(tiny(CHATML))
    assert json.loads(calls_begin(fmt)) == {"stop": ["<tool_call>"], "stop_token_ids": []}
    fmt.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    found = json.loads(calls_begin(ChatFormat(fmt.tokenizer)))
    assert found == {"stop": ["<tool_call>"], "stop_token_ids": [len(fmt.tokenizer) - 1]}
    for form in FORMATS.values():
        for text in form.openers if form.begins_calls_alone is None else form.begins_calls_alone:
            assert len(text) > 5, f"{form.name}: {text!r} may stand in any text"


def test_a_misspelt_argument_is_one_sentence() -> None:
    options = ["--max-num-seqs", "--max-model-len"]
    told = "unrecognized arguments: --max-num-seqss"
    assert sentence(told, options) == f"{told}; did you mean --max-num-seqs?"
    assert sentence("unrecognized arguments: --bogus 3", options) == "unrecognized arguments: --bogus 3"
    assert sentence("argument --seed: invalid int value", options) == "argument --seed: invalid int value"


def test_the_module_imports_neither_vllm_nor_torch_early() -> None:
    code = "import sys, areal_agents.cli.serve; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
