"""What the members of a group wait for, and how its connections end, without a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from areal_agents.weights import process_group
from areal_agents.weights.process_group import _abort, _meet


def test_members_go_on_once_all_are_here() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(_meet, store, rank, 3, 60.0) for rank in (2, 0, 1)]:
            done.result()


def test_a_member_that_never_comes_meets_the_deadline() -> None:
    store = HashStore()
    store.set("met/1", "")
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        _meet(store, 0, 3, 0.2)


def test_connections_that_do_not_close_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_LAST_SECONDS", 0.05)
    closed = threading.Event()
    try:
        with pytest.raises(RuntimeError, match=r"did not close the connections of a round within 0\.05 s"):
            _abort(SimpleNamespace(abort=closed.wait))
    finally:
        closed.set()
    _abort(SimpleNamespace(abort=lambda: None))
