"""The card: its name, driver and versions, and what it reaches in a matrix product and in copies."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator

import torch
import transformers
from gpu_models import seconds
from gpu_parts import Row, Settings, main

_BF16_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second by the data sheets; the first name that is part of the card's counts."""


def driver() -> str:
    """Return the driver's version, or why it is not known."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return asked.stdout.split("\n")[0].strip()


def rows(settings: Settings) -> Iterator[Row]:
    device = torch.device(settings.device)
    on_gpu = device.type == "cuda"
    versions = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }  # fmt: skip
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        yield {
            "what": "card", "name": properties.name, "cards": torch.cuda.device_count(), "driver": driver(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "peak_tflops": next((peak / 1e12 for name, peak in _BF16_PEAKS.items() if name in properties.name), None),
            **versions,
        }  # fmt: skip
    else:
        yield {"what": "card", "name": "cpu", "cards": 0, "driver": "none", "peak_tflops": None, **versions}
    n = 256 if settings.tiny else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    taken = seconds(device, lambda: a @ b, repeats=10, warm=3)
    yield {"what": "bf16 product", "n": n, "tflops": round(2 * n**3 / taken / 1e12, 3)}
    size = 1 << 20 if settings.tiny else 1 << 30
    there = torch.empty(size, dtype=torch.uint8, device=device).random_()
    other = torch.empty_like(there)
    taken = seconds(device, lambda: other.copy_(there), repeats=5)
    yield {"what": "copy on the device", "gb_per_s": round(2 * size / taken / 1e9, 1), "counts": "read and written"}


if __name__ == "__main__":
    main(rows)
