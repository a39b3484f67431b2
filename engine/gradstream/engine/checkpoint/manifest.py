"""The manifest of a checkpoint: what it holds, and the digest of every file, which makes it valid."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from gradstream.engine.files import FILE_MODE, storage_errors
from gradstream.shared.errors import InvalidRequest, StorageFailure, UnknownModel
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.wire import LoraSpec, OptimizerSpec

MANIFEST_VERSION = 1
MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 20


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the checkpoint. sha256 is hex."""

    size_bytes: int
    sha256: str


class FullFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What only checkpoints of full weights have to tell.

    format: of the files; a "huggingface" one holds weights rounded for inference, the others can be trained on. dtype: of the weights.
    architecture: the class in transformers. has_state: the optimizer's tensors are in the files; before the first step they are all
    zero, and left out.
    """

    format: Literal["dcp", "torch", "huggingface"]
    dtype: Literal["float32", "bfloat16"]
    architecture: str
    has_state: bool


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint directory holds.

    source: the URI it was saved as. job: the future of the job that saved it. model: the id of the model it was saved from.
    lora, of an adapter, has its seed set, and scale is what b @ a is multiplied by; full is of full weights. step: optimizer steps the
    model had taken, by optimizer, whose state began with zeros after optim_began of them. num_merges: how often an adapter's factors were
    put aside (`adapters.merging`); the files have these first, and then those that lora tells of.
    created_ms: milliseconds since the Unix epoch. files: by path below the directory.
    """

    version: int
    kind: Literal["weights", "sampler_weights", "external_weights", "ephemeral"]
    source: str
    job: FutureId
    model: str
    tenant: TenantId
    base_model: str
    lora: LoraSpec | None
    scale: float
    step: int
    has_optimizer: bool
    created_ms: int
    files: dict[str, FileEntry]
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    optimizer: OptimizerSpec = OptimizerSpec()
    full: FullFacts | None = None
    num_merges: int = 0
    optim_began: int = 0

    @property
    def stored_rank(self) -> int:
        """The rank of the adapter in the files, with everything that was merged; raises InvalidRequest when these are full weights."""
        return self.adapter.rank * (self.num_merges + 1)

    @property
    def adapter(self) -> LoraSpec:
        """The spec of an adapter as it is trained; raises InvalidRequest when these are full weights."""
        if self.lora is None:
            raise InvalidRequest(f"checkpoint {self.source} holds full weights, and this is for LoRA adapters only")
        return self.lora

    @property
    def size_bytes(self) -> int:
        """All files together, without the manifest."""
        return sum(entry.size_bytes for entry in self.files.values())

    @property
    def expires_ms(self) -> int | None:
        """When the time to live is over; None when it has no end."""
        return None if self.ttl_seconds is None else self.created_ms + 1000 * self.ttl_seconds


def entries(directory: Path) -> dict[str, FileEntry]:
    """The entry of every file below directory, by its path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): FileEntry(size_bytes=path.stat().st_size, sha256=_sha256(path))
        for path in paths
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest as readable JSON."""
    (directory / MANIFEST_FILE).write_bytes(_as_json(manifest))


def _as_json(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def change_ttl(directory: Path, *, created_ms: int, expires_ms: int | None, source: str) -> bool:
    """Make the manifest of the save that was made at created_ms say when it expires (rounded up to a second); True when it changed.

    A save that replaces the directory meanwhile is left alone: everything happens in the directory that was opened. Raises
    StorageFailure when it is unreadable or the disk refuses.
    """
    ttl_seconds = None if expires_ms is None else max(0, -((created_ms - expires_ms) // 1000))
    with storage_errors(f"cannot change {source}"):
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.fdopen(os.open(MANIFEST_FILE, os.O_RDONLY, dir_fd=folder), "rb") as file:
                manifest = _decode(file.read(_MAX_MANIFEST_BYTES + 1), source=source)
            if manifest.created_ms != created_ms or manifest.ttl_seconds == ttl_seconds:
                return False
            _replace_manifest(folder, _as_json(msgspec.structs.replace(manifest, ttl_seconds=ttl_seconds)))
        finally:
            os.close(folder)
    return True


def _replace_manifest(folder: int, data: bytes) -> None:
    draft = f".{MANIFEST_FILE}.tmp"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE, dir_fd=folder), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, MANIFEST_FILE, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)


def read_manifest(directory: Path, *, source: str) -> Manifest:
    """The manifest in directory, its files not yet verified.

    source is the URI for messages. Raises UnknownModel when there is no checkpoint, StorageFailure when it is unreadable or of a
    version that this server does not know.
    """
    path = directory / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnknownModel(f"there is no checkpoint {source}") from error
    except OSError as error:
        raise StorageFailure(f"checkpoint {source} cannot be read: {error.strerror}") from error
    return _decode(data, source=source)


def _decode(data: bytes, *, source: str) -> Manifest:
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != MANIFEST_VERSION:
            raise StorageFailure(
                f"checkpoint {source} has format version {version}; this server reads version {MANIFEST_VERSION}"
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise StorageFailure(f"checkpoint {source} is damaged: {MANIFEST_FILE} is unreadable ({error})") from error


class _Version(msgspec.Struct):
    version: int


def verify(directory: Path, manifest: Manifest, *, source: str) -> None:
    """Raise StorageFailure, naming the file, unless every file is as the manifest says."""
    damage = damage_of(directory, manifest.files)
    if damage is not None:
        raise StorageFailure(f"checkpoint {source} is damaged: {damage}")


def damage_of(directory: Path, files: Mapping[str, FileEntry]) -> str | None:
    """What is wrong with the first of these files below directory that is not as its entry says; None when all are."""
    for name, entry in files.items():
        path = directory / name
        try:
            is_same = path.stat().st_size == entry.size_bytes and _sha256(path) == entry.sha256
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not is_same:
            return f"{name} does not have the digest in its manifest"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
