"""Episodes of ``Pages`` in a context that is too small for them, and the rules that get them through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from areal_agents.algorithms.batch import rows_of
from areal_agents.chat.format import ChatFormat
from areal_agents.context import Context, Fold, RuleSummary, Summary, applied
from areal_agents.env import AgentEnv
from areal_agents.evaluation.replay import ReplayReport, replay
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.token_policy import TokenPolicy
from areal_agents.tracking.trajectories import Record
from areal_agents.types import AssistantMessage, Completion, Ids, Message, Prompt, Trajectory, system, user
from tests.pages_env import PAGES, Pages, call
from tests.tiny_tokenizer import CHATML, tiny

FMT = ChatFormat(tiny(CHATML))
TASK = Pages.tasks("train")[0]
OPENING = (system("Read."), user("task 0"))
TURN = 60
"""The longest turn: a call has about 30 tokens here."""
LIMITS = Limits(
    max_context=100_000, max_turn_tokens=TURN, max_episode_tokens=10_000, max_turns=30, step_timeout=60.0,
    request_timeout=60.0,
)  # fmt: skip


class Reader(TokenPolicy):
    """Reads page after page and then says the answer. Asked for a summary, it says how often it was asked."""

    def __init__(self, fmt: ChatFormat = FMT, limits: Limits = LIMITS, *, summary: str = "page {} read") -> None:
        super().__init__(fmt, limits)
        self.read, self.summaries, self.summary = 0, 0, summary
        self.prompts: list[Ids] = []

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        self.read += 1
        return self._say(call(self.read - 1) if self.read <= PAGES else "dog", prompt, max_tokens, episode)

    async def sample_summary(self, prompt: Prompt, max_tokens: int, asked: Any, episode: EpisodeDriver) -> Completion:
        self.summaries += 1
        return self._say(self.summary.format(self.read), prompt, max_tokens, episode)

    def _say(self, text: str, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        self.prompts.append(prompt.ids)
        whole = self.fmt.encode_turn(text, episode.tools, prompt.ids)
        ids, k = whole[:max_tokens], len(self.prompts)
        finish: Any = "stop" if len(ids) == len(whole) else "length"
        return Completion(ids, tuple(-k - i / 1000 for i in range(len(ids))), (k,) * len(ids), finish)


def play(policy: TokenPolicy, rule: Context | None, make: Callable[[], AgentEnv] | None = None) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        made = make or (lambda: Pages(sandbox=None, context=rule))
        try:
            limits = policy.limits
            episode = EpisodeDriver(made, TASK, policy, host, "e", 7, limits.step_timeout, limits.max_turns)
            await episode.play()
            return episode.trajectory("g")
        finally:
            await host.close()

    return asyncio.run(main())


def small(fmt: ChatFormat = FMT, pages: float = 4.5, **changes: Any) -> Limits:
    """A context that holds so many pages."""
    on = Reader(fmt)
    play(on, None)
    first, last = len(on.prompts[0]), len(on.prompts[-1])
    return replace(LIMITS, max_context=round(first + pages * (last - first) / PAGES), **changes)


def rule_of(kind: str, **more: Any) -> Context:
    made: dict[str, Callable[[], Context]] = {
        "fold": lambda: Fold(**{"keep": 1, "at": 0.9, **more}),
        "rule": lambda: RuleSummary(write=told, **{"at": 0.9, **more}),
        "summary": lambda: Summary(**{"prompt": "sum up", "at": 0.8, "max_tokens": 40, **more}),
    }
    return made[kind]()


def told(messages: Sequence[Message | AssistantMessage]) -> str:
    return f"{sum(isinstance(m, AssistantMessage) for m in messages)} turns, {len(messages)} messages"


KINDS = ("fold", "rule", "summary")


def once(t: Trajectory, prompts: Sequence[Ids]) -> None:
    """Each turn trains in exactly one row, its labels are its own, and before it stands the prompt it answered."""
    rows = rows_of(t, [float(k) for k in range(len(t.turns))], episode=0)
    trained = sorted(int(k) for row in rows for k in row.turns[row.mask])
    assert trained == [k for k, turn in enumerate(t.turns) for _ in turn.completion.ids]
    for row in rows:
        for k in set(row.turns[row.mask].tolist()):
            where = row.turns == k
            done = t.turns[k].completion
            assert tuple(row.ids[where].tolist()) == done.ids
            assert row.logprobs[where] == pytest.approx(done.logprobs)
            assert tuple(row.versions[where].tolist()) == done.versions
            assert tuple(row.ids[: int(where.argmax())].tolist()) == prompts[k]


def messages_of(t: Trajectory) -> list[list[Message | AssistantMessage]]:
    """The history that each turn answered, by the record alone."""
    found: list[list[Message | AssistantMessage]] = []
    history: list[Message | AssistantMessage] = []
    for turn in t.turns:
        if turn.kind == "summary":
            found.append([*history, *turn.observation])
            continue
        history += turn.observation
        if turn.rewritten is not None:
            history = list(applied(turn.rewritten, history))
        found.append(list(history))
        history.append(turn.message)
    return found


def again(t: Trajectory, rule: Context | None) -> ReplayReport:
    def make() -> AgentEnv:
        return Pages(sandbox=None, context=rule if rule is not None else {"kind": "none"})

    return asyncio.run(replay(Record("train", 1, t), make, seed=7, fmt=FMT, max_turns=30))
