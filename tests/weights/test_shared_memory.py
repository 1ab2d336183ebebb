"""Weights through a memory file: what was filled in is what another process reads, or an error."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import zlib
from dataclasses import replace

import pytest
import torch

from areal_agents.engine import WeightsRef
from areal_agents.errors import EngineError
from areal_agents.weights import base
from areal_agents.weights.base import adler32, checksum, layout
from areal_agents.weights.shared_memory import AttachedWeights, SharedWeights


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.tensor([1.0 + 2**-9]),
        "c": torch.full((40,), -2.0),
    }


def test_layout_aligns_every_tensor_to_64_bytes() -> None:
    entries, nbytes = layout(tensors().items(), torch.bfloat16)
    assert [(e.name, e.shape, e.dtype, e.offset) for e in entries] == [
        ("a", (2, 3), "bfloat16", 0),
        ("b", (1,), "bfloat16", 64),
        ("c", (40,), "bfloat16", 128),
    ]
    assert nbytes == 128 + 128


def test_attached_tensors_equal_what_was_filled_cast() -> None:
    shared = SharedWeights(tensors(), torch.bfloat16)
    ref: WeightsRef = pickle.loads(pickle.dumps(shared.fill(tensors(), version=3)))
    assert ref.version == 3
    with AttachedWeights(ref) as attached:
        assert attached.tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert attached.tensors["b"].item() == 1.0  # 1 + 2^-9 rounds to 1 in bfloat16
        assert attached.tensors["c"].dtype is torch.bfloat16
    shared.close()


def test_a_second_fill_changes_the_checksum() -> None:
    shared = SharedWeights(tensors(), torch.float32)
    one = shared.fill(tensors(), 1)
    two = shared.fill({name: t + 1 for name, t in tensors().items()}, 2)
    assert one.checksum != two.checksum
    with pytest.raises(EngineError, match="v1: checksum"):
        AttachedWeights(one)
    AttachedWeights(two)
    shared.close()


def test_the_checksum_is_adler32_across_chunks() -> None:
    data = os.urandom(1000) * 20_000  # 20 MB: more than one chunk
    assert checksum(memoryview(data)) == f"adler32:{zlib.adler32(data):08x}"


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_the_checksum_is_the_same_on_any_number_of_cores(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "available_cores", lambda: cores)
    monkeypatch.setattr(base, "_CHUNK", 7)
    for length in (0, 1, 6, 7, 8, 13, 14, 500):
        data = bytes([255] * length)  # the largest sums
        assert adler32(memoryview(data)) == zlib.adler32(data)
        assert adler32(memoryview(data), 0xFFF0_FFF0) == zlib.adler32(data, 0xFFF0_FFF0)


def test_gone_and_short_weights_are_errors() -> None:
    shared = SharedWeights(tensors(), torch.float32)
    ref = shared.fill(tensors(), 5)
    with pytest.raises(EngineError, match="v5"):
        AttachedWeights(replace(ref, nbytes=ref.nbytes + 100_000))
    shared.close()
    shared.close()
    with pytest.raises(EngineError, match=r"v5 at /proc/.* are gone"):
        AttachedWeights(ref)


def test_readers_outlive_the_owner() -> None:
    shared = SharedWeights(tensors(), torch.float32)
    attached = AttachedWeights(shared.fill(tensors(), 1))
    shared.close()
    gc.collect()
    assert attached.tensors["c"].sum().item() == -80


def test_writing_to_an_attached_tensor_stays_private() -> None:
    shared = SharedWeights(tensors(), torch.float32)
    ref = shared.fill(tensors(), 1)
    with AttachedWeights(ref) as attached:
        attached.tensors["a"].zero_()
    with AttachedWeights(ref) as attached:
        assert attached.tensors["a"].sum().item() == 15
    shared.close()


def _read(ref: WeightsRef) -> float:
    with AttachedWeights(ref) as attached:
        return float(attached.tensors["a"].sum())


def test_another_process_reads_them() -> None:
    shared = SharedWeights(tensors(), torch.float32)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (shared.fill(tensors(), 1),)) == 15.0
    shared.close()
