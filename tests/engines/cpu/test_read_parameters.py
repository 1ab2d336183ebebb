"""A worker's start: what it reads of a folder without transformers is what transformers reads."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from areal_agents.engines import protocol as p
from areal_agents.engines.cpu.architecture import SUPPORTED, Shape
from areal_agents.engines.cpu.read_parameters import read_parameters
from areal_agents.engines.cpu.worker import _parameters
from areal_agents.engines.spec import EngineSpec
from areal_agents.errors import ModelError
from tests.tiny_models import save_tiny, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[3]


def shape_of(folder: Path) -> Shape:
    return Shape.read(folder, 128)


@pytest.mark.parametrize("shards", ["1GB", "60KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_parameters_are_those_of_transformers(tmp_path: Path, kind: str, tied: bool, shards: str) -> None:
    tiny_model(kind, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "60KB")
    shape = shape_of(tmp_path)
    found = read_parameters(str(tmp_path), shape)
    assert found is not None
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    complete = shape.complete(found)
    assert complete.keys() == want.keys()
    assert all(torch.equal(complete[name], tensor) for name, tensor in want.items())
    rounded = _parameters(p.Settings(str(tmp_path), shape, "bf16", 1, 64, 64, 1, 0), torch.bfloat16)
    assert all(torch.equal(tensor, found[name].to(torch.bfloat16)) for name, tensor in rounded.items())
    assert rounded.keys() == found.keys()


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace or, by None, remove a tensor of the folder's file."""
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def test_what_else_a_folder_holds_is_left_to_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", tiny_model())
    shape = shape_of(folder)
    name, norm = str(folder), "model.norm.weight"
    assert read_parameters("areal/on-the-hub", shape) is None
    old: dict[str, Any] = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # older releases saved it
    change(folder, **old)
    assert read_parameters(name, shape) is None
    want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = _parameters(p.Settings(name, shape, "fp32", 1, 64, 64, 1, 0), torch.float32)
    assert all(torch.equal(found[key], tensor) for key, tensor in want.items())
    change(folder, **dict.fromkeys(old))
    assert read_parameters(name, shape) is not None
    for other in (None, torch.ones(3), torch.ones(48, dtype=torch.int8)):  # gone, misshapen, quantized
        change(folder, **{norm: other})
        assert read_parameters(name, shape) is None
    change(folder, **{norm: torch.ones(48)})
    (folder / "adapter_config.json").write_text("{}")
    assert read_parameters(name, shape) is None
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"cut")
    assert read_parameters(name, shape) is None
    (folder / "model.safetensors").unlink()
    for index in ("{}", "[]", "{", '{"weight_map": {"a": "absent.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(index)
        assert read_parameters(name, shape) is None


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": {"rope_type": "unheard"}}, {"hidden_size": "many"}, {"num_attention_heads": 7}, None],
    ids=["rope", "type", "heads", "empty"],
)
def test_what_is_no_model_is_named(tmp_path: Path, changes: dict[str, Any] | None) -> None:
    """transformers raises errors of many types for it."""
    if changes is not None:
        tiny_config().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=f"{tmp_path} cannot be read as a model"):
        Shape.read(tmp_path, 64)


_START = """
import io, pickle, queue, sys
from areal_agents.engines.cpu.worker import _build
worker, context = _build(pickle.load(sys.stdin.buffer), queue.SimpleQueue(), io.BytesIO())
print(context, "transformers" in sys.modules)
"""


def test_a_worker_starts_without_transformers(tmp_path: Path) -> None:
    """Its import takes longer than all else of a start together."""
    folder = save_tiny(tmp_path, tiny_model())
    given = pickle.dumps(p.Settings(str(folder), shape_of(folder), "fp32", 2, 64, 64, 1, 0))
    done = subprocess.run([sys.executable, "-c", _START], input=given, cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout.decode() == "64 False\n", done.stderr.decode()


_TRAVELS = """
import pickle, sys
import areal_agents.engines.cpu.engine
spec = pickle.load(sys.stdin.buffer)
print(spec.options["shape"].family, "torch" in sys.modules)
"""


def test_a_process_that_only_starts_engines_needs_no_torch(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tiny_model())
    spec = EngineSpec("transformers", str(folder), {"shape": shape_of(folder)})
    done = subprocess.run(
        [sys.executable, "-c", _TRAVELS], input=pickle.dumps(spec), cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.stdout.decode() == "llama False\n", done.stderr.decode()
