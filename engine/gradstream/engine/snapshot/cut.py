"""The file of a cut: which models it holds, where their files are, and a digest of the text itself.

Needs no torch, so that tools which only look at snapshots start quickly.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from gradstream.engine.checkpoint.manifest import FileEntry
from gradstream.engine.files import storage_errors
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec, OptimizerSpec

CUT_VERSION = 1
MODELS = "models"
CUTS = "cuts"
_SUFFIX = ".json"
_SHARD_NAME = re.compile(r"shard-\d{5,}-model-00001-of-00001\.safetensors")

DType = Literal["float32", "bfloat16"]
ModelKind = Literal["lora", "full"]

# (epoch, number) of the last batch that a cut holds.
CutId = tuple[int, int]


class CutHead(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the run a cut lies. epoch, number: the last batch that it holds.

    cursor: the log's entry up to which jobs had been taken. log_segment, log_offset (bytes): where on disk the log goes on after that
    batch. fingerprint: of the engine that wrote it. engine: the engine's name. created_ms: milliseconds since the Unix epoch.
    """

    epoch: int
    number: int
    cursor: str
    log_segment: str
    log_offset: int
    fingerprint: str
    engine: str
    created_ms: int

    @property
    def id(self) -> CutId:
        return self.epoch, self.number


class WholeTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor with all its parts together."""

    dtype: DType
    shape: tuple[int, ...]


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a cut.

    directory: below the store. files: by name in the directory, one a rank that wrote. tensors: by name, what the files hold
    together. spec, scale: of a "lora" model; spec has its seed resolved. layout_digest: of the flat tensors' layout. step: optimizer steps
    taken. has_grad: there is a tensor `grad` with what was accumulated since the last one, of valid_tokens tokens. The tensors besides
    `weights` and `grad` are the state of optimizer, which began with zeros after optim_began steps, and `frozen`: the frozen factors of an
    adapter that was merged. is_asleep: of a "full" model, that it was in host memory.
    """

    directory: str
    files: dict[str, FileEntry]
    tensors: dict[str, WholeTensor]
    kind: ModelKind
    tenant: TenantId
    session_id: SessionId
    step: int
    has_grad: bool
    spec: LoraSpec | None = None
    scale: float = 1.0
    layout_digest: str = ""
    user_metadata: dict[str, str] | None = None
    optimizer: OptimizerSpec = OptimizerSpec()
    reduction: Literal["sum", "token_mean"] = "sum"
    valid_tokens: int = 0
    is_asleep: bool = False
    optim_began: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot: every live model as it was after batch head.id."""

    head: CutHead
    models: dict[ModelId, ModelEntry]

    @property
    def id(self) -> CutId:
        return self.head.id

    @property
    def name(self) -> str:
        return cut_name(self.id)

    @property
    def size_bytes(self) -> int:
        """All files that it names, those that it shares with other cuts too."""
        return sum(entry.size_bytes for entry in self.models.values())


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """sha256: hex, of the text of cut without white space."""

    version: int
    sha256: str
    cut: msgspec.Raw


def cut_name(cut_id: CutId) -> str:
    """The name of a cut's file without its suffix, and of the model directories that it wrote; sorts by age as text."""
    epoch, number = cut_id
    return f"{epoch:08d}-{number:010d}"


def parse_name(name: str) -> CutId | None:
    """The inverse of `cut_name`; None for another name."""
    epoch, _, number = name.partition("-")
    if not (epoch.isdecimal() and number.isdecimal()):
        return None
    cut_id = int(epoch), int(number)
    return cut_id if cut_name(cut_id) == name else None


def cut_path(directory: Path, cut_id: CutId) -> Path:
    """The file of a cut in the store at directory."""
    return directory / CUTS / f"{cut_name(cut_id)}{_SUFFIX}"


def cut_ids(directory: Path) -> list[CutId]:
    """Of every file of the store at directory that is named as a cut, newest first."""
    found = [parse_name(path.stem) for path in (directory / CUTS).glob(f"*{_SUFFIX}")]
    return sorted((cut_id for cut_id in found if cut_id is not None), reverse=True)


def shard_name(rank: int) -> str:
    """The file of a rank in a model's directory."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def is_shard_name(name: str) -> bool:
    """True for a name that `shard_name` gives."""
    return _SHARD_NAME.fullmatch(name) is not None


def read_cut(directory: Path, cut_id: CutId) -> Cut:
    """A cut of the store at directory; raises StorageFailure when its file is missing, unreadable, damaged, or another cut's."""
    path = cut_path(directory, cut_id)
    with storage_errors(f"snapshot {path} cannot be read"):
        data = path.read_bytes()
    cut = decode_cut(data, source=f"snapshot {path}")
    if cut.id != cut_id:
        raise StorageFailure(f"snapshot {path} is damaged: it says that it is {cut.name}")
    return cut


def encode_cut(cut: Cut) -> bytes:
    """Readable JSON of a cut with its digest."""
    text = msgspec.json.encode(cut)
    file = _File(version=CUT_VERSION, sha256=hashlib.sha256(text).hexdigest(), cut=msgspec.Raw(text))
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def decode_cut(data: bytes, *, source: str) -> Cut:
    """The cut in data; source names it in messages. Raises StorageFailure unless it is whole and of a version known here."""
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != CUT_VERSION:
            raise StorageFailure(f"{source} has format version {version}; this server reads version {CUT_VERSION}")
        file = msgspec.json.decode(data, type=_File)
        text = msgspec.json.format(bytes(file.cut), indent=-1)
        if hashlib.sha256(text).hexdigest() != file.sha256:
            raise StorageFailure(f"{source} is damaged: it does not have its own digest")
        cut = msgspec.json.decode(text, type=Cut)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageFailure(f"{source} is damaged: {error}") from error
    _check_paths(cut, source=source)
    return cut


class _Version(msgspec.Struct):
    version: int


def _check_paths(cut: Cut, *, source: str) -> None:
    """Raise StorageFailure when a path would lead out of the store."""
    for model_id, entry in cut.models.items():
        parts = PurePosixPath(entry.directory).parts
        if len(parts) != 3 or parts[0] != MODELS or ".." in parts or not all(map(is_shard_name, entry.files)):
            raise StorageFailure(f"{source}: the paths of model {model_id} are not those of a snapshot")
