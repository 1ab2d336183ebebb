"""``deterministic``: the same bits, whoever else is computed, in whatever pieces, and when a turn is taken up again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.cpu.decoder import CPUDecoder, RowSegment, Weights
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.engines.cpu.scheduler import uniform
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.errors import ModelError
from areal_agents.types import Completion
from tests.engine_suite import a_crowd_gets_what_each_gets_alone, filters_apply, turns_equal_a_forward_pass
from tests.served import Served, ServedModel, ask, ids_of, served
from tests.tiny_models import VOCABULARY, save_tiny, tiny_model

ROWS, CONTEXT = 7, 400


def decoder(kind: str, dtype: torch.dtype, *, rows: int = ROWS) -> CPUDecoder:
    model = tiny_model(kind)
    shape = Shape.of(model.config, CONTEXT)
    weights = Weights.build(shape, model.state_dict(), dtype)
    return CPUDecoder(shape, weights, dtype, max_batch=rows, max_context=CONTEXT, deterministic=True)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16), ("qwen3", torch.float32)]
)
def test_logits_are_a_function_of_the_tokens_before_them(kind: str, dtype: torch.dtype) -> None:
    """A row decoded alone, token by token, against the same row prefilled in pieces among long and short others."""
    rng = random.Random(1)
    ids = list(ids_of(150, 2))
    alone = decoder(kind, dtype)
    want = [alone.decode([id], [position])[0] for position, id in enumerate(ids)]
    for _ in range(3):
        it, mine = decoder(kind, dtype), rng.randrange(ROWS)
        others = [(row, list(ids_of(rng.randrange(2, CONTEXT - 8), row))) for row in range(ROWS) if row != mine]
        cuts = sorted(rng.sample(range(1, 140), 2))
        for first, last in zip([0, *cuts], [*cuts, 145], strict=True):
            half = [RowSegment(row, 0, long[: max(1, len(long) * last // 145)]) for row, long in others]
            got = it.prefill([*half[:3], RowSegment(mine, first, ids[first:last]), *half[3:]])
            assert torch.equal(got[3], want[last - 1])
        for position in range(145, 150):
            rows = rng.randrange(mine + 1, ROWS + 1)
            step = [rng.randrange(VOCABULARY) for _ in range(ROWS)]
            at = [rng.randrange(2, CONTEXT) for _ in range(ROWS)]
            step[mine], at[mine] = ids[position], position
            assert torch.equal(it.decode(step[:rows], at[:rows])[mine], want[position])


def test_a_machine_whose_products_depend_on_the_place_is_refused() -> None:
    it = decoder("llama", torch.float32, rows=3)
    it.prove_deterministic()
    head = it.weights.head

    def by_place(x: torch.Tensor) -> torch.Tensor:
        logits = head(x).clone()
        logits[-1] *= 1 + 2**-20
        return logits

    it.weights = replace(it.weights, head=by_place)
    with pytest.raises(ModelError, match=r"engine\.deterministic cannot be had: on this processor the logits of a row"):
        it.prove_deterministic()


def test_draws_are_uniform_and_have_no_memory() -> None:
    """4,000 draws: mean 1/2 and variance 1/12 within four standard errors, and neighbours do not go together."""
    for draws in ([uniform(9, i) for i in range(4000)], [uniform(i, 0) for i in range(4000)]):
        u = torch.tensor(draws, dtype=torch.float64)
        assert 0 <= float(u.min()) <= float(u.max()) < 1
        assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
        assert abs(float(u.var()) - 1 / 12) < 4 * (1 / 180 / 4000) ** 0.5
        assert abs(float(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1])) < 4 / 4000**0.5
    assert uniform(9, 3) == [uniform(9, i) for i in range(4)][3]


# A whole engine.


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(ServedModel(tiny_model), tmp_path_factory.mktemp("exact"), deterministic=True) as engine:
        yield engine


@pytest.mark.parametrize("check", [turns_equal_a_forward_pass, a_crowd_gets_what_each_gets_alone, filters_apply])
def test_it_samples_what_every_engine_samples(it: Served, check: object) -> None:
    it.run(check(it))  # type: ignore[operator]


def same(one: Completion, two: Completion) -> None:
    assert (one.ids, one.logprobs) == (two.ids, two.logprobs)


def test_turns_are_equal_to_the_bit_alone_and_in_a_crowd(it: Served) -> None:
    """Two turns of twelve conversations, at four temperatures, one at a time and all at once, more than fit."""

    async def talk(i: int, name: str) -> list[Completion]:
        ids, done = ids_of(5 + 9 * i, 40 + i), []
        for turn in range(2):
            done.append(
                await it.ask(ids, 20, f"{name}{i}", temperature=(0.0, 0.5, 1.0, 1.5)[i % 4], seed=100 * turn + i)
            )
            ids = ids + done[-1].ids + ids_of(3, turn)
            if name == "alone" and i % 2:
                await it.release()  # its KV is computed again
        return done

    async def work() -> None:
        alone = [await talk(i, "alone") for i in range(12)]
        crowd = await asyncio.gather(*[talk(i, "crowd") for i in reversed(range(12))])
        for one, two in zip(alone, reversed(crowd), strict=True):
            for a, b in zip(one, two, strict=True):
                same(a, b)

    it.run(work())


@pytest.mark.parametrize("mode", ["inflight", "interrupt"])
def test_a_turn_that_is_taken_up_again_goes_on_with_its_noise(it: Served, mode: str) -> None:
    """Updates to the very same weights in the middle of a turn: no noise is drawn twice, and none is left out."""

    async def work() -> None:
        ids = ids_of(30, 77)
        want = await it.ask(ids, it.long, "whole", seed=4)
        for attempt in range(20):
            async with it.begun(it.ask(ids, it.long, f"cut-{mode}{attempt}", seed=4), tokens=10) as (task,):
                version = it.version
                await it.update(it.model.now, mode=mode)
            done = await task
            same(done, want)
            if 0 < done.versions.count(version) < it.long:
                return
        raise AssertionError("no update came in the middle of a turn")

    it.run(work())


def test_a_lost_engine_changes_nothing(tmp_path: Path) -> None:
    """The request is sent again to another process, with the seed that it had."""
    folder = save_tiny(tmp_path / "m", tiny_model())
    seeds = iter((1, 2, 3))
    started: list[TransformersEngine] = []

    async def start() -> TransformersEngine:
        started.append(await TransformersEngine.start(folder, precision="fp32", max_batch=4, seed=next(seeds)))
        return started[-1]

    async def work() -> None:
        events: list[str] = []
        async with SupervisedEngine(start, event=lambda kind, **fields: events.append(kind)) as engine:
            want = await ask(engine, ids_of(20, 3), 150, "whole", seed=8)
            task = asyncio.create_task(ask(engine, ids_of(20, 3), 150, "lost", seed=8))
            while (await started[0].health()).running == 0:
                assert not task.done()
            await started[0].kill()
            assert (await task).ids == want.ids
        assert "request_retried" in events

    asyncio.run(work())
