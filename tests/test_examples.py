"""``examples/``: what is shown there runs as it stands, learns, and stays short."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from areal_agents import Task
from tests.conftest import require

ROOT = Path(__file__).resolve().parents[1]
LOOP = ROOT / "examples" / "rl_loop.py"


def test_the_loop_to_read_first_is_short() -> None:
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
def test_the_loop_to_read_first_learns(tmp_path: Path) -> None:
    """Seeded: it prints the same numbers each time. Measured: 0.27 a turn pair in the first steps, 1.8 in the last."""
    done = subprocess.run(
        [sys.executable, "-W", "error", LOOP], cwd=tmp_path, capture_output=True, text=True, timeout=1200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rewards = [float(r) for r in re.findall(r"^step +\d+  reward (\d\.\d+)  sampled", done.stdout, re.MULTILINE)]
    assert len(rewards) == len(done.stdout.splitlines()) == 25
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.8
    assert not list(tmp_path.iterdir())


def example(name: str) -> Any:
    """A module of ``examples/``, as ``areal-agents check adventure:Keep`` finds it."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "examples"))


def adventure() -> Any:
    return example("adventure")


def played(task: Task, texts: Iterable[str]) -> tuple[float, str, dict[str, Any]]:
    """What a game earned, the last text and the last info."""
    env = adventure().Keep(sandbox=None)
    shown, _ = env.reset(seed=0, options={"task": task})
    earned, info = 0.0, {}
    for text in texts:
        shown, reward, terminated, truncated, info = env.step(text)
        earned += float(reward)
    env.close()
    assert terminated or truncated
    return earned, shown[-1].text if shown else "", info


@pytest.mark.parametrize("difficulty", [None, 0.5, 1.0])
def test_the_adventure_can_be_won_on_each_level(difficulty: float | None) -> None:
    game = adventure().Keep
    splits = {split: game.tasks(split, difficulty=difficulty) for split in ("train", "test")}
    train, test = ({t.content_hash for t in tasks} for tasks in splits.values())
    assert (len(train), len(test), train & test) == (128, 32, set())
    rooms = {None: 3, 0.5: 5, 1.0: 7}[difficulty]
    for task in splits["test"]:
        earned, text, info = played(task, game.expert(task))
        assert (text, info["stop_reason"], info["components"]["won"]) == ("You are out, with the crown.", "answer", 1.0)
        seen = round(info["components"]["rooms_seen"] * rooms)
        assert earned == pytest.approx(1 + 2 * 0.05 + 0.01 * (seen - 1))


def test_the_adventure_is_lost_in_the_dark_and_keeps_the_vault_shut() -> None:
    module = adventure()
    world = {
        "doors": {"gate": {"east": "hall"}, "hall": {"west": "gate", "north": "vault"}, "vault": {"south": "hall"}},
        "things": {"gate": [], "hall": ["key"], "vault": ["crown"]}, "lamp": 3,
    }  # fmt: skip
    task = Task.make("by-hand", split="test", seed=0, payload=world)
    go = [module.call("go", way=way) for way in ("west", "east", "north", "west", "east")]
    earned, text, info = played(task, go)
    assert earned == pytest.approx(0.01)
    assert (text, info["stop_reason"]) == ("Your lamp goes out. You are lost.", "answer")
    assert info["components"] == {"won": 0.0, "rooms_seen": pytest.approx(2 / 3)}
    assert task.payload["things"]["hall"] == ["key"]
    earned, _, info = played(task, [go[1], module.call("take", thing="key"), module.call("unlock"), "I rest."])
    assert earned == pytest.approx(0.06)
    assert info["components"]["won"] == 0.0


def test_the_office_pays_for_the_right_sum_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("bwrap")
    monkeypatch.setenv("AREAL_AGENTS_CACHE", str(tmp_path))
    module = example("office")
    sizes = {split: len(module.Office.tasks(split)) for split in ("train", "test")}
    assert sizes == {"train": 160, "test": 40}
    task = module.Office.tasks("test")[0]
    name, city, orders = module.customer(160)
    assert (task.payload["customer"], task.payload["city"]) == (name, city)
    env = module.Office()

    def play(texts: Iterable[str]) -> tuple[list[str], float, bool]:
        env.reset(seed=0, options={"task": task})
        shown, earned, ended = [], 0.0, False
        for text in texts:
            observation, reward, ended, *_ = env.step(text)
            shown.append(observation[0].text)
            earned += float(reward)
        return shown, earned, ended

    try:
        shown, earned, ended = play(module.Office.expert(task))
        assert (earned, ended) == (1.0, True)
        assert f"{city} | {sum(orders)}" in shown[0]
        assert f"discount of {module.DISCOUNTS[city]} percent" in shown[2].replace("**", "")
        undiscounted = [
            module.call("hand_in", path="../etc/passwd"), module.call("hand_in", path="none.txt"),
            module.call("write_file", path="a.txt", content=str(sum(orders))), module.call("hand_in", path="a.txt"),
        ]  # fmt: skip
        shown, earned, ended = play(undiscounted)
        assert [text.startswith("error: ") for text in shown] == [True, True, False, False]
        assert (earned, ended) == (0.0, True)
    finally:
        env.close()
