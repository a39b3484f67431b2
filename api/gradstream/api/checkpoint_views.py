"""Checkpoints as lists show them, made from their records."""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel

from gradstream.api.names import shown
from gradstream.api.records import STORED_SCHEME, Record, metadata_of, when

_TYPES: Mapping[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


class Checkpoint(BaseModel):
    """tinker_path and path: the same checkpoint, as clients of the two dialects call it."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: datetime
    tinker_path: str
    path: str
    size_bytes: int | None
    public: bool
    user_metadata: dict[str, str] | None
    expires_at: datetime | None


def checkpoint_view(path: str, record: Record) -> Checkpoint:
    """A checkpoint's record for a client. path: its URI."""
    _, _, checkpoint_id = path.removeprefix(STORED_SCHEME).partition("/")
    size_bytes, expires_ms = record.get("size_bytes"), record.get("expires_ms")
    return Checkpoint(
        checkpoint_id=checkpoint_id,
        checkpoint_type=_TYPES[checkpoint_id.partition("/")[0]],
        time=when(record["created_ms"]),
        tinker_path=path,
        path=shown(path),
        size_bytes=int(size_bytes) if size_bytes else None,
        public=record.get("public") == "1",
        user_metadata=metadata_of(record),
        expires_at=when(expires_ms) if expires_ms else None,
    )
