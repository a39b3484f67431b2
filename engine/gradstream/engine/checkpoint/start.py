"""The checkpoint that models begin with in the place of the base weights, as the server's config names it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import Manifest, read_manifest
from gradstream.engine.config import EngineConfig
from gradstream.engine.parallel.agree import on_leader
from gradstream.engine.parallel.comm import Comm
from gradstream.shared.errors import GradstreamError, Unsupported
from gradstream.shared.ids import DEFAULT_MODEL, ModelId, name_of

# Clients of that dialect are shown their checkpoints so; a model's name is its id for the machine's own tenant.
_SHOWN = "xorl://"
_SCHEME = "tinker://"
CHANGED = "load_checkpoint_path: {} holds another checkpoint than when this server was started; restart it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A checkpoint, found at the engine's start. place: its directory. text: as the config names it, for messages."""

    place: Path
    text: str
    manifest: Manifest

    @property
    def digest(self) -> str:
        """Of what its files hold."""
        return files_digest(self.manifest)

    def uri(self) -> str:
        return self.text

    def directory(self, _output_dir: Path) -> Path:
        return self.place


def files_digest(manifest: Manifest) -> str:
    """128-bit BLAKE2b, hex, of every file's name and digest."""
    digest = hashlib.blake2b(digest_size=16)
    for name, entry in sorted(manifest.files.items()):
        digest.update(f"{name}\0{entry.sha256}\0".encode())
    return digest.hexdigest()


def begins_there(model_id: ModelId) -> bool:
    """True for the model that clients need not make; other adapters begin afresh."""
    return name_of(model_id) == DEFAULT_MODEL


def find_start(config: EngineConfig, comm: Comm) -> Start | None:
    """The checkpoint that config names; None when it names none. Rank 0 reads, so only its disk must have it; collective.

    Raises Unsupported when no model of this engine can begin with it.
    """
    text = config.load_checkpoint_path
    if not text:
        return None
    try:
        place = place_of(text, config.output_dir)

        def work() -> bytes:
            manifest = read_manifest(place, source=text)
            _check(manifest, config)
            return msgspec.msgpack.encode(manifest)

        manifest = msgspec.msgpack.decode(on_leader(comm, work), type=Manifest)
    except GradstreamError as error:
        raise Unsupported(f"load_checkpoint_path: {error.message}") from error
    return Start(place=place, text=text, manifest=manifest)


def place_of(text: str, output_dir: Path) -> Path:
    """The directory that a config's text means; raises InvalidRequest for a URI of no checkpoint."""
    if text.startswith((_SCHEME, _SHOWN)):
        return parse_uri(_SCHEME + text.partition("://")[2]).directory(output_dir)
    return Path(text)


def _check(manifest: Manifest, config: EngineConfig) -> None:
    lora, full = manifest.lora, manifest.full
    if config.is_lora:
        if lora is None:
            raise Unsupported("it holds full weights, and this server trains LoRA adapters; use enable_lora: false")
        if lora.rank != config.default_rank:
            raise Unsupported(
                f"its adapter has rank {lora.rank}, and model {DEFAULT_MODEL!r} has {config.default_rank}; use lora_rank: {lora.rank}"
            )
    elif full is None:
        raise Unsupported("it is a LoRA adapter, and this server trains full weights; use enable_lora: true")
    elif full.format == "huggingface":
        raise Unsupported(
            f"it holds weights rounded for inference ({manifest.kind}); use one that save_weights made, or make that directory the model_path"
        )
