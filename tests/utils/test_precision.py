from __future__ import annotations

from pathlib import Path

import pytest
import torch

from areal_agents.errors import ConfigError
from areal_agents.utils.precision import cpu_flags, has_bf16_cpu, resolve_precision


def test_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_flags(str(info)) == {"fpu", "avx512f", "avx512_bf16"}
    assert cpu_flags(str(tmp_path / "missing")) == frozenset()


def test_bf16_needs_avx512_bf16_or_amx() -> None:
    assert has_bf16_cpu(frozenset({"avx512_bf16"}))
    assert has_bf16_cpu(frozenset({"amx_bf16", "fpu"}))
    assert not has_bf16_cpu(frozenset({"avx512f", "avx2"}))


def test_names() -> None:
    assert resolve_precision("bf16") is torch.bfloat16
    assert resolve_precision("fp32") is torch.float32
    assert resolve_precision("auto") is (torch.bfloat16 if has_bf16_cpu() else torch.float32)
    with pytest.raises(ConfigError, match="fp16"):
        resolve_precision("fp16")  # type: ignore[arg-type]
