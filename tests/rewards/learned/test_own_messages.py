"""A learned reward model that is asked what an author's function chooses, also where that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import InfraError, RewardError
from areal_agents.rewards import reward_model
from areal_agents.rewards.learned.server import ModelServer, WorkerSettings
from tests.rewards.learned.test_reward_model import direct, saved, scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ModelServer]:
    server = ModelServer(WorkerSettings(str(folder)))
    yield server
    server.close()


@pytest.mark.parametrize(
    "returned", [[("user", 3)], [("user", None)], [("user", b"x")], [("user", "a", "b")], [], "hello", {"user": "a"}, 3]
)
def test_messages_that_are_no_roles_and_texts_are_the_functions_fault(server: ModelServer, returned: Any) -> None:
    before = server.replaced
    with pytest.raises(RewardError, match=r"task 't': messages returned .*a role and a text of each message"):
        scores(reward_model(server.settings.folder, worst=0.0, messages=lambda e: returned, server=server), "12")
    assert server.replaced == before


def test_what_the_servers_thread_meets_ends_no_other_call(folder: Path, server: ModelServer) -> None:
    row: Any = {"role": "user", "content": b"no text"}  # no reward sends this: JSON cannot hold it
    with pytest.raises(InfraError, match="gave no score: TypeError"):
        server.submit([row]).result(120)
    assert scores(reward_model(folder, worst=0.0, server=server), "12")[0].score == pytest.approx(
        direct(folder, "12")[0], abs=1e-4
    )
