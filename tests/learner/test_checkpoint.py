"""A learner's state on a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from areal_agents.learner.checkpoint import write_state
from tests.small_disk import fill, small_disk


@pytest.mark.parametrize("room", [0, 1 << 12, 1 << 16, 3 << 16])
def test_a_full_disk_is_named_wherever_it_fills_up(tmp_path: Path, room: int) -> None:
    large = torch.zeros(300_000)
    state = {"a": large, "b": [torch.zeros(1000) for _ in range(50)]}
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, room)
        with pytest.raises(OSError, match="No space left on device"):
            write_state(disk / "state.pt", state)
    write_state(tmp_path / "state.pt", state)
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(read["a"], large)
    assert len(read["b"]) == 50
