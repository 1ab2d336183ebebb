"""Weights on disk and by broadcast: what was published is what other processes read, or an error; nobody hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from areal_agents.engine import Transport, WeightsRef
from areal_agents.engines import protocol as p
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.cpu.decoder import CPUDecoder, Weights
from areal_agents.engines.cpu.worker import Prepared, Updater
from areal_agents.errors import ConfigError, EngineError
from areal_agents.weights.broadcast import BroadcastWeights, RoundLimits, receive
from areal_agents.weights.disk import DiskWeights, remove_leftovers
from areal_agents.weights.transports import open_weights, weights_buffers
from tests import weight_readers
from tests.tiny_models import tiny_model

PATIENT = RoundLimits(grace=60, call=20, transfer=20, bucket=64)
"""A round that waited for its grace period would not end before the test does."""
DEADLINE = 30.0


def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.arange(6, dtype=torch.float32).view(3, 2).t(),  # not contiguous
        "exact": torch.tensor([1.0 + 2**-9]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "long": torch.linspace(-2, 2, 300),
    }


def expected(dtype: torch.dtype) -> dict[str, Any]:
    return {name: t.to(dtype).double().tolist() for name, t in tensors().items()}


@pytest.fixture(scope="module")
def children() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.weight_readers"])
    return context


@contextmanager
def child(context: ForkServerContext, target: Callable[..., None], *args: Any) -> Iterator[tuple[BaseProcess, Any]]:
    """A process that runs ``target(*args, connection)``, ended with the context."""
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(DEADLINE)
        ours.close()


def answer(connection: Connection) -> Any:
    assert connection.poll(DEADLINE), "the child did not answer"
    return connection.recv()


def expect(made: BroadcastWeights, receivers: int) -> None:
    """From now on a round of the version held is complete with so many: no test waits for a grace period."""
    assert made._sender is not None
    made._sender._expected = receivers


@contextmanager
def gloo(receivers: int | None = 1, limits: RoundLimits = PATIENT) -> Iterator[BroadcastWeights]:
    count = None if receivers is None else lambda: receivers
    made = BroadcastWeights(tensors(), torch.float32, "gloo", receivers=count, limits=limits)
    try:
        yield made
    finally:
        made.close()


# --- every transport -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transport", ["shm", "disk", "gloo"])
def test_what_is_opened_is_what_was_filled_in_cast(tmp_path: Path, transport: Transport, dtype: torch.dtype) -> None:
    one, two = weights_buffers(transport, tensors(), dtype, weights_dir=tmp_path / "w", receivers=lambda: 1)
    try:
        ref = one.fill(tensors(), 7)
        other = two.fill({name: t + 1 for name, t in tensors().items()}, 8)
        assert (ref.version, ref.transport) == (7, transport)
        with open_weights(ref) as opened, open_weights(other) as later:
            assert {name: t.double().tolist() for name, t in opened.tensors.items()} == expected(dtype)
            assert {t.dtype for t in opened.tensors.values()} == {dtype}
            assert later.tensors["scalar"].item() == 3.5
        with open_weights(ref, verify=False) as opened:
            assert opened.tensors["exact"].item() == (1.0 if dtype == torch.bfloat16 else 1.0 + 2**-9)
    finally:
        one.close()
        two.close()


@pytest.mark.parametrize("transport", ["shm", "disk", "gloo"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_transformers_engines_worker_takes_it(tmp_path: Path, transport: Transport, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    weights = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    one, two = weights_buffers(transport, weights, torch.float32, weights_dir=tmp_path, receivers=lambda: 1)
    shape = Shape.of(model.config, 64)
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    decoder = CPUDecoder(shape, Weights.build(shape, model.state_dict(), torch.float32), torch.float32, max_batch=1,
                      max_context=64)  # fmt: skip
    updater = Updater(shape, decoder, inbox)
    updater.start()
    for version, scale in ((1, 1.0), (2, 2.0)):
        updater.updates.put(
            p.Update(version, one.fill({n: t * scale for n, t in weights.items()}, version), "inflight", "keep")
        )
        prepared = inbox.get(timeout=DEADLINE)
        assert isinstance(prepared, Prepared)
        assert prepared.error == ""
        assert prepared.weights is not None
        torch.testing.assert_close(prepared.weights.norm, scale * model.model.norm.weight.detach())
    one.close()
    two.close()


@pytest.mark.parametrize("transport", ["shm", "disk", "gloo"])
def test_a_reference_to_what_was_filled_over_is_an_error(tmp_path: Path, transport: Transport) -> None:
    one, two = weights_buffers(transport, tensors(), torch.float32, weights_dir=tmp_path, receivers=lambda: 1)
    old = one.fill(tensors(), 1)
    new = one.fill({name: t + 1 for name, t in tensors().items()}, 3)
    with pytest.raises(EngineError, match="v1"):
        open_weights(old)
    with open_weights(new) as opened:
        assert opened.tensors["scalar"].item() == 3.5
    one.close()
    one.close()
    two.close()
    with pytest.raises(
        EngineError, match=rf"v3 at {new.locator} are gone.*(transport = \"disk\"|reachable|same folder)"
    ):
        open_weights(new)


def test_transports_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights_dir"):
        weights_buffers("disk", tensors(), torch.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the weights' folder .*file/x cannot be used: .*Choose an --out"):
        weights_buffers("disk", tensors(), torch.float32, weights_dir=tmp_path / "file" / "x")
    with pytest.raises(ConfigError, match="bfloat16"):
        weights_buffers("disk", tensors(), torch.int8, weights_dir=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r'transport = "nccl" needs .* a GPU'):
            weights_buffers("nccl", tensors(), torch.float32)
        with pytest.raises(EngineError, match="no GPU"):
            open_weights(WeightsRef(1, "nccl://127.0.0.1:1", (), "", 0, transport="nccl"))
    with gloo() as made:
        made._host = "192.0.2.1"  # an address for documentation: nobody's
        with pytest.raises(EngineError, match=r"cannot be offered on 192\.0\.2\.1"):
            made.fill(tensors(), 1)


# --- disk ----------------------------------------------------------------------------------------------------------


def test_any_reader_of_safetensors_reads_a_version_and_two_lie_there_at_most(tmp_path: Path) -> None:
    buffers = [DiskWeights(tensors(), torch.bfloat16, tmp_path) for _ in range(2)]
    for version in range(5):
        ref = buffers[version % 2].fill(tensors(), version)
        assert len(list(tmp_path.rglob("*.safetensors"))) == min(version + 1, 2)
    found = load_file(ref.locator)
    assert {name: t.double().tolist() for name, t in found.items()} == expected(torch.bfloat16)
    assert not list(tmp_path.rglob("*.tmp"))
    for buffer in buffers:
        buffer.close()
    assert not list(tmp_path.iterdir())


def test_damaged_and_cut_files_are_errors(tmp_path: Path) -> None:
    made = DiskWeights(tensors(), torch.float32, tmp_path)
    ref = made.fill(tensors(), 2)
    with open(ref.locator, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(EngineError, match=r"v2: checksum adler32:\w+, expected adler32:"):
        open_weights(ref)
    open_weights(ref, verify=False)
    os.truncate(ref.locator, os.path.getsize(ref.locator) - 1)
    with pytest.raises(EngineError, match="the file is damaged"):
        open_weights(ref, verify=False)
    made.close()


def test_a_disk_that_refuses_is_named_and_the_other_version_stays(tmp_path: Path) -> None:
    one, two = (DiskWeights(tensors(), torch.float32, tmp_path) for _ in range(2))
    ref = one.fill(tensors(), 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(
            EngineError, match=r"v2 cannot be written to .*: File too large .*MiB free.*choose an --out"
        ):
            two.fill(tensors(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.rglob("v*")] == ["v1-1.safetensors"]
    open_weights(ref)
    with open_weights(two.fill(tensors(), 2)) as opened:  # there is room again
        assert opened.tensors["scalar"].item() == 2.5
    one.close()
    two.close()


def test_leftovers_of_killed_owners_are_removed_and_no_others(tmp_path: Path, children: ForkServerContext) -> None:
    foreign = tmp_path / "areal-weights-elsewhere"
    foreign.mkdir()
    (foreign / "owner.json").write_text(json.dumps({"host": "another-node", "boot": "another", "pid": 1}))
    with child(children, weight_readers.leave_on_disk, tmp_path) as (process, connection):
        ref: WeightsRef = answer(connection)
        live = DiskWeights(tensors(), torch.float32, tmp_path)
        assert remove_leftovers(tmp_path) == [], "both owners live"
        with open_weights(ref) as opened:
            assert opened.tensors["a"].tolist() == [1, 1, 1]
        process.kill()
        process.join(DEADLINE)
        assert Path(ref.locator).is_file(), "a killed owner cleans nothing"
        DiskWeights(tensors(), torch.float32, tmp_path).close()
    with pytest.raises(EngineError, match="are gone"):
        open_weights(ref)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, live.folder])
    live.close()


# --- broadcast -----------------------------------------------------------------------------------------------------


def test_processes_share_a_round_and_a_late_one_gets_its_own(children: ForkServerContext) -> None:
    with gloo(receivers=2) as made:
        ref = made.fill(tensors(), 4)
        with (
            child(children, weight_readers.read, ref, 0) as (_, one),
            child(children, weight_readers.read, ref, 0) as (_, two),
        ):
            assert answer(one) == answer(two) == expected(torch.float32)
        assert made._sender is not None
        assert made._sender._served == 2
        assert made._sender.rounds == 1
        with open_weights(
            ref
        ) as opened:  # a restarted engine: nobody else asks, and the grace period is not waited for
            assert opened.tensors["scalar"].item() == 2.5
        assert made.failures == []


def test_a_member_killed_in_the_middle_ends_the_round_and_the_next_is_formed_without_it(
    children: ForkServerContext,
) -> None:
    for attempts in (1, 2):
        with gloo(receivers=2) as made:
            ref = made.fill(tensors(), 4)
            with (
                child(children, weight_readers.die_in_a_round, ref) as (dead, _),
                child(children, weight_readers.read, ref, attempts) as (_, connection),
            ):
                dead.join(DEADLINE)
                assert dead.exitcode == -signal.SIGKILL
                expect(made, 1)
                found = answer(connection)
            if attempts == 1:
                assert "did not arrive" in found
                assert "in 1 rounds" in found
            else:
                assert found == expected(torch.float32)
                assert len(made.failures) == 1


def raw(ref: WeightsRef) -> tuple[TCPStore, int]:
    """A receiver that has joined and does nothing more by itself."""
    store = TCPStore("127.0.0.1", int(ref.locator.rpartition(":")[2]), None, False, wait_for_workers=False)
    ticket = store.add("tickets", 1)
    store.set(f"join/{ticket}", "")
    return store, ticket


def test_who_joined_and_does_not_answer_is_left_out(children: ForkServerContext) -> None:
    with gloo(receivers=2, limits=replace(PATIENT, call=0.7)) as made:
        ref = made.fill(tensors(), 1)
        store, ticket = raw(ref)
        with receive(ref, attempts=1) as opened:
            assert opened.tensors["scalar"].item() == 2.5
        assert made.failures == [f"receiver {ticket} joined and did not answer a call within 0.7 s"]
        assert "did not answer" in json.loads(store.get(f"answer/{ticket}"))["error"]


def test_who_hangs_in_a_round_holds_the_others_to_the_deadline_alone() -> None:
    with gloo(receivers=2, limits=replace(PATIENT, transfer=0.5)) as made, ThreadPoolExecutor(1) as pool:
        ref = made.fill(tensors(), 1)
        store, ticket = raw(ref)
        store.set(f"here/{ticket}", "")  # and never forms the group
        reader = pool.submit(receive, ref)
        end = time.monotonic() + DEADLINE
        while not made.failures and time.monotonic() < end:
            time.sleep(0.01)
        expect(made, 1)
        with reader.result(DEADLINE) as opened:
            assert opened.tensors["scalar"].item() == 2.5
        assert len(made.failures) == 1
        assert json.loads(store.get(f"answer/{ticket}"))["world"] == 3


def test_a_ticket_whose_owner_died_before_it_joined_is_passed_over() -> None:
    with gloo() as made:
        ref = made.fill(tensors(), 1)
        store = TCPStore("127.0.0.1", int(ref.locator.rpartition(":")[2]), None, False, wait_for_workers=False)
        assert store.add("tickets", 1) == 1
        with receive(ref, attempts=1) as opened:
            assert opened.tensors["scalar"].item() == 2.5


def test_a_withdrawn_version_frees_who_waits_for_it() -> None:
    with gloo(receivers=2) as made:
        ref = made.fill(tensors(), 1)
        store, ticket = raw(ref)
        made.fill(tensors(), 2)
        with pytest.raises(RuntimeError):
            store.wait([f"call/{ticket}"], timedelta(seconds=DEADLINE))


def test_bytes_changed_on_the_way_are_an_error() -> None:
    with gloo() as made:
        ref = made.fill(tensors(), 6)
        made._buffer[3] ^= 1
        with pytest.raises(EngineError, match=r"v6: checksum adler32:\w+, expected adler32:"):
            open_weights(ref)
        with pytest.raises(EngineError, match="they were replaced"):
            open_weights(replace(ref, checksum="adler32:00000001"))
