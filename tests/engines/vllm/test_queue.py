"""Admission to vLLM: who gets in, under which salt, and what an update throws away."""

from __future__ import annotations

import pytest

from areal_agents.engine import Sampling
from areal_agents.engines.vllm.queue import Queue, QueuedRequest
from areal_agents.errors import EngineError


def queue(*, max_batch: int = 2, blocks: int = 10) -> Queue:
    return Queue(max_batch, blocks, block=32, max_context=256, vocabulary=96)


def submit(it: Queue, id: int, prompt: int = 40, tokens: int = 20, session: str = "") -> QueuedRequest:
    return it.submit(id, session or f"s{id}", tuple(range(prompt)), Sampling(tokens))


def ids(requests: list[QueuedRequest]) -> list[int]:
    return [request.id for request in requests]


def test_requests_are_admitted_in_order_within_the_batch_and_the_blocks() -> None:
    it = queue(max_batch=3)
    first = submit(it, 1, 90, 60)  # 150 tokens: 5 blocks
    submit(it, 2, 90, 70)  # 5 blocks
    submit(it, 3, 10, 10)  # 1 block, but first come, first served
    assert ids(it.admit()) == [1, 2]
    assert it.reserved == 10
    it.finish(first, computed=149)
    assert ids(it.admit()) == [3]
    assert it.idle == {"s1": 128}
    assert it.reserved == 6


def test_the_batch_is_a_limit_too_and_a_completion_is_cut_to_the_context() -> None:
    it = queue(max_batch=1)
    long = submit(it, 1, 90, 1000)
    submit(it, 2)
    assert (long.max_tokens, long.blocks) == (166, 8)
    assert ids(it.admit()) == [1]
    assert ids(it.admit()) == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), Sampling(1), "the prompt is empty"),
        ((1,), Sampling(0), "max_tokens is 0"),
        ((0, 96), Sampling(1), r"prompt ids range over 0\.\.96, the model's over 0\.\.95"),
        ((-1, 3), Sampling(1), r"range over -1\.\.3"),
        ((1,) * 256, Sampling(1), "256 tokens and max_context is 256"),
        ((1,) * 100, Sampling(100), "200 tokens, the engine's kv_tokens is 96"),
        ((1,), Sampling(1, temperature=0.005), r"below 0\.01"),
        ((1,), Sampling(1, seed=-1), "seed -1 is not in 0"),
        ((1,), Sampling(1, seed=2**63), "seed 9223372036854775808 is not in 0"),
        ((1,), Sampling(1, top_k=-1), "top_k -1 is not in 0"),
        ((1,), Sampling(1, top_k=2**31), "top_k 2147483648 is not in 0"),
        ((1,), Sampling(1, stop_ids=(3, -1)), "stop id -1 is not in 0"),
        ((1,), Sampling(1, stop_ids=(2**31,)), "stop id 2147483648 is not in 0"),
    ],
)
def test_requests_that_can_never_run(prompt: tuple[int, ...], sampling: Sampling, message: str) -> None:
    it = queue(blocks=3)
    with pytest.raises(EngineError, match=message):
        it.submit(1, "s", prompt, sampling)
    it.submit(2, "s", (1,), Sampling(1, seed=2**63 - 1, top_k=2**31 - 1, stop_ids=(0, 95)))
    with pytest.raises(EngineError, match="already has a running request"):
        it.submit(3, "s", (1,), Sampling(1))


def test_a_recompute_changes_the_salt_of_those_who_wait_and_drops_what_is_idle() -> None:
    it = queue()
    done = submit(it, 1, session="a")
    it.admit()
    it.finish(done, computed=59)
    running, waiting = submit(it, 2), submit(it, 3)
    it.max_batch = 1
    assert ids(it.admit()) == [2]
    assert it.update(kv="recompute", cleared=False, computed=lambda r: 50) == 32 + 50
    assert it.update(kv="recompute", cleared=False, computed=lambda r: 50) == 0  # counted once
    assert (running.salt, running.stale) == ("areal-0", True)
    it.finish(running, computed=59)
    assert it.idle == {}  # its KV is of the old salt: no later turn can find it
    it.admit()
    assert waiting.salt == "areal-2"
    it.finish(waiting, computed=64)
    assert it.idle == {"s3": 64}


def test_keep_keeps_salt_and_idle_kv_and_a_cleared_cache_begins_anew() -> None:
    it = queue()
    done, running = submit(it, 1), submit(it, 2)
    it.admit()
    it.finish(done, computed=59)
    assert it.update(kv="keep", cleared=False, computed=lambda r: 50) == 0
    assert (it.idle, it.salt) == ({"s1": 32}, "areal-0")
    assert it.update(kv="keep", cleared=True, computed=lambda r: 50) == 82
    assert (it.idle, it.salt, running.stale) == ({}, "areal-0", False)  # its KV is all of the new version


def test_a_request_given_back_keeps_its_place() -> None:
    it = queue(max_batch=1)
    first = submit(it, 1)
    submit(it, 2)
    it.admit()
    it.restart(first)
    assert ids(it.waiting) == [1, 2]
    assert it.reserved == 0
    with pytest.raises(EngineError, match="already has"):
        submit(it, 3, session="s1")


def test_release_and_eviction() -> None:
    it = queue(blocks=4)
    for id in (1, 2, 3):
        submit(it, id, 40, 20)
        it.admit()
        it.finish(it.running[id], computed=59)
    assert list(it.idle) == ["s1", "s2", "s3"]
    it.release("s2")
    it.release("unknown")
    big = submit(it, 4, 60, 30)  # 3 of 4 blocks: one stays for idle KV
    it.admit()
    assert it.idle == {"s3": 32}
    it.release("s4")
    it.finish(big, computed=89)
    assert it.idle == {"s3": 32}
    waiting = submit(it, 5)
    it.finish(waiting)
    assert not it.waiting
