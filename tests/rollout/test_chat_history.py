"""Long histories of chat models, whose servers say how many tokens they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.chat_model import ChatReply
from areal_agents.context import HEAD, Context
from areal_agents.engine import Sampling
from areal_agents.errors import ConfigError
from areal_agents.finetune.episodes import _rows
from areal_agents.finetune.messages import RowRefused
from areal_agents.rollout.chat_policy import ChatPolicy
from areal_agents.rollout.episode import Limits
from areal_agents.types import AssistantMessage, Message, Trajectory, user
from tests.pages_env import PAGES, Pages, call
from tests.pages_played import FMT, KINDS, LIMITS, TURN, Reader, messages_of, play, rule_of, small


class Model:
    """A chat model that reads pages, counts its tokens as a server does, and keeps what it was sent."""

    def __init__(self, *, counts: bool = True) -> None:
        self.read, self.counts = 0, counts
        self.sent: list[list[Message | AssistantMessage]] = []

    async def chat(self, messages: Any, tools: Any, sampling: Sampling) -> AssistantMessage:
        return (await self.reply(messages, tools, sampling)).message

    async def reply(self, messages: Sequence[Message | AssistantMessage], tools: Any, sampling: Sampling) -> ChatReply:
        self.sent.append(list(messages))
        if messages[-1] == user("sum up"):
            text = f"page {self.read} read"
        else:
            self.read += 1
            text = call(self.read - 1) if self.read <= PAGES else "dog"
        said = replace(parse_text(text), tokens=None)
        counted = (len(FMT.first_prompt(messages, tools)), len(FMT.encode_turn(text))) if self.counts else (None, None)
        return ChatReply(said, *counted)


def chat(model: Model, rule: Context | None, limits: Limits) -> Trajectory:
    policy = ChatPolicy(model, Sampling(TURN), limits)
    policy.limits = limits  # type: ignore[attr-defined]  # `play` asks for them
    return play(policy, rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_where_it_would_have_ended(kind: str) -> None:
    limits = small(pages=4.5)
    assert chat(Model(), None, limits).stop_reason == "context"
    model = Model()
    t = chat(model, rule_of(kind, at=0.75), limits)
    assert (t.stop_reason, t.turns[t.last_step].components["right"]) == ("answer", 1.0)
    assert len(t.steps) == PAGES + 1
    rewritten = [k for k, turn in enumerate(t.turns) if turn.rewritten is not None]
    assert t.metrics["context_folds" if kind == "fold" else "context_summaries"] == len(rewritten) > 0
    assert model.sent == messages_of(t), "what was sent is what the record says"
    for k in rewritten:
        assert t.turns[k].parent is None
    assert max(len(FMT.first_prompt(sent, Pages.tools)) for sent in model.sent) < limits.max_context
    if kind == "summary":
        s = rewritten[0] - 1
        assert (t.turns[s].kind, t.turns[s].parent, t.turns[s].reward) == ("summary", s - 1, 0.0)
        assert model.sent[s][-1] == user("sum up")
        assert user(f"{HEAD}page {s} read") in model.sent[s + 1]


def test_without_reported_tokens_nothing_is_rewritten_and_it_is_counted() -> None:
    model = Model(counts=False)
    t = chat(model, rule_of("fold"), replace(LIMITS, max_context=200))
    assert (t.stop_reason, t.metrics["context_folds"], t.metrics["context_unknown"]) == ("answer", 0.0, PAGES + 1)
    assert "context_unknown" not in chat(Model(counts=False), None, LIMITS).metrics


def test_limits_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Fold\(at=0.9\) of model.max_context = 60"):
        chat(Model(), rule_of("fold"), replace(LIMITS, max_context=60))


def test_imitation_leaves_it_out_for_it_has_no_prompts() -> None:
    t = chat(Model(), rule_of("fold", at=0.75), small(pages=4.5))
    with pytest.raises(RowRefused, match="its history was rewritten"):
        _rows(t, FMT, None, last=False)  # type: ignore[arg-type]  # the run is not asked
    policy = Reader(limits=small())
    played = play(policy, rule_of("fold"))
    rows = _rows(played, FMT, None, last=False)  # type: ignore[arg-type]
    assert sum(int(row.mask.sum()) for row in rows) == played.sampled_tokens
