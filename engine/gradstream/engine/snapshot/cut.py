"""The file of a cut: which models it holds, where their files are, and a digest of the text itself."""

import hashlib
from pathlib import PurePosixPath

import msgspec

from gradstream.engine.adapters.adapter import Owner
from gradstream.engine.checkpoint.manifest import FileEntry
from gradstream.engine.snapshot.shards import WholeTensor, is_shard_name
from gradstream.engine.snapshot.state import ModelKind
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec

CUT_VERSION = 1
MODELS = "models"

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


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a cut.

    directory: below the store. files: by name in the directory, one a rank that wrote. tensors: by name, what the files hold
    together. spec, scale, layout_digest: of a "lora" model; spec has its seed resolved. step: optimizer steps taken. has_grad: there
    is a tensor `grad` with what was accumulated since the last one.
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

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())

    def owner(self, model_id: ModelId) -> Owner:
        """Whose adapter it is; for a "lora" model."""
        assert self.spec is not None
        return Owner(
            model_id=model_id,
            tenant=self.tenant,
            session_id=self.session_id,
            spec=self.spec,
            user_metadata=self.user_metadata,
        )


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
