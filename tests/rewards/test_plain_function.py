"""Plain functions as rewards: threads, deadlines, slots shared by event loops, and what a late call becomes."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest

from areal_agents.errors import ConfigError, InfraError, RewardError
from areal_agents.evaluation.rescore import load_reward
from areal_agents.reward import Episode, Gate, Verdict, WeightedSum, judge
from areal_agents.rewards import reward_function
from areal_agents.rewards.call_slots import CallSlots
from areal_agents.types import AssistantMessage, Task, Text, user

EPISODE = Episode(
    Task.make("t", split="train", seed=0, payload={}), (user("?"), AssistantMessage((Text("42"),))), "42", (), "answer"
)
TENANT: contextvars.ContextVar[str] = contextvars.ContextVar("tenant")


@reward_function(timeout=60)
def at_module_level(episode: Episode) -> float:
    return float(episode.answer == "42")


def scored(reward: Any, episode: Episode = EPISODE) -> Verdict:
    return asyncio.run(judge(reward, episode))


def test_a_sync_function_runs_on_a_thread_and_the_loop_goes_on() -> None:
    opened = threading.Event()

    @reward_function(timeout=60)
    def blocks(episode: Episode) -> float:
        assert opened.wait(30)
        return 0.25

    async def main() -> Verdict:
        waiting = asyncio.ensure_future(judge(blocks, EPISODE))
        await asyncio.sleep(0)
        opened.set()  # a loop that the function blocked would never come here
        return await waiting

    assert asyncio.run(main()) == Verdict(0.25, {"blocks": 0.25})


def test_an_async_function_runs_on_its_own_loop() -> None:
    seen: list[asyncio.AbstractEventLoop] = []

    @reward_function(timeout=60)
    async def later(episode: Episode) -> bool:
        seen.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return True

    async def main() -> None:
        assert (await judge(later, EPISODE)).score == 1.0
        assert seen == [asyncio.get_running_loop()]

    asyncio.run(main())


def test_whatever_is_called_may_be_decorated() -> None:
    class Judge:
        async def __call__(self, episode: Episode) -> float:
            return 0.5

    async def weighted(weight: float, episode: Episode) -> float:
        return weight

    make = reward_function(timeout=60)
    assert scored(make(Judge())).components == {"Judge": 0.5}
    assert scored(make(functools.partial(weighted, 0.75))).score == 0.75
    assert scored(make(lambda episode: weighted(0.125, episode))).score == 0.125  # a coroutine made on a thread
    assert scored(make(WeightedSum({"a": at_module_level}))).components == {"a": 1.0}


def test_as_a_part_of_a_rubric() -> None:
    rubric = Gate({"correct": at_module_level, "half": (reward_function(timeout=60)(lambda e: 0.5), 0.1)}, on="correct")
    assert scored(rubric) == Verdict(1.05, {"correct": 1.0, "half": 0.5})


def late_reward(on_timeout: Any, **more: Any) -> tuple[Any, threading.Event]:
    ends = threading.Event()

    @reward_function(timeout=0.05, on_timeout=on_timeout, **more)
    def late(episode: Episode) -> float:
        ends.wait(60)
        return 1.0

    return late, ends


def test_a_late_thread_is_infrastructure_and_keeps_its_slot() -> None:
    late, ends = late_reward("infra", concurrency=2)
    said = r"reward 'late' did not return within 0\.05 s on task 't'; its thread goes on, and {} of 2 are held so"
    with pytest.raises(InfraError, match=said.format(1)):
        scored(late)
    assert (late.running, late.late) == (1, 1)
    with pytest.raises(InfraError, match=said.format(2)):
        scored(late)
    with pytest.raises(InfraError, match=r"all 2 threads are held by calls that did not end within 0\.05 s"):
        scored(late)
    ends.set()
    for thread in [t for t in threading.enumerate() if t.name == "areal-reward-late"]:
        thread.join(60)
    assert (late.running, late.late) == (0, 0)
    assert scored(late).score == 1.0


def test_a_late_call_is_a_typed_zero_only_where_that_was_chosen() -> None:
    late, ends = late_reward("score")
    assert scored(late) == Verdict(0.0, {"late": 0.0}, status="timeout")
    ends.set()

    @reward_function(timeout=0.05, on_timeout="score")
    async def never(episode: Episode) -> float:
        await asyncio.Event().wait()
        return 1.0

    assert scored(never) == Verdict(0.0, {"never": 0.0}, status="timeout")
    assert never.running == 0


def test_a_late_reward_of_a_group_is_a_typed_zero_for_each() -> None:
    late, ends = late_reward("score")
    zero = Verdict(0.0, {"late": 0.0}, status="timeout")
    assert asyncio.run(late([EPISODE, EPISODE])) == [zero, zero]
    ends.set()


def test_a_cancellation_of_its_own_is_the_rewards_failure() -> None:
    @reward_function(timeout=60)
    def ends(episode: Episode) -> float:
        raise asyncio.CancelledError

    with pytest.raises(RewardError, match="reward 'ends' raised CancelledError"):
        scored(ends)


def test_a_late_coroutine_is_cancelled_and_is_infrastructure() -> None:
    @reward_function(timeout=0.05)
    async def never(episode: Episode) -> float:
        await asyncio.Event().wait()
        return 1.0

    with pytest.raises(InfraError, match=r"'never' did not return within 0\.05 s on task 't'$"):
        scored(never)
    assert never.running == 0


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("error", [KeyError("gold"), TimeoutError("mine"), InfraError("down"), RewardError("wrong")])
def test_exceptions_keep_their_kind(error: Exception, is_async: bool) -> None:
    def fails(episode: Episode) -> float:
        raise error

    async def fails_too(episode: Episode) -> float:
        raise error

    with pytest.raises(type(error)) as caught:
        scored(reward_function(timeout=60)(fails_too if is_async else fails))
    assert caught.value is error


def test_neither_exit_nor_stop_iteration_ends_more_than_the_call() -> None:
    make = reward_function(timeout=60)
    with pytest.raises(RuntimeError, match=r"sys\.exit\(3\)"):
        scored(make(lambda e: sys.exit(3)))
    with pytest.raises(RuntimeError, match="StopIteration"):
        scored(make(lambda e: next(iter(()))))
    with pytest.raises(RewardError, match="finite number"):
        scored(make(lambda e: float("nan")))


def test_context_variables_are_kept() -> None:
    async def main() -> None:
        TENANT.set("blue")
        assert (await judge(reward_function(timeout=60)(lambda e: float(TENANT.get() == "blue")), EPISODE)).score == 1.0

    asyncio.run(main())


def test_concurrency_holds_over_several_event_loops() -> None:
    lock, gate = threading.Lock(), threading.Event()
    now, most = 0, 0

    @reward_function(timeout=60, concurrency=3)
    def counted(episode: Episode) -> float:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
            if now == 3:
                gate.set()
        gate.wait(30)  # until three run at once
        with lock:
            now -= 1
        return 1.0

    async def many() -> None:
        assert sum(v.score for v in await asyncio.gather(*(judge(counted, EPISODE) for _ in range(20)))) == 20.0

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, counted.running) == (3, 0)


def test_first_come_first_served_and_a_cancelled_waiter_loses_no_slot() -> None:
    order: list[str] = []
    gate = asyncio.Event()

    @reward_function(timeout=60, concurrency=1)
    async def one(name: str) -> float:
        order.append(name)
        await gate.wait()
        return 1.0

    async def main() -> None:
        calls = []
        for name in "abcd":
            calls.append(asyncio.ensure_future(one(name)))
            await asyncio.sleep(0)
        calls[1].cancel()
        await asyncio.wait(calls[1:2])
        gate.set()
        await asyncio.gather(calls[0], calls[2], calls[3])

    asyncio.run(main())
    assert order == ["a", "c", "d"]


def test_a_loop_that_is_blocked_keeps_no_slot_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.rewards.call_slots._LOST_AFTER", 0.0)
    blocked, ends = threading.Event(), threading.Event()

    @reward_function(timeout=0.05, concurrency=1)
    async def answered(name: str) -> float:
        if name == "blocks":
            blocked.set()
            ends.wait(60)
        return 1.0

    def abandoned() -> None:
        asyncio.run(judge(answered, "blocks"))  # type: ignore[arg-type]

    thread = threading.Thread(target=abandoned)
    thread.start()
    assert blocked.wait(60)

    async def others() -> float:
        async with asyncio.timeout(60):
            return float(await answered("free"))  # type: ignore[arg-type]

    assert asyncio.run(others()) == 1.0
    ends.set()
    thread.join(60)


def test_a_closed_loop_takes_no_slot_with_it() -> None:
    slots = CallSlots(1, 60.0)

    async def hold() -> Any:
        return await slots.take("r", thread=True)

    async def wait_and_leave() -> None:
        waiting = asyncio.ensure_future(hold())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})

    held = asyncio.run(hold())
    loop = asyncio.new_event_loop()
    left = loop.create_task(hold())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()  # whoever waited there never hears
    slots.release(held)
    slots.release(held)
    assert asyncio.run(hold()) is not held
    assert slots.held == 1
    asyncio.run(wait_and_leave())
    left.get_coro().close()
    left._log_destroy_pending = False  # type: ignore[attr-defined]


def test_copies_share_their_slots() -> None:
    copied: Any = pickle.loads(pickle.dumps(at_module_level))
    assert copied is at_module_level
    assert copy.deepcopy(at_module_level) is at_module_level
    wrapped = reward_function(timeout=60, concurrency=1, on_timeout="score")(functools.partial(plus, 0.5))
    other: Any = pickle.loads(pickle.dumps(wrapped))
    assert other is not wrapped
    assert other._slots is wrapped._slots
    assert (other.timeout, other.concurrency, other.on_timeout) == (60.0, 1, "score")
    assert scored(other).score == 1.5


def test_what_a_groups_function_declares_is_kept() -> None:
    def shortest(episodes: Any) -> list[float]:
        return [1.0 for _ in episodes]

    shortest.reads_others, shortest.adds = True, False  # type: ignore[attr-defined]
    wrapped: Any = reward_function(timeout=60)(shortest)
    assert (wrapped.reads_others, wrapped.adds) == (True, False)
    assert not hasattr(reward_function(timeout=60)(lambda e: 1.0), "reads_others")
    assert asyncio.run(wrapped([EPISODE, EPISODE])) == [1.0, 1.0]
    outside: Any = reward_function(timeout=60)(functools.partial(plus, 0.5))
    outside.adds = True
    assert pickle.loads(pickle.dumps(outside)).adds is True


def plus(more: float, episode: Episode) -> float:
    return 1.0 + more


def test_saved_episodes_are_scored_with_it() -> None:
    assert load_reward("tests.rewards.test_plain_function:at_module_level") is at_module_level


def test_it_keeps_the_name_and_the_docstring() -> None:
    @reward_function(timeout=1)
    def named(episode: Episode) -> float:
        """One sentence."""
        return 1.0

    assert (named.__name__, named.__doc__) == ("named", "One sentence.")
    assert scored(named).components == {"named": 1.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout = 0"),
        ({"timeout": float("inf")}, "timeout = inf"),
        ({"timeout": True}, "timeout = True"),
        ({"timeout": "5"}, "timeout = '5'"),
        ({"timeout": 1, "concurrency": 0}, "concurrency = 0"),
        ({"timeout": 1, "concurrency": 2.0}, r"concurrency = 2\.0"),
        ({"timeout": 1, "on_timeout": "zero"}, "on_timeout = 'zero'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        reward_function(**options)


def test_what_takes_no_episode_is_refused() -> None:
    def method(self: Any, episode: Episode) -> float:
        return 1.0

    wrong: list[Any] = [method, lambda: 1.0, 3, Verdict]
    with pytest.raises(ConfigError, match=r"write @reward_function\(timeout=5\) above it"):
        reward_function(lambda episode: 1.0, timeout=5)
    for function in wrong:
        with pytest.raises(ConfigError, match="@reward_function"):
            reward_function(timeout=1)(function)


def test_a_thread_that_hangs_does_not_keep_the_process_alive() -> None:
    code = (
        "import asyncio, threading; from areal_agents.rewards import reward_function\n"
        "f = reward_function(timeout=0.05, on_timeout='score')(lambda e: threading.Event().wait())\n"
        "print(asyncio.run(f(None)).status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("timeout\n", 0)
