"""The vLLM worker's own bookkeeping, on a stand-in for ``AsyncLLM``: cancels, failures, the order of an update."""

from __future__ import annotations

import asyncio
import io
import pickle
import random
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling, TensorEntry, WeightsProbe, WeightsRef
from areal_agents.engines import protocol as p
from areal_agents.engines.vllm import worker as vllm_worker
from areal_agents.engines.vllm.queue import Queue, QueuedRequest
from areal_agents.engines.vllm.worker import VLLMWorker
from areal_agents.engines.vllm.worker_extension import WorkerExtension, misfit
from areal_agents.errors import EngineError

REF = WeightsRef(3, "", (), "", 0)


class LLM:
    """Answers what an update asks, and remembers it.

    opened: the answers to ``areal_opened``, one list a poll. stuck: calls that never return. broken: calls that raise.
    """

    def __init__(self) -> None:
        self.stuck: set[str] = set()
        self.broken: set[str] = set()
        self.errored = False
        self.output_processor = SimpleNamespace(request_states={})
        self.calls: list[str] = []
        self.opened: list[list[str | None]] = []

    async def collective_rpc(self, method: str, seconds: float, args: Any = ()) -> list[Any]:
        await self._called(method)
        return self.opened.pop(0) if method == "areal_opened" and self.opened else [""]

    async def pause_generation(self, **how: Any) -> None:
        await self._called("pause")

    async def update_weight_version(self, version: str) -> None:
        await self._called(f"label {version}")

    async def resume_generation(self) -> None:
        await self._called("resume")

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.broken:
            raise RuntimeError(f"{name} broke")
        if name in self.stuck:
            await asyncio.Event().wait()


class Worker(VLLMWorker):
    """Its requests end when ``ends[id]`` does. Its death is a message."""

    def __init__(self, *, max_batch: int = 4) -> None:
        self.fake = LLM()
        self.sent: list[p.Reply] = []
        self.ends: dict[int, asyncio.Future[Any]] = {}
        super().__init__(self.fake, Queue(max_batch, 100, 32, 256, 1000), "fp32", io.BytesIO())

    def send(self, reply: p.Reply) -> None:
        self.sent.append(reply)

    def die(self, reason: str) -> None:
        self.sent.append(p.Lost(reason))

    async def _sample(self, request: QueuedRequest) -> Any:
        return await self.ends.setdefault(request.id, asyncio.get_running_loop().create_future())

    def ask(self, id: int) -> None:
        self._handle(p.Generate(id, f"s{id}", (1, 2), Sampling(5)))

    def left(self) -> tuple[object, ...]:
        return self.tasks, self._requests, self.queue.running, self.queue.waiting, self.queue._sessions


def output(finish: str) -> Any:
    logprobs = SimpleNamespace(logprobs=[-1.0])
    span = SimpleNamespace(version="0", start=0, end=1)
    one = SimpleNamespace(finish_reason=finish, token_ids=[7], logprobs=logprobs, weight_versions=[span])
    return SimpleNamespace(outputs=[one])


async def settle(turns: int = 10) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


def test_cancels_in_any_order_leave_nothing() -> None:
    """A request that a cancel lets in may be cancelled before its task's first step."""

    async def trial(seed: int) -> None:
        worker, inbox = Worker(), asyncio.Queue[object]()
        serving = asyncio.create_task(worker.serve(inbox))
        for id in range(16):
            inbox.put_nowait(p.Generate(id, f"s{id}", (1, 2), Sampling(5)))
        await settle(50)
        assert len(worker.tasks) == 4
        for id in random.Random(seed).sample(range(16), 16):
            inbox.put_nowait(p.Cancel(id))
        await settle(100)
        assert [len(each) for each in worker.left()] == [0] * 5  # type: ignore[arg-type]
        worker.ask(99)
        await settle()
        worker.ends[99].set_result(output("length"))
        await settle()
        assert [type(reply) for reply in worker.sent] == [p.Done]
        inbox.put_nowait(p.Close())
        await serving
        worker.fake.errored = True

    for seed in range(40):
        asyncio.run(trial(seed))


def test_a_request_cancelled_before_its_first_step_lets_the_next_one_in() -> None:
    async def work() -> None:
        worker = Worker(max_batch=1)
        worker.ask(1)
        worker.ask(2)
        worker._handle(p.Cancel(1))  # its task has not begun
        await settle()
        assert list(worker.tasks) == list(worker.queue.running) == [2]

    asyncio.run(work())


def stub_vllm(monkeypatch: pytest.MonkeyPatch, generate_error: type[Exception]) -> None:
    """The names that ``_sample`` imports."""
    client = type("VLLMClientError", (Exception,), {})
    names: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": SimpleNamespace},
        "vllm.exceptions": {"VLLMClientError": client},
        "vllm.inputs": {},
        "vllm.inputs.engine": {"tokens_input": lambda ids, cache_salt: ids},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineGenerateError": generate_error},
    }
    for name, values in names.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("dead", [False, True])
def test_a_request_that_vllm_fails_on_ends_alone_while_the_engine_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dead: bool
) -> None:
    failure = type("EngineGenerateError", (Exception,), {})
    stub_vllm(monkeypatch, failure)

    async def generate(prompt: Any, params: Any, name: str) -> Any:
        raise failure from OverflowError("too large")
        yield

    async def work() -> None:
        worker = Worker()
        worker.fake.errored = dead
        worker.fake.generate = generate  # type: ignore[attr-defined]
        worker._sample = super(Worker, worker)._sample  # type: ignore[method-assign]
        worker.ask(1)
        await settle()
        lost = [reply for reply in worker.sent if isinstance(reply, p.Lost)]
        failed = [reply for reply in worker.sent if isinstance(reply, p.Failed)]
        if dead:
            assert lost
            assert not failed
        else:
            assert failed == [p.Failed(1, "vLLM failed on the request: OverflowError: too large")]
            assert not lost
            assert [len(each) for each in worker.left()] == [0] * 5  # type: ignore[arg-type]

    asyncio.run(work())
    capsys.readouterr()


def test_only_stop_and_length_are_completions() -> None:
    async def work() -> None:
        worker = Worker()
        for id, finish in enumerate(("stop", "length", "error", "repetition")):
            worker.ask(id)
            await settle()
            worker.ends[id].set_result(output(finish))
            await settle()
        assert [r.completion.finish for r in worker.sent[:2] if isinstance(r, p.Done)] == ["stop", "length"]
        assert worker.sent[2:] == [
            p.Failed(2, "vLLM ended the request with 'error'"),
            p.Failed(3, "vLLM ended the request with 'repetition'"),
        ]

    asyncio.run(work())


def test_an_update_admits_again_after_its_proof_and_counts_the_time_until_then() -> None:
    async def work() -> None:
        worker = Worker()
        proof = asyncio.get_running_loop().create_future()
        deadlines: list[float] = []

        async def prove(ref: WeightsRef, seconds: float) -> None:
            deadlines.append(seconds)
            await proof

        worker.updates._prove = prove  # type: ignore[method-assign]
        update = asyncio.create_task(worker.updates.run(p.Update(5, REF, "inflight", "recompute")))
        await settle()
        worker.ask(1)
        await settle()
        assert worker.fake.calls == ["areal_open", "areal_opened", "pause", "areal_load", "label 3", "resume"]
        assert (list(worker.tasks), len(worker.queue.waiting), worker.sent) == ([], 1, [])
        begin = asyncio.get_running_loop().time()
        await asyncio.sleep(0.05)
        waited = asyncio.get_running_loop().time() - begin
        proof.set_result(None)
        await update
        (reply,) = worker.sent
        assert isinstance(reply, p.Updated)
        assert waited <= reply.report.seconds < waited + 5  # nothing ran: nothing could be sampled before the proof
        assert list(worker.tasks) == [1]
        assert deadlines == [120.0]

    asyncio.run(work())


def test_the_probe_waits_longer_where_running_requests_are_computed_again() -> None:
    async def work() -> None:
        worker = Worker()
        deadlines: list[float] = []

        async def prove(ref: WeightsRef, seconds: float) -> None:
            deadlines.append(seconds)

        worker.updates._prove = prove  # type: ignore[method-assign]
        worker._handle(p.Generate(1, "s", (1,) * 100, Sampling(150)))
        await settle()
        detokenizer = SimpleNamespace(num_output_tokens=lambda: 50)
        state = SimpleNamespace(external_req_id="1-1", detokenizer=detokenizer)
        worker.fake.output_processor.request_states["1-1"] = state
        for mode in ("inflight", "interrupt"):
            await worker.updates.run(p.Update(5, REF, mode, "recompute"))
        assert deadlines == [120.0, 120.0 + 150 / 50]

    asyncio.run(work())


def test_a_drain_begins_when_the_weights_are_read_and_not_where_they_are_refused() -> None:
    async def work() -> None:
        worker = Worker(max_batch=1)
        worker.ask(1)
        worker.ask(2)
        await settle()
        worker.fake.opened = [[None, "damaged"], ["", "damaged"]]  # the ranks are ready at different times
        await worker.updates.run(p.Update(5, REF, "drain", "recompute"))
        assert worker.fake.calls == ["areal_open", "areal_opened", "areal_opened", "areal_forget"]
        assert worker.sent == [p.Failed(5, "weights v3 were not loaded: damaged")]
        assert worker.queue.admitting

        update = asyncio.create_task(worker.updates.run(p.Update(6, REF, "drain", "recompute")))
        await settle()
        assert worker.fake.calls[4:] == ["areal_open", "areal_opened"]
        assert not worker.queue.admitting
        worker.ends[1].set_result(output("stop"))
        await update
        assert worker.fake.calls[6:] == ["pause", "areal_load", "label 3", "resume"]
        assert [type(reply) for reply in worker.sent[1:]] == [p.Done, p.Updated]
        assert list(worker.tasks) == [2]  # after the update

    asyncio.run(work())


def test_weights_that_take_too_long_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.engines.vllm.updates._OPEN_SECONDS", -1.0)

    async def work() -> None:
        worker = Worker()
        worker.fake.opened = [[None]]
        await worker.updates.run(p.Update(5, REF, "inflight", "keep"))
        assert worker.fake.calls == ["areal_open", "areal_opened", "areal_forget"]
        assert worker.sent == [p.Failed(5, "weights v3 were not loaded: they were not read within -1 s")]

    asyncio.run(work())


@pytest.mark.parametrize(
    "call", ["areal_open", "areal_opened", "areal_forget", "pause", "areal_load", "label 3", "resume"]
)
@pytest.mark.parametrize("how", ["stuck", "broken"])
def test_an_update_that_hangs_or_breaks_half_way_is_the_end_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, call: str, how: str
) -> None:
    """Nothing that was admitted meanwhile begins, and nothing says that the new version is served."""
    for name in ("_PAUSE_SECONDS", "_LOAD_SECONDS", "_CALL_SECONDS"):
        monkeypatch.setattr(f"areal_agents.engines.vllm.updates.{name}", 0.05)

    async def work() -> None:
        worker = Worker()
        getattr(worker.fake, how).add(call)
        if call == "areal_forget":
            worker.fake.opened = [["damaged"]]
        await worker._or_die(lambda: worker.updates.run(p.Update(5, REF, "inflight", "keep")))
        if how == "broken":
            said = f"RuntimeError: {call} broke"
        elif call.startswith("areal"):
            said = f"vLLM's workers did not answer {call} within 0.05 s"
        else:
            said = "vLLM did not answer while loading weights v3"
        assert worker.sent == [p.Lost(said)]
        assert worker.fake.calls[-1] == call
        assert worker.version == 0

    asyncio.run(work())


def test_a_step_longer_than_the_wait_for_health_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """EngineCore answers a question at its step's end; the next question must not begin to wait anew."""
    monkeypatch.setattr("areal_agents.engines.vllm.worker._HEALTH_SECONDS", 0.05)

    async def work() -> None:
        worker, asked = Worker(), list[asyncio.Future[bool]]()

        def is_paused() -> asyncio.Future[bool]:
            asked.append(asyncio.get_running_loop().create_future())
            return asked[-1]

        worker.fake.is_paused = is_paused  # type: ignore[attr-defined]
        await asyncio.gather(*(worker._health(p.AskHealth(id)) for id in (1, 2)))
        asked[0].set_result(False)  # the step ends while nobody waits
        await worker._health(p.AskHealth(3))
        await worker._health(p.AskHealth(4))
        reports = [reply for reply in worker.sent if isinstance(reply, p.HealthReport)]
        assert [(r.id, r.health.ok) for r in reports] == [(1, False), (2, False), (3, True), (4, False)]
        assert len(asked) == 2

    asyncio.run(work())


def test_a_probe_without_an_answer_is_the_end_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_vllm(monkeypatch, RuntimeError)

    async def work() -> None:
        worker = Worker()

        async def never(*asked: Any) -> Any:
            await asyncio.Event().wait()
            yield

        worker.fake.generate = never  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="weights v3: no answer to the probe in 0 s"):
            await worker.updates._prove(replace(REF, probe=WeightsProbe((1, 2), (-1.0,))), 0.05)

    asyncio.run(work())


def test_a_refusal_stays_until_it_is_forgotten() -> None:
    """With tensor parallelism every rank is asked again for as long as one of them still reads."""
    rank = WorkerExtension()
    rank._areal_misfit, rank.device = partial(misfit, shapes={}, groups=[]), torch.device("cpu")
    rank.areal_open(pickle.dumps(WeightsRef(1, "", (TensorEntry("x", (1,), "float32", 0),), "", 4)))
    assert rank._areal_opening is not None
    rank._areal_opening.join(10)
    for _ in range(2):
        assert rank.areal_opened() == "they do not fit the served model: 1 unknown, first x"
    rank.areal_forget()
    assert rank._areal_opening is None


@pytest.mark.parametrize(("error", "kind"), [(TimeoutError(), p.Lost), (OSError("no such model"), p.Fatal)])
def test_a_start_that_takes_too_long_is_no_fault_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, kind: type[object]
) -> None:
    async def build(settings: Any, out: Any) -> Any:
        raise error

    monkeypatch.setattr(vllm_worker, "build", build)
    monkeypatch.setattr(vllm_worker, "_read", lambda *given: None)
    settings = p.VLLMSettings("m", "fp32", 1, 1, 1, 0, None, None, 0.5, 1)
    replies = io.BytesIO()
    asyncio.run(vllm_worker.run(settings, io.BytesIO(), replies))
    assert isinstance(p.decode(replies.getvalue()[p.HEADER.size :]), kind)
    capsys.readouterr()
