"""One conformance suite for everything that is an ``Engine``: what it samples, for whom and when.

``SAMPLING`` holds for what computes, ``REQUESTS`` also for what is around it: a supervised engine, a pool on Ray. How
weights are updated is in ``engine_update_suite``. No check ends the engine, but for ``kill``, which runs last.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling
from areal_agents.errors import EngineError
from areal_agents.types import Completion, Image, Prompt
from tests.served import Served, ids_of
from tests.tiny_models import VOCABULARY, forward_logits

Check = Callable[[Served], Coroutine[Any, Any, None]]
ATTEMPTS = 50
"""What must happen while something else goes on is tried so often: on a busy machine a turn may end too early."""


# What is sampled.


async def greedy_turns_are_the_argmax(it: Served) -> None:
    """Alone, and in a batch with one that is not greedy; their log-probabilities are those of temperature 1."""
    ids = ids_of(20, 2)
    alone = await it.ask(ids, 15, "greedy", temperature=0.0)
    mixed, hot = await asyncio.gather(
        it.ask(ids, 15, "mixed", temperature=0.0), it.ask(ids, 15, "hot", temperature=1.7)
    )
    it.check(ids, alone)
    it.check(ids, mixed)
    it.check(ids, hot, 1.7)
    same_until_a_tie(it, ids, alone, mixed)
    logits = forward_logits(it.model.now, ids + alone.ids)[len(ids) - 1 : -1]
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > it.atol
    assert torch.equal(logits.argmax(-1)[clear], torch.tensor(alone.ids)[clear])


def same_until_a_tie(it: Served, ids: tuple[int, ...], one: Completion, other: Completion) -> None:
    """Two greedy turns of one prompt differ behind a tie at most."""
    same = next((i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b), len(one.ids))
    if same < len(one.ids):
        top = forward_logits(it.model.now, ids + one.ids[:same])[-1].topk(2).values
        assert float(top[0] - top[1]) < it.atol
    it.close(other.logprobs[:same], torch.tensor(one.logprobs[:same]))


async def a_crowd_gets_what_each_gets_alone(it: Served) -> None:
    """Greedy requests of random lengths that arrive at random moments, six times as many as fit the batch."""
    rng = random.Random(7)
    jobs = [(ids_of(rng.randint(1, 90), 100 + i), rng.randint(1, 40)) for i in range(6 * it.batch)]
    alone = [await it.ask(ids, n, f"alone{i}", temperature=0.0) for i, (ids, n) in enumerate(jobs)]

    async def later(i: int) -> Completion:
        for _ in range(rng.randint(0, 30)):
            await it.engine.health()  # a round trip: spreads arrivals over decode steps
        return await it.ask(*jobs[i], f"crowd{i}", temperature=0.0)

    crowd = await asyncio.gather(*[later(i) for i in range(len(jobs))])
    for (ids, _), one, other in zip(jobs, alone, crowd, strict=True):
        same_until_a_tie(it, ids, one, other)


async def a_short_turn_overtakes_a_long_one(it: Served) -> None:
    for attempt in range(ATTEMPTS):
        order: list[str] = []

        async def run(name: str, tokens: int, attempt: int = attempt, order: list[str] = order) -> Completion:
            done = await it.ask(ids_of(9, tokens), tokens, f"{name}{attempt}")
            order.append(name)
            return done

        async with it.begun(run("long", it.long)):
            await run("short", 2)
        if order == ["short", "long"]:
            return
    raise AssertionError("a short turn waits for a long one")


async def a_group_shares_its_prompt(it: Served) -> None:
    """Three times as many requests as fit the batch; each has its own tokens, with exact log-probabilities."""
    ids = ids_of(60, 5)
    group = await asyncio.gather(*[it.ask(ids, 10, f"g{i}") for i in range(3 * it.batch)])
    assert len({done.ids for done in group}) > 1
    for done in group:
        it.check(ids, done)


async def seeds_repeat(it: Served) -> None:
    ids = ids_of(10, 6)
    one, two = [await it.ask(ids, 20, f"seed{i}", seed=9) for i in range(2)]
    other = await it.ask(ids, 20, "seed2", seed=10)
    assert one.ids == two.ids != other.ids


async def a_seed_repeats_in_a_crowd(it: Served) -> None:
    """Whoever else asks, before it or after it, with a seed or without."""
    ids = ids_of(10, 6)
    alone = await it.ask(ids, 20, "alone", seed=9)
    others = [it.ask(ids_of(5 + i, i), 25, f"other{i}", seed=9 + i if i % 2 else None) for i in range(3 * it.batch)]
    middle = len(others) // 2
    crowd = await asyncio.gather(*others[:middle], it.ask(ids, 20, "crowd", seed=9), *others[middle:])
    assert crowd[middle].ids == alone.ids


async def filters_apply(it: Served) -> None:
    """Log-probabilities are of the filtered distribution."""
    ids = ids_of(12, 10)
    filters: dict[str, Any] = {"top_k": {"top_k": 3}, "top_p": {"top_p": 0.6}, "min_p": {"min_p": 0.2}}
    for name, options in filters.items():
        done = await it.ask(ids, 8, name, **options)
        logits = forward_logits(it.model.now, ids + done.ids)[len(ids) - 1 : -1]
        kept = torch.stack([{"top_k": top_k, "top_p": top_p, "min_p": min_p}[name](row) for row in logits])
        tokens = torch.tensor(done.ids)[:, None]
        assert bool(kept.gather(-1, tokens).all())
        filtered = logits.masked_fill(~kept, -torch.inf)
        it.close(done.logprobs, torch.log_softmax(filtered, -1).gather(-1, tokens)[:, 0])


def top_k(row: torch.Tensor) -> torch.Tensor:
    return row >= row.topk(3).values[-1]


def top_p(row: torch.Tensor) -> torch.Tensor:
    ordered, index = torch.softmax(row, -1).sort(descending=True)
    kept = torch.zeros_like(row, dtype=torch.bool)
    kept[index[ordered.cumsum(-1) - ordered < 0.6]] = True
    return kept


def min_p(row: torch.Tensor) -> torch.Tensor:
    probabilities = torch.softmax(row, -1)
    return probabilities >= 0.2 * probabilities.max()


# For whom, until when.


async def turns_equal_a_forward_pass(it: Served) -> None:
    """Three turns with the KV kept between them, at three temperatures, until the session is released."""
    ids = ids_of(70, 1)
    for turn, temperature in enumerate((1.0, 0.7, 1.5)):
        done = await it.ask(ids, 12, "turns", temperature=temperature, seed=turn)
        assert (len(done.ids), done.finish, done.versions) == (12, "length", (it.version,) * 12)
        it.check(ids, done, temperature)
        ids = ids + done.ids + ids_of(5, turn)
    kept = it.reusable(len(ids) - 6)  # of the last token nothing was computed, of the five after it neither
    health = await it.engine.health()
    assert health.ok
    assert (health.running, health.waiting, health.version) == (0, 0, it.version)
    assert health.kv_tokens >= kept
    await it.engine.release("nobody")
    await it.engine.release("turns")
    await it.until(lambda now: now.kv_tokens <= health.kv_tokens - kept)


async def rewritten_turns_equal_a_forward_pass(it: Served) -> None:
    """The history of a session that changes behind its beginning, becomes shorter, branches and goes on."""
    opening, ids = ids_of(40, 5), ids_of(120, 5)  # the first 40 of both are the same
    for turn in range(2):
        done = await it.ask(ids, 8, "rewritten", seed=turn)
        it.check(ids, done)
        ids = ids + done.ids + ids_of(30, turn)
    branch = ids[:-30] + ids_of(7, 60)  # before what was shown last: it asks for a summary
    it.check(branch, await it.ask(branch, 8, "rewritten", seed=3))
    short = opening + ids_of(11, 61) + ids[-60:]
    for turn in range(2):
        done = await it.ask(short, 8, "rewritten", seed=4 + turn)
        it.check(short, done)
        short = short + done.ids + ids_of(5, turn)
    await it.engine.release("rewritten")


async def turns_end_at_stop_ids_and_limits(it: Served) -> None:
    ids = ids_of(20, 8)
    free = await it.ask(ids, 20, "free", temperature=0.0)
    stop = free.ids[6]
    first = free.ids.index(stop)
    done = await it.ask(ids, 20, "stop", temperature=0.0, stop_ids=(stop,))
    assert done.ids == free.ids[: first + 1]
    assert len(done.logprobs) == first + 1
    assert (done.finish, free.finish) == ("stop", "length")
    full = await it.ask(ids_of(it.context - 6, 9), 20, "full")  # 6 positions are left
    assert (len(full.ids), full.finish) == (6, "length")


async def what_cannot_be_sampled_is_refused(it: Served) -> None:
    n = it.context
    with pytest.raises(EngineError, match=f"the prompt has {n} tokens and max_context is {n}"):
        await it.ask(ids_of(n, 9), 1, "over")
    with pytest.raises(EngineError, match=r"prompt ids range over 0..96, the model's over 0..95"):
        await it.ask((0, VOCABULARY), 1, "vocabulary")
    with pytest.raises(EngineError, match="images"):
        await it.engine.generate(Prompt((1,), (Image("x"),)), Sampling(1), session="image", deadline=5)
    ids = ids_of(9, 4)
    it.check(ids, await it.ask(ids, 5, "over"))


async def cancelled_turns_free_their_kv(it: Served) -> None:
    """Six times the KV that there is, taken and cancelled: the last turns could not run if any of it were lost."""
    tokens, taken = min(it.long, 200), 0
    while taken < 6 * it.kv_tokens:
        before = (await it.idle()).kv_tokens
        cancelled = await _begin_and_cancel(
            it, [it.ask(ids_of(50, taken + k), tokens, f"c{k}") for k in range(it.batch)]
        )
        taken += cancelled * (50 + tokens)
        after = (await it.idle()).kv_tokens
        assert after <= (before if cancelled == it.batch else it.kv_tokens)
    done = await asyncio.gather(*[it.ask(ids_of(200, 70 + k), 50, f"c{k}") for k in range(it.batch)])
    assert [len(each.ids) for each in done] == [50] * it.batch  # their sessions are free again too


async def _begin_and_cancel(it: Served, turns: list[Coroutine[Any, Any, Completion]]) -> int:
    """How many of ``turns`` were cancelled after the first had begun, and before they ended."""
    tasks = [asyncio.create_task(turn) for turn in turns]
    await it.until(lambda health: health.running > 0 or all(task.done() for task in tasks))
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError | Completion) for end in ends)
    return sum(isinstance(end, asyncio.CancelledError) for end in ends)


async def a_deadline_ends_a_turn(it: Served) -> None:
    with pytest.raises(EngineError, match=r"no completion of session 'late' within 0\.0"):
        await it.ask(ids_of(50, 12), min(it.long, 200), "late", deadline=0.02)
    await it.idle()
    again = await it.ask(ids_of(50, 12), 20, "late")  # the session is free
    assert len(again.ids) == 20
    it.check(ids_of(50, 12), again)


REQUESTS: dict[str, Check] = {
    check.__name__: check
    for check in (
        turns_equal_a_forward_pass,
        rewritten_turns_equal_a_forward_pass,
        turns_end_at_stop_ids_and_limits,
        what_cannot_be_sampled_is_refused,
        cancelled_turns_free_their_kv,
        a_deadline_ends_a_turn,
    )
}
SAMPLING: dict[str, Check] = {
    check.__name__: check
    for check in (
        greedy_turns_are_the_argmax,
        a_crowd_gets_what_each_gets_alone,
        a_short_turn_overtakes_a_long_one,
        a_group_shares_its_prompt,
        seeds_repeat,
        a_seed_repeats_in_a_crowd,
        filters_apply,
    )
}


async def kill(it: Served) -> None:
    """Every call of an engine whose process was killed fails and says why, the pending ones too. It is its end."""
    pid: int = it.engine.pid
    pending = [asyncio.create_task(it.ask(ids_of(9, i), it.long, f"k{i}")) for i in range(it.batch + 2)]
    await it.until(lambda health: health.running > 0)
    os.kill(pid, signal.SIGSTOP)
    certain = [asyncio.create_task(it.ask(ids_of(9, i), 1, f"k{i}")) for i in range(10, 12)]
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    ends = await asyncio.gather(*pending, *certain, return_exceptions=True)
    errors = [end for end in ends if not isinstance(end, Completion)]  # it may have been quick
    assert errors[-2:] == ends[-2:]
    for error in errors:
        assert isinstance(error, EngineError)
        assert "exit code -9 (SIGKILL)" in str(error)
    assert "SIGKILL" in it.engine.failure
    with pytest.raises(EngineError, match="SIGKILL"):
        await it.ask((1,), 1, "later")
    health = await it.engine.health()
    assert not health.ok
    assert "SIGKILL" in health.detail
    await it.engine.release("k0")
    await it.engine.close()
    await it.engine.close()
