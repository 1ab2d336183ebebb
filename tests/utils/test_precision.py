from __future__ import annotations

from pathlib import Path

import pytest
import torch

from areal_agents.errors import ConfigError
from areal_agents.utils.precision import (
    Precision,
    cpu_flags,
    has_bf16_cpu,
    is_slow,
    resolve_precision,
    slow_format_note,
)

OLD, NEW, UNKNOWN = frozenset({"fpu", "avx2"}), frozenset({"fpu", "amx_bf16"}), frozenset[str]()


def test_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_flags(str(info)) == {"fpu", "avx512f", "avx512_bf16"}
    assert cpu_flags(str(tmp_path / "missing")) == frozenset()


def test_bf16_needs_avx512_bf16_or_amx() -> None:
    assert has_bf16_cpu(frozenset({"avx512_bf16"}))
    assert has_bf16_cpu(frozenset({"amx_bf16", "fpu"}))
    assert not has_bf16_cpu(frozenset({"avx512f", "avx2"}))


@pytest.mark.parametrize(
    ("flags", "asked", "gpu", "slow"),
    [
        (OLD, "bf16", False, True),
        (OLD, "bf16", True, False),
        (OLD, "auto", False, False),
        (OLD, "fp32", False, False),
        (NEW, "bf16", False, False),
        (UNKNOWN, "bf16", False, False),
    ],
)
def test_bf16_by_name_is_slow_where_the_processor_does_not_compute_in_it(
    flags: frozenset[str], asked: Precision, gpu: bool, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_agents.utils.precision.cpu_flags", lambda: flags)
    assert is_slow(asked, gpu=gpu) == slow


def test_the_note_names_the_settings_what_lacks_what_it_costs_and_what_to_do() -> None:
    assert slow_format_note(["--precision"]) == (
        "note: --precision is bf16, which this processor computes in software (it has neither AVX512-BF16 nor "
        "AMX-BF16), 3 to 30 times slower than fp32: set it to auto, which is fp32 here, or to fp32"
    )
    assert slow_format_note(["engine.precision", "learner.precision"]).startswith(
        "note: engine.precision and learner.precision are bf16, "
    )


def test_names() -> None:
    assert resolve_precision("bf16") is torch.bfloat16
    assert resolve_precision("fp32") is torch.float32
    assert resolve_precision("auto") is (torch.bfloat16 if has_bf16_cpu() else torch.float32)
    with pytest.raises(ConfigError, match="fp16"):
        resolve_precision("fp16")  # type: ignore[arg-type]
