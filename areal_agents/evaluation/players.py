"""The players of an evaluation, on engines of this machine or with a model behind a chat server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from areal_agents.chat.format import ChatFormat
from areal_agents.chat_model import ChatReply
from areal_agents.engine import Engine, Sampling
from areal_agents.engine_kind import engine_kind
from areal_agents.errors import ConfigError
from areal_agents.models import resolve
from areal_agents.registry import EnvSpec
from areal_agents.rollout.chat_policy import ChatPolicy
from areal_agents.rollout.player import (
    EpisodePlayer,
    EventSink,
    LocalPlayer,
    PlayerSpec,
    env_maker,
    limits_of,
    no_events,
    require_prompts,
)
from areal_agents.settings.config import EngineConfig, TrainConfig
from areal_agents.types import Task
from areal_agents.utils.precision import is_slow, number_format

if TYPE_CHECKING:
    from areal_agents.engines.spec import EngineSpec

Opener = Callable[[EventSink], contextlib.AbstractAsyncContextManager[EpisodePlayer]]
"""Opens a player that tells an event sink, and ends what it opened."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server, for a model called ``openai:MODEL``."""

    url: str
    """Up to and including ``/v1``."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key."""
    concurrency: int = 16
    """Most requests, and episodes, at once."""
    requests_per_minute: float | None = None
    """Most requests started in a minute, retries included."""
    send_reasoning: bool = False
    """Whether the thinking that the server returned with a turn is sent back with it."""


@dataclass
class Served:
    """The models that answered, by their server's own names."""

    url: str = ""
    names: set[str] = field(default_factory=set)
    before: tuple[str, ...] = ()
    """The names that it had in earlier sittings; empty where there was none."""

    def __post_init__(self) -> None:
        self.names |= set(self.before)

    def see(self, reply: ChatReply) -> None:
        """Note the name of the model that answered.

        Raises ConfigError where an earlier sitting was answered by another one.
        """
        name = reply.model or "a model without a name"
        if self.before and name not in self.before:
            raise ConfigError(
                f"{self.url} answers as {name!r}, and answered as {', '.join(map(repr, self.before))} when the "
                "evaluation was begun: it is another model. Evaluate anew in another folder"
            )
        self.names.add(name)

    def text(self) -> str:
        return f"{', '.join(sorted(self.names))} at {self.url}" if self.url else ""


class KeptEngines:
    """The engines of one model, which several evaluations share.

        async with KeptEngines() as kept:
            await until_stopped(first, None, resume=True, kept=kept)
            await until_stopped(second, None, resume=True, kept=kept)

    They are opened when an evaluation first needs them, and again for one that needs others.
    """

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._engines: Engine | None = None
        self._spec: EngineSpec | None = None
        self._event: EventSink = no_events

    async def __aenter__(self) -> KeptEngines:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the engines. The next evaluation opens others."""
        self._engines = self._spec = None
        stack, self._stack = self._stack, contextlib.AsyncExitStack()
        await stack.aclose()

    @contextlib.asynccontextmanager
    async def lent(
        self, engine: EngineConfig, spec: EngineSpec, *, seed: int, event: EventSink
    ) -> AsyncIterator[Engine]:
        """Lend the engines to one evaluation, whose ``event`` is told what happens to them meanwhile."""
        from areal_agents.engines.local import open_engines

        self._event = event
        try:
            if self._engines is None or self._spec != spec:
                await self.close()
                _tell_slow_format(engine, event)
                opened = open_engines(engine, spec, seed=seed, event=lambda *a, **k: self._event(*a, **k))
                self._engines, self._spec = await self._stack.enter_async_context(opened), spec
            yield self._engines
        finally:
            self._event = no_events


def on_engines(config: TrainConfig, spec: EnvSpec, kept: KeptEngines | None = None) -> Opener:
    """Return what opens a player on engines of this machine, which end with it unless they are ``kept``.

    Raises ModelError or TemplateError at once.
    """
    from areal_agents.engines.local import engine_spec, engine_threads, open_engines

    folder, engine = resolve(config.model.path), config.engine
    fmt = ChatFormat.load(folder, config.model.chat)
    limits = limits_of(config)
    require_prompts(spec, fmt, limits)
    player = PlayerSpec(
        env=spec,
        model=folder,
        limits=limits,
        sampling=Sampling(limits.max_turn_tokens, temperature=config.eval.temperature, stop_ids=fmt.stop_ids),
        sandbox=config.env.sandbox,
        kwargs=config.env.kwargs,
        chat=config.model.chat,
    )
    on_gpu = _on_gpu(engine)
    number = number_format(engine.precision, gpu=on_gpu)
    one = engine_spec(
        engine, folder, max_context=limits.max_context, threads=engine_threads(engine), format=number, on_gpu=on_gpu
    )

    @contextlib.asynccontextmanager
    async def open(event: EventSink) -> AsyncIterator[EpisodePlayer]:
        lent: contextlib.AbstractAsyncContextManager[Engine]
        if kept is None:
            _tell_slow_format(engine, event)
            lent = open_engines(engine, one, seed=config.seed, event=event)
        else:
            lent = kept.lent(engine, one, seed=config.seed, event=event)
        async with lent as engines:
            yield player.build(engines, fmt=fmt, event=event)

    return open


def _on_gpu(engine: EngineConfig) -> bool:
    import torch  # heavy, as the engines: a served model needs neither

    return engine_kind(engine.kind).takes_gpus and torch.cuda.is_available()


def _tell_slow_format(engine: EngineConfig, event: EventSink) -> None:
    """Tell that engines which start now compute in a format that this processor has in software alone."""
    if is_slow(engine.precision, gpu=_on_gpu(engine)):
        event("slow_format", settings=["engine.precision"])


def on_server(config: TrainConfig, spec: EnvSpec, name: str, server: Server, served: Served) -> Opener:
    """Return what opens a player on a chat server.

    Raises ConfigError at once.

    Args:
        config: the settings. Of the engine's, request_timeout alone is used. The template's variables go along with
            each request, in the field ``chat_template_kwargs`` that vLLM and SGLang know.
        spec: the environment.
        name: the model's name for the server.
        server: where it is.
        served: is told every reply.
    """
    from areal_agents.engines.openai.client import OpenAIChat

    limits = limits_of(config)
    sampling = Sampling(limits.max_turn_tokens, temperature=config.eval.temperature)
    make_env = env_maker(spec, sandbox=config.env.sandbox, kwargs=config.env.kwargs)
    # As many episodes as requests run at once: a request waits for nothing but the turns of all others.
    waiting = 60.0 * server.concurrency / server.requests_per_minute if server.requests_per_minute else 0.0
    chat = OpenAIChat(
        name,
        base_url=server.url,
        api_key_env=server.api_key_env,
        deadline=limits.request_timeout + waiting,
        concurrency=server.concurrency,
        requests_per_minute=server.requests_per_minute,
        tool_format=config.model.tool_format,
        extra={"chat_template_kwargs": config.model.template_variables} if config.model.template_variables else None,
        send_reasoning=server.send_reasoning,
    )
    served.url = chat.url
    # Twice the client's own deadline, whose message is better.
    limits = replace(limits, request_timeout=2 * (limits.request_timeout + waiting))

    def policy(task: Task) -> ChatPolicy:
        return ChatPolicy(chat, sampling, limits, seen=served.see)

    @contextlib.asynccontextmanager
    async def open(event: EventSink) -> AsyncIterator[EpisodePlayer]:
        async with chat:
            await chat.require_answer()
            yield LocalPlayer(make_env, policy, limits, event=event)

    return open
