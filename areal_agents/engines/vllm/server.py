"""A trained model behind vLLM's own OpenAI server, with the chat template that the model was trained with.

    serve ──▶ python -m vllm.entrypoints.openai.api_server   (a process group of its own, which ends with this process)
      │             ▲ chat template (chat/server_template.py), end-of-turn ids, tool parser, no sampling defaults
      └── /health ──┘ until it answers; then a curl line and the matching `areal-agents eval`

Waits for: the server's health, then its end or a signal. Unblocked by: the start's deadline, the server's end, SIGINT
and SIGTERM. The first signal ends the server in order, a second one at once. While the server starts, the first one
ends it at once.

This module imports no vLLM. Not covered: TLS and more than one model (put a proxy in front).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import httpx

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.options import ChatOptions
from areal_agents.chat.server_template import served_template
from areal_agents.chat.tool_formats import DEFAULT, ToolFormat
from areal_agents.chat_model import REMOTE
from areal_agents.engines.process_group_reaper import __file__ as guard_script
from areal_agents.engines.process_group_reaper import killable, members
from areal_agents.engines.vllm.cpu_build import CPU_WORKER, is_cpu_build
from areal_agents.engines.vllm.server_process import CALLS_BEGIN, MIDDLEWARE, REFUSED
from areal_agents.engines.vllm.server_process import __name__ as SERVER_PROCESS
from areal_agents.errors import ConfigError, EngineError
from areal_agents.utils.packages import require_package
from areal_agents.utils.precision import Precision, is_slow, number_format, slow_format_note

START_SECONDS = 900.0
"""Compiling for a GPU may take minutes the first time."""
_GRACE_SECONDS = 20.0
_GROUP_SECONDS = 5.0
"""For what is left of the server's process group."""
_HEALTH_SECONDS = 0.25

# Run in the new process, before vLLM takes its place there: the guard, and nothing to read. The guard is in the
# server's process group and ends it when this process ends, however it does; vLLM may miss a signal while it starts.
_LAUNCH = """\
import os, subprocess, sys
guard = subprocess.Popen([sys.executable, "-I", "-S", *sys.argv[1:4]])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.execv(sys.executable, [sys.executable, *sys.argv[4:]])
"""


@dataclass(frozen=True, slots=True)
class Serving:
    """The model that is served, and the way in which it is."""

    model: Path
    """The model's folder."""
    name: str
    """By which clients ask for it."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: a free one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    max_context: int = 2048
    """Longest conversation in tokens."""
    threads: int = 0
    """Cores that compute, on a CPU; 0: vLLM's own choice."""
    kv_gib: int = 1
    """Memory for KV, on a CPU, in GiB. On a GPU give --gpu-memory-utilization in ``arguments``."""
    seed: int = 0
    api_key_env: str | None = None
    """Environment variable with the key that clients must send; None: whoever reaches the port may use the model."""
    chat: ChatOptions = field(default_factory=ChatOptions)
    """How prompts are made."""
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM's server; they come last and win."""


class ArgumentsRefused(ConfigError):
    """vLLM does not know an argument of ``Serving.arguments``, or not with that value."""


def require_servable(serving: Serving) -> None:
    """Raise ConfigError for what needs no model to be seen: no vLLM, a port in use, a missing key."""
    require_package("vllm", "serving")
    free_port(serving.host, serving.port)
    require_key(serving, os.environ)


def require_key(serving: Serving, env: Mapping[str, str]) -> None:
    """Raise ConfigError where the environment variable of the key is empty."""
    if serving.api_key_env and not env.get(serving.api_key_env):
        raise ConfigError(f"the environment variable {serving.api_key_env} is not set: put the key into it")


def arguments(serving: Serving, files: Path, *, cpu: bool, form: ToolFormat = DEFAULT) -> list[str]:
    """Return vLLM's command line after ``python``.

    Args:
        serving: what is served.
        files: the folder that ``write_files`` has filled.
        cpu: whether vLLM is the build for CPUs.
        form: how the model writes its calls. Where vLLM has no parser for it, calls stay in the text, and clients read
            them (``model.tool_format``).
    """
    reads_calls = ["--enable-auto-tool-choice", "--tool-call-parser", form.vllm_parser] if form.vllm_parser else []
    # With tool_choice = "none" no parser reads the text: the model is not told of tools, and may begin no call.
    reads_calls += ["--exclude-tools-when-tool-choice-none", "--middleware", MIDDLEWARE]
    on_cpu = ["--enforce-eager", "--worker-cls", CPU_WORKER] if cpu else []
    return [
        "-m", SERVER_PROCESS,
        "--model", str(serving.model), "--served-model-name", serving.name,
        "--host", serving.host, "--port", str(serving.port),
        "--dtype", _dtype(serving.precision, cpu=cpu), "--max-model-len", str(serving.max_context),
        "--seed", str(serving.seed), *on_cpu,
        "--generation-config", str(files), "--chat-template", str(files / "chat_template.jinja"),
        "--chat-template-content-format", "string",
        *reads_calls,
        *serving.arguments,
    ]  # fmt: skip


def environment(serving: Serving, files: Path, base: Mapping[str, str], *, cpu: bool) -> dict[str, str]:
    """Return the server's environment.

    Args:
        serving: what is served.
        files: the folder for the server's sockets.
        base: the environment to start from.
        cpu: whether vLLM is the build for CPUs.

    Raises:
        ConfigError: the variable of the key is empty.
    """
    env = dict(base) | {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    env["VLLM_RPC_BASE_PATH"] = str(files)
    env[REFUSED] = str(files / "refused")
    if cpu:
        env["TMPDIR"] = str(files)  # torch's rendezvous, which a killed server leaves
        env["TORCH_COMPILE_DISABLE"] = "1"  # the sampler's small functions would need a compiler
        env["VLLM_CPU_KVCACHE_SPACE"] = str(serving.kv_gib)
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind" if serving.threads else "auto"
        if serving.threads:
            env["OMP_NUM_THREADS"] = str(serving.threads)
    require_key(serving, env)
    if serving.api_key_env:
        env["VLLM_API_KEY"] = env[serving.api_key_env]  # not an argument: every user of the host can read those
    return env


def write_files(fmt: ChatFormat, folder: Path) -> None:
    """Write the chat template, and the ids that end a turn.

    The ids stand in a generation config of our own, which has no sampling defaults.
    """
    (folder / "chat_template.jinja").write_text(served_template(fmt), encoding="utf-8")
    stops = {"eos_token_id": list(fmt.stop_ids)}
    (folder / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")


def calls_begin(fmt: ChatFormat) -> str:
    """Return what begins a call of the model, and nothing else, as ``CALLS_BEGIN`` holds it."""
    form, known = fmt.tool_format, fmt.tokenizer.get_added_vocab()
    texts = list(form.openers if form.begins_calls_alone is None else form.begins_calls_alone)
    return json.dumps({"stop": texts, "stop_token_ids": [known[text] for text in texts if text in known]})


def _dtype(precision: Precision, *, cpu: bool) -> str:
    if precision == "auto" and not cpu:
        return "auto"
    return "bfloat16" if number_format(precision) == "bf16" else "float32"


def free_port(host: str, port: int) -> int:
    """Return ``port``, or a free one for 0.

    Raises ConfigError where it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error}. Choose another with --port or --host") from (
            error
        )


def base_url(serving: Serving) -> str:
    """Return the URL where clients of this host find the server."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(serving.host, serving.host)
    return f"http://[{host}]:{serving.port}" if ":" in host else f"http://{host}:{serving.port}"


def usage_text(serving: Serving) -> str:
    """Return what people do with the server, ready to copy."""
    url = base_url(serving) + "/v1"
    body = json.dumps({"model": serving.name, "messages": [{"role": "user", "content": "What is 17 * 23?"}]})
    key = f' -H "Authorization: Bearer ${serving.api_key_env}"' if serving.api_key_env else ""
    flag = f" --api-key-env {serving.api_key_env}" if serving.api_key_env else ""
    model = shlex.quote(f"{REMOTE}{serving.name}")
    return (
        f"serving {serving.name} at {url}\n"
        f"  curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}\n"
        f"  areal-agents eval areal/Arithmetic-v0 --model {model} --url {url}{flag}\n"
        "Ctrl-C ends it."
    )


async def serve(serving: Serving, *, say: Callable[[str], None] = print, start_seconds: float = START_SECONDS) -> int:
    """Serve until a signal or the server's own end, and return 0 where a signal ended it.

    The server writes to this process's own stdout and stderr.

    Raises:
        ConfigError: no vLLM, a port in use, a missing key, or arguments that vLLM refuses.
        ModelError, TemplateError: no usable tokenizer.
        EngineError: the server ended by itself, or missed its deadline.
    """
    require_servable(serving)
    fmt = ChatFormat.load(serving.model, serving.chat)
    cpu = is_cpu_build()
    if is_slow(serving.precision, gpu=not cpu):
        say(slow_format_note(["--precision"]))
    serving = replace(serving, port=free_port(serving.host, serving.port))
    with tempfile.TemporaryDirectory(prefix="areal-serve-", ignore_cleanup_errors=True) as folder, _signals() as stop:
        files = Path(folder)
        env = environment(serving, files, os.environ, cpu=cpu) | {CALLS_BEGIN: calls_begin(fmt)}
        write_files(fmt, files)
        async with guarded(arguments(serving, files, cpu=cpu, form=fmt.tool_format), env, files, stop) as process:
            try:
                return await _run(process, serving, fmt.tool_format, stop, say, start_seconds)
            except EngineError as error:
                if refused := _refusal(Path(env[REFUSED])):
                    raise ArgumentsRefused(f"--vllm-args: {refused}") from error
                raise


@contextlib.asynccontextmanager
async def guarded(
    command: list[str], env: Mapping[str, str], files: Path, stop: StopSignals, grace: float = _GRACE_SECONDS
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``python COMMAND`` as the leader of a new process group, which ends with the block, or with this process.

    Args:
        command: arguments of ``python``.
        env: the process's environment.
        files: the folder that the guard removes at the end.
        stop: its second signal ends the wait for an end in order.
        grace: seconds that the process has, after SIGTERM, to end in order.
    """
    guard = [guard_script, str(files), str(grace)]
    held, holder = os.pipe()
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _LAUNCH, *guard, *command, env=env, stdin=held, start_new_session=True
            )
        finally:
            os.close(held)
        try:
            yield process
        finally:
            await _end(process, stop, grace)
    finally:
        os.close(holder)  # the guard sees that, and ends what is left of the group


async def _run(
    process: asyncio.subprocess.Process,
    serving: Serving,
    form: ToolFormat,
    stop: StopSignals,
    say: Callable[[str], None],
    start_seconds: float,
) -> int:
    ended = asyncio.create_task(process.wait())
    stopped = asyncio.create_task(stop.first.wait())
    healthy = asyncio.create_task(_healthy(base_url(serving) + "/health", start_seconds))
    try:
        await asyncio.wait({ended, stopped, healthy}, return_when=asyncio.FIRST_COMPLETED)
        if not (healthy.done() and healthy.result()):
            _kill(process)  # while vLLM starts it does not look at signals, and there is no request to lose
        if not stopped.done() and not ended.done():
            if not healthy.result():
                raise EngineError(f"vLLM's server did not answer within {start_seconds:g} s: it was ended")
            say(usage_text(serving))
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            return 0
        raise EngineError(
            f"vLLM's server ended with exit code {ended.result()}: its own messages above say why. Its command was: "
            f"{shlex.join(arguments(serving, Path('FILES'), cpu=is_cpu_build(), form=form))}"
        )
    finally:
        tasks = (ended, stopped, healthy)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refusal(file: Path) -> str:
    """Return what the server's process wrote of an argument that vLLM refuses; empty where it wrote nothing."""
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _healthy(url: str, seconds: float) -> bool:
    """Return True once ``url`` answers 200, or False after ``seconds``."""
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).status_code == 200:
                    return True
            await asyncio.sleep(_HEALTH_SECONDS)
    return False


async def _end(process: asyncio.subprocess.Process, stop: StopSignals, grace: float) -> None:
    """End the server and everything that it started.

    They end in order first, and at once after the grace or a second signal.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        ended = asyncio.create_task(process.wait())
        again = asyncio.create_task(stop.second.wait())
        await asyncio.wait({ended, again}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        ended.cancel()
        await asyncio.gather(ended, again, return_exceptions=True)
    until = time.monotonic() + _GROUP_SECONDS
    while members(process.pid) and time.monotonic() < until:
        for pid in killable(process.pid):  # resource trackers end by themselves, and free memory
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.02)
    if members(process.pid):  # without members, the number may be another group's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


class StopSignals:
    """The events of a first signal and of a second one."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()

    def on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextlib.contextmanager
def _signals() -> Iterator[StopSignals]:
    """Let SIGINT and SIGTERM set ``StopSignals`` in the block.

    Outside the main thread signals are left alone.
    """
    stop, loop, added = StopSignals(), asyncio.get_running_loop(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            loop.add_signal_handler(number, stop.on_signal)
            added.append(number)
    try:
        yield stop
    finally:
        for number in added:
            loop.remove_signal_handler(number)
