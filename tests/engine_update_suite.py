"""The conformance suite of weight updates: what every token was sampled with, and what is refused.

``UPDATES`` holds for everything that is an ``Engine``, ``LOADING`` for what reads and computes.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import Transport
from areal_agents.errors import ConfigError, EngineError
from areal_agents.weights.transports import weights_buffers
from tests.engine_suite import ATTEMPTS, Check
from tests.served import Served, ids_of, probed, publish
from tests.tiny_models import forward_logprobs, segmented_logprobs, tiny_model

_TOLD = 1e-2
"""Two log-probabilities that differ by less do not tell one model, or one cache, from another."""


async def a_turn_meets_an_update(it: Served, *, mode: str, kv: str) -> None:
    """Every token has the probability of the weights and the KV that sampled it, and its version.

    Against transformers with a cache that the old weights wrote up to the token that the label names, and the new ones
    from there on: in the updated turn, and in the next one, which reuses that cache or does not.
    """
    for attempt in range(ATTEMPTS):
        if await _meets(it, mode, kv, f"{mode}-{kv}-{attempt}"):
            return
    raise AssertionError("no update came in the middle of a turn")


async def _meets(it: Served, mode: str, kv: str, session: str) -> bool:
    """Whether an update came in the middle of a turn whose numbers tell the old model from the new one."""
    old, version, n = it.model.now, it.version, it.long
    new = it.model.make(seed=200 + version)
    ids = ids_of(40, 300 + version)
    ref = it.model.fill(new, version + 1)
    async with it.begun(it.ask(ids, n, session), tokens=10) as (task,):
        met = not task.done()
        report = await it.serve(ref, new, mode=mode, kv=kv)
    done = await task
    switch = done.versions.count(version)
    assert switch >= 10
    assert done.versions == (version,) * switch + (version + 1,) * (n - switch)
    if mode == "drain":
        assert (switch, report.requests_in_flight) == (n, 0)
    else:
        met = met and switch < n
    # The first token of the new version comes from the new weights' pass over the last one of the old.
    turn, seam = ids + done.ids, len(ids) + switch - 1
    if mode == "interrupt":
        want = forward_logprobs(old, turn)[len(ids) - 1 :]
        want[switch:] = forward_logprobs(new, turn)[len(ids) - 1 :][switch:]
    else:
        want = segmented_logprobs([(old, turn[:seam]), (new, turn[seam:])])[len(ids) - 1 :]
    it.close(done.logprobs, want)

    longer = turn + ids_of(3, 301)
    after = await it.ask(longer, 8, session)
    assert after.versions == (version + 1,) * 8
    rest = longer + after.ids
    reused = it.reusable(len(turn) - 1) if kv == "keep" and mode != "interrupt" else 0
    cut = min(seam, reused)
    then = segmented_logprobs([(old, turn[:cut]), (new, rest[cut:])])[len(longer) - 1 :]
    it.close(after.logprobs, then)
    if not met:
        return False
    assert report.requests_in_flight == (mode != "drain")
    assert (report.tokens_recomputed == 0) == (kv == "keep" and mode != "interrupt")
    assert report.tokens_recomputed == 0 or report.tokens_recomputed >= it.reusable(len(ids) + 9)
    if cut and not _apart(then, forward_logprobs(new, rest)[len(longer) - 1 :]):
        return False
    return mode == "drain" or _tells(old, new, turn, len(ids), want, mixed=mode == "inflight", switch=switch)


def _tells(
    old: Any, new: Any, turn: tuple[int, ...], prompt: int, want: torch.Tensor, *, mixed: bool, switch: int
) -> bool:
    """Whether ``want`` would show a label that is off by one, and weights or a cache of another version than it says.

    mixed: the new version's tokens read the old one's KV, so neither model's own forward pass gives their numbers.
    """
    seam = prompt + switch
    late = segmented_logprobs([(old, turn[:seam]), (new, turn[seam:])])[prompt - 1 :]
    others = [forward_logprobs(model, turn)[prompt - 1 :] for model in ((old, new) if mixed else (old,))]
    first = slice(switch, switch + 1)
    return _apart(want[first], late[first]) and all(_apart(want[switch:], other[switch:]) for other in others)


def _apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) > _TOLD


async def an_interrupted_turn_keeps_its_noise(it: Served) -> None:
    """An update to the very same weights: the turn goes on as if its KV had not been computed again.

    Rounding may part the two later, so twenty tokens are looked at.
    """
    ids = ids_of(40, 500)
    whole = await it.ask(ids, it.long, "whole", seed=6)
    for attempt in range(ATTEMPTS):
        version = it.version
        ref = it.model.fill(it.model.now, version + 1)
        async with it.begun(it.ask(ids, it.long, f"again{attempt}", seed=6), tokens=10) as (task,):
            await it.serve(ref, it.model.now, mode="interrupt", kv="recompute")
        done = await task
        if (switch := done.versions.count(version)) < it.long:
            assert done.ids[: switch + 20] == whole.ids[: switch + 20]
            return
    raise AssertionError("no update came in the middle of a turn")


async def idle_kv_is_kept_or_dropped(it: Served) -> None:
    """Between two turns of a session: the second reads what the old weights wrote, the third nothing of it."""
    ids, old = ids_of(40, 15), it.model.now
    one = await it.ask(ids, 5, "kept")
    longer = ids + one.ids + (1, 2, 3)
    new = it.model.make(seed=400 + it.version)
    assert (await it.update(new, kv="keep")).tokens_recomputed == 0
    two = await it.ask(longer, 5, "kept")
    cut = it.reusable(len(ids) + 4)
    want = segmented_logprobs([(old, longer[:cut]), (new, longer[cut:] + two.ids)])[len(longer) - 1 :]
    it.close(two.logprobs, want)
    assert _apart(want, forward_logprobs(new, longer + two.ids)[len(longer) - 1 :])
    dropped = await it.update(it.model.make(seed=400 + it.version), kv="recompute")
    assert dropped.tokens_recomputed >= it.reusable(len(longer))
    it.check(longer, await it.ask(longer, 5, "kept"))


async def refused_weights_leave_the_old_ones(it: Served) -> None:
    """Gone, damaged, foreign: the next update is served all the same."""
    version = it.version
    new = it.model.make(seed=3)
    shared, ref = publish(new, version + 1)
    with pytest.raises(EngineError, match="checksum"):
        await it.engine.update_weights(replace(ref, checksum="adler32:00000000"))
    with pytest.raises(EngineError, match="2 missing"):
        await it.engine.update_weights(replace(ref, manifest=ref.manifest[:-2]))
    shared.close()
    with pytest.raises(EngineError, match=it.gone):
        await it.engine.update_weights(ref)
    other, foreign = publish(tiny_model("qwen2", num_hidden_layers=2), version + 1)
    served = f"({it.model.now.config.model_type} )?model"
    with pytest.raises(EngineError, match=f"do not fit the served {served}"):
        await it.engine.update_weights(foreign)
    with pytest.raises(ConfigError, match="unknown update mode 'soon'"):
        await it.engine.update_weights(foreign, mode="soon")
    other.close()
    assert it.version == version
    done = await it.ask(ids_of(9, 19), 6, "old weights")
    assert done.versions == (version,) * 6
    it.check(ids_of(9, 19), done)
    await it.update(new)
    it.check(ids_of(9, 19), await it.ask(ids_of(9, 19), 6, "new weights"))


UPDATES: dict[str, Check] = {
    **{
        f"a_turn_meets_an_update-{mode}-{kv}": partial(a_turn_meets_an_update, mode=mode, kv=kv)
        for mode in ("inflight", "interrupt", "drain")
        for kv in ("recompute", "keep")
    },
    "an_interrupted_turn_keeps_its_noise": an_interrupted_turn_keeps_its_noise,
    "idle_kv_is_kept_or_dropped": idle_kv_is_kept_or_dropped,
    "refused_weights_leave_the_old_ones": refused_weights_leave_the_old_ones,
}
PASSED_ON: dict[str, Check] = {
    name: UPDATES[name]
    for name in (
        "a_turn_meets_an_update-interrupt-recompute",
        "a_turn_meets_an_update-drain-keep",
        "idle_kv_is_kept_or_dropped",
        "refused_weights_leave_the_old_ones",
    )
}
"""What shows that mode, policy and refusals are passed on, for what is around an engine that passes all of them."""


# What reads and computes.


async def weights_rounded_on_the_way_are_served(it: Served) -> None:
    """Published in bf16 and computed in fp32."""
    rounded = it.model.make(seed=500)
    with torch.no_grad():  # parameters alone: rotary frequencies are buffers, and nobody publishes them
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    shared, ref = publish(rounded, it.version + 1, torch.bfloat16)
    await it.serve(probed(ref, rounded), rounded)
    shared.close()
    it.check(ids_of(40, 18), await it.ask(ids_of(40, 18), 20, "rounded"))


async def weights_come_by(it: Served, *, transport: Transport) -> None:
    """Two updates in a row by one pair of buffers, each proved by the probe and by what is sampled afterwards."""
    first = dict(it.model.now.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        made = weights_buffers(transport, first, torch.float32, weights_dir=Path(folder), receivers=lambda: 1)
        try:
            for buffer in made:
                version = it.version + 1
                new = it.model.make(seed=600 + version)
                ref = await asyncio.to_thread(buffer.fill, dict(new.named_parameters()), version)
                assert ref.transport == transport
                await it.serve(probed(ref, new), new)
                done = await it.ask(ids_of(40, version), 20, f"{transport}-{version}")
                assert done.versions == (version,) * 20
                it.check(ids_of(40, version), done)
        finally:
            for buffer in made:
                buffer.close()


async def no_turn_reads_older_kv_than_its_policy_allows(it: Served) -> None:
    """One prompt, cached under the old version, in turns that run, that have just begun and that wait."""
    for attempt in range(ATTEMPTS):
        if await _crowd_meets(it, f"-{attempt}"):
            return
    raise AssertionError("no update came while the first turns ran and others waited")


async def _crowd_meets(it: Served, attempt: str) -> bool:
    """Whether an update came when half of the batch was in its middle, and before any later turn had ended."""
    old, version = it.model.now, it.version
    new = it.model.make(seed=400 + version)
    ids, n = ids_of(100, 17), min(it.long, it.context - 110)
    await it.ask(ids, 3, f"first{attempt}")
    ref = it.model.fill(new, version + 1)
    half = it.batch // 2
    async with it.begun(*(it.ask(ids, n, f"r{i}{attempt}") for i in range(half)), tokens=10) as running:
        late = [asyncio.create_task(it.ask(ids, n * 3 // 4, f"l{i}{attempt}")) for i in range(it.batch + half)]
        await asyncio.sleep(0)  # they are asked before the update
        report = await it.serve(ref, new, mode="inflight", kv="recompute")
    first, then = [task.result() for task in running], await asyncio.gather(*late)
    for done in (*first, *then):
        switch = done.versions.count(version)
        assert done.versions == (version,) * switch + (version + 1,) * (len(done.ids) - switch)
        turn, seam = ids + done.ids, len(ids) + max(switch - 1, 0)
        want = segmented_logprobs([(old, turn[:seam] if switch else ()), (new, turn[seam if switch else 0 :])])
        it.close(done.logprobs, want[len(ids) - 1 :])
    if any(version not in done.versions for done in first) or any(
        version + 1 not in done.versions for done in (*first, *then)
    ):
        return False
    assert report.tokens_recomputed >= half * len(ids)
    assert report.requests_in_flight >= half
    assert sum(set(done.versions) == {version + 1} for done in then) >= it.batch  # these waited for the batch
    return True


LOADING: dict[str, Check] = {
    "weights_rounded_on_the_way_are_served": weights_rounded_on_the_way_are_served,
    "weights_come_by_disk": partial(weights_come_by, transport="disk"),
    "weights_come_by_gloo": partial(weights_come_by, transport="gloo"),
    "no_turn_reads_older_kv_than_its_policy_allows": no_turn_reads_older_kv_than_its_policy_allows,
}
