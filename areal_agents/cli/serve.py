"""The command ``serve``, a dataclass as in ``cli/commands.py``."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from areal_agents.chat.options import ChatOptions, ToolFormatName
from areal_agents.cli.common import UsageError, template_variables


@dataclass
class Serve:
    """Serve a model by vLLM's own OpenAI server, with tool calls: ``areal-agents serve --model runs/demo/model``.

    Chat template and tool calls are those that the model was trained with. Ctrl-C ends it.
    """

    model: str
    """``smollm2``, a local folder (a trained model, for example) or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no TLS: another address than this host's own is for trusted networks."""
    port: int = 8000
    """0: a free one."""
    name: str = ""
    """The model's name for clients; by default what --model says."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bf16 where the hardware computes in it."""
    max_context: int = 2048
    """Longest conversation in tokens."""
    threads: int = 0
    """Cores that compute, on a CPU; 0: vLLM's own choice."""
    kv_gib: int = 1
    """Memory for KV, on a CPU, in GiB."""
    seed: int = 0
    """Of requests without their own."""
    api_key_env: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """The environment variable with the key that clients must send to /v1; vLLM's other paths ask for none."""
    template_variables: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Variables of the chat template, as in training: ``--template-variables enable_thinking=false``."""
    merge_system: bool = False
    """Put a system message into the first user message where the chat template shows none."""
    tool_format: ToolFormatName = "auto"
    """How the model writes its tool calls. ``auto``: as its chat template does."""
    vllm_args: Annotated[str, tyro.conf.arg(metavar="ARGS")] = ""
    """Further arguments of vLLM's server, in one string: ``--vllm-args="--max-num-seqs 64"``."""

    def run(self, overrides: Sequence[str]) -> int:
        for flag, value, least in (("--port", self.port, 0), ("--max-context", self.max_context, 2),
                                   ("--threads", self.threads, 0), ("--kv-gib", self.kv_gib, 1)):  # fmt: skip
            if value < least:
                raise UsageError(f"{flag} is {value}: it must be at least {least}")
        try:
            further = tuple(shlex.split(self.vllm_args))
        except ValueError as error:
            raise UsageError(f"--vllm-args {self.vllm_args!r}: {error}") from error
        for argument in further:  # where it listens must be known here
            if argument.partition("=")[0] in ("--host", "--port", "--uds") or argument.startswith("--ssl-"):
                raise UsageError(f"--vllm-args has {argument!r}: use serve's own --host and --port; there is no TLS")
        variables = template_variables(self.template_variables)
        from areal_agents.engines.context import fit_context
        from areal_agents.engines.vllm.server import ArgumentsRefused, Serving, require_servable, serve

        serving = Serving(
            model=Path(self.model),
            name=self.name or self.model,
            host=self.host,
            port=self.port,
            precision=self.precision,
            max_context=self.max_context,
            threads=self.threads,
            kv_gib=self.kv_gib,
            seed=self.seed,
            api_key_env=self.api_key_env or None,
            chat=ChatOptions(
                template_variables=variables, merge_system=self.merge_system, tool_format=self.tool_format
            ),
            arguments=further,
        )
        require_servable(serving)  # before a model is downloaded
        from areal_agents.models import resolve

        if self.host not in ("127.0.0.1", "localhost", "::1"):
            print(
                f"warning: everyone who reaches {self.host} may use this model: vLLM asks for a key (--api-key-env "
                "NAME) under /v1 alone, /invocations and /tokenize stay open. Put a proxy in front of it",
                file=sys.stderr,
            )
        model = resolve(self.model)
        context = fit_context(model, self.max_context, name="--max-context", default=type(self).max_context)
        serving = replace(serving, model=model, max_context=context)
        try:
            return asyncio.run(serve(serving, say=lambda text: print(text, flush=True)))
        except ArgumentsRefused as error:
            raise UsageError(str(error)) from error
