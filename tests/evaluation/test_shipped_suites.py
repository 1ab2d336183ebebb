"""The shipped suites, entry by entry: each starts and ends, and its limits leave room for who knows the way."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.cli.main import main
from areal_agents.evaluation.suite import load_suite
from areal_agents.evaluation.suite_cells import Chosen, chosen_of
from areal_agents.rollout.demonstrations import ExpertPolicy
from areal_agents.rollout.limits import Limits
from areal_agents.rollout.player import LocalPlayer, env_maker
from areal_agents.rollout.script import expert_of
from areal_agents.settings.config import TrainConfig
from areal_agents.types import Task, Trajectory
from tests.conftest import require
from tests.doc_blocks import ROOT
from tests.tiny_models import tiny_chat_model

pytestmark = pytest.mark.slow
FULL = ROOT / "configs" / "suites" / "full.toml"


def test_every_entry_of_the_full_suite_starts_and_ends(tmp_path: Path) -> None:
    """With one task an entry, and a model that says anything: a few tokens a turn."""
    require("bwrap")
    model = tiny_chat_model(tmp_path / "tiny")
    sizes = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (model / "config.json").write_text(json.dumps(sizes))
    small = {r"n = 128": "n = 1", r"seeds = .*": "seeds = [0]", r"max_turns = .*": "max_turns = 2"}
    text = FULL.read_text("utf-8")
    for key, value in (small | {r"max_turn_tokens = \d+": "max_turn_tokens = 8"}).items():
        text, count = re.subn(key, value, text)
        assert count == 15, key
    suite = tmp_path / "small.toml"
    suite.write_text(text)
    command = ["eval", str(suite), "--model", str(model), "--model.max-context", "8192", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    board = json.loads((tmp_path / "out" / "full-v2" / "leaderboard.json").read_text())
    assert board["complete"]
    assert [(s["n"], s["attempts"]) for s in board["scores"]] == [(1, 1)] * 15
    reports = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*/report.json")]
    assert [report["infra_rate"] for report in reports] == [0.0] * 15


async def by_experts(one: Chosen, fmt: ChatFormat, count: int) -> list[Trajectory]:
    """Have the expert play the first tasks of an entry."""
    limits = Limits(
        max_context=1 << 30, max_turn_tokens=1 << 30, max_episode_tokens=1 << 30, max_turns=1000, step_timeout=120.0,
        request_timeout=120.0,
    )  # fmt: skip

    def policy(task: Task) -> ExpertPolicy:
        expert = expert_of(one.spec, task)
        assert expert is not None
        return ExpertPolicy(expert, task, fmt, limits)

    player = LocalPlayer(env_maker(one.spec, sandbox="bubblewrap", kwargs=one.entry.kwargs), policy, limits)
    try:
        plays = (player.play(task, id=task.id, group="g", seed=0) for task in one.tasks[:count])
        return list(await asyncio.gather(*plays))
    finally:
        await player.close()


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_an_entrys_limits_leave_room_for_an_expert(suite: str, smollm2: Path) -> None:
    """In turns, in tokens a turn, and in the context that a run has by default."""
    require("bwrap")
    fmt = ChatFormat.load(smollm2)
    for one in chosen_of(load_suite(suite)):
        entry = one.entry
        for played in asyncio.run(by_experts(one, fmt, 3)):
            said = [len(turn.completion.ids) for turn in played.turns]
            shown = sum(len(turn.prompt_suffix) for turn in played.turns)
            assert played.stop_reason == "answer", entry.name
            assert played.reward == pytest.approx(1.0), entry.name
            assert len(said) <= entry.max_turns, entry.name
            assert max(said) <= entry.sampling.max_turn_tokens, entry.name
            assert shown + sum(said) <= TrainConfig().model.max_context, entry.name
