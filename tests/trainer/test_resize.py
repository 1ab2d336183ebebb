"""A run on this machine plays more or fewer episodes at once while it trains; its engines stay as they are."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from areal_agents import settings
from areal_agents.cli.main import main as command_line
from areal_agents.errors import ArealError, EngineError
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.control import ask
from areal_agents.trainer.loop import train
from areal_agents.trainer.resize import answer_resize
from areal_agents.types import AssistantMessage, Info, Observation
from tests.processes import until
from tests.trainer.test_resume import ManyLetters, check_lineage, config


class Held(ManyLetters):
    """Every training step waits until ``release`` is set."""

    waiting: ClassVar[int] = 0
    release: ClassVar[threading.Event] = threading.Event()

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        if self.task.split == "train" and not self.release.is_set():
            Held.waiting += 1
            await asyncio.to_thread(self.release.wait, 60)
        return await super().astep(action)


@pytest.mark.slow
def test_more_episodes_start_at_once_and_the_new_size_is_part_of_the_run(tmp_path: Path) -> None:
    Held.waiting = 0
    Held.release.clear()
    c = config(tmp_path, steps=4, env={"id": "tests.trainer.test_resize:Held"}, eval={"n": 1})
    lines: list[str] = []

    async def asked(**request: int) -> dict[str, Any]:
        return dict(await ask(c.out, request, message=lines.append))

    async def main() -> None:
        run = asyncio.create_task(train(c, console=False))
        try:
            await until(lambda: Held.waiting == 8)  # concurrency = 8: four groups of two
            with pytest.raises(ArealError, match=r"cluster\.backend = 'local' has this machine's cores"):
                await asked(replicas=2)
            with pytest.raises(ArealError, match="concurrency = 1 cannot hold one group of 2 episodes"):
                await asked(concurrency=1)
            with pytest.raises(ArealError, match="no size of a run"):
                await asked(engines=2)
            answer = await asked(concurrency=12)
            assert answer["before"] == {"replicas": 1, "rollout_workers": 1, "concurrency": 8}
            assert answer["after"] == {"replicas": 1, "rollout_workers": 1, "concurrency": 12}
            await until(lambda: Held.waiting == 12)  # six groups, which is also what the staleness bound admits
            assert (await asked(concurrency=4))["after"]["concurrency"] == 4
        finally:
            Held.release.set()
            await run

    asyncio.run(main())
    check_lineage(c)
    assert settings.load(c.out / "config.toml").rollout.concurrency == 4
    told = [json.loads(line) for line in (c.out / "events.jsonl").read_text().splitlines()]
    assert [e["concurrency"] for e in told if e["kind"] == "resized"] == [12, 4]
    assert sum(e["kind"] == "request_failed" for e in told) == 3
    assert not list((c.out / "control").iterdir())


def test_engines_that_came_before_growth_failed_are_taken_away_again() -> None:
    asked: list[int] = []
    saved: list[str] = []

    class Full:
        """Room for two engines: growth keeps those that fit, and says what did not."""

        places = 48

        async def set_replicas(self, n: int) -> None:
            asked.append(n)
            if n > 2:
                raise EngineError("no node has room")

    run: Any = SimpleNamespace(
        config=TrainConfig(), backend=SimpleNamespace(elastic=Full()), rollouts=None,
        folder=SimpleNamespace(write_settings=saved.append),
    )  # fmt: skip
    with pytest.raises(EngineError, match="no node has room"):
        asyncio.run(answer_resize(run, {"replicas": 4}))
    assert asked == [4, 1]
    assert (run.config.engine.replicas, saved) == (1, [])


def test_the_command_refuses_what_is_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").touch()
    for arguments, said in (
        ([str(tmp_path)], "name at least one of"),
        ([str(tmp_path), "--replicas", "0"], "--replicas is 0: it must be at least 1"),
        ([str(tmp_path), "--rollout-workers", "-1"], "--rollout-workers is -1"),
        ([str(tmp_path / "none"), "--concurrency", "4"], "holds no run"),
    ):
        assert command_line(["resize", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_a_finished_run_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").touch()
    (tmp_path / "commit.json").write_text('{"complete": true}')
    assert command_line(["resize", str(tmp_path), "--concurrency", "4"]) == 1
    assert capsys.readouterr().err == (
        f"error: the run in {tmp_path} is finished: there is nothing to resize. More steps: areal-agents train "
        f"{tmp_path / 'config.toml'} --resume --steps N\n"
    )
    assert not (tmp_path / "control").exists()
