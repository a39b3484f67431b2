"""Saves on disk with a true manifest and no weights, for tests of what housekeeping does with them."""

from pathlib import Path
from typing import Any

from gradstream.engine.checkpoint.location import Checkpoint, parse_uri
from gradstream.engine.checkpoint.manifest import MANIFEST_VERSION, Manifest, entries, write_manifest
from gradstream.shared.ids import LOCAL_TENANT, FutureId, TenantId
from gradstream.shared.wire import LoraSpec


def write_save(
    output_dir: Path, uri: str, *, created_ms: int, tenant: str = LOCAL_TENANT, num_bytes: int = 7, **fields: Any
) -> Manifest:
    """The manifest of a save of num_bytes that now lies where uri says."""
    location = parse_uri(uri)
    directory = location.directory(output_dir)
    directory.mkdir(parents=True)
    (directory / "data").write_bytes(bytes(num_bytes))
    model = location.model if isinstance(location, Checkpoint) else "s:train:0"
    manifest = Manifest(
        version=MANIFEST_VERSION,
        kind=location.kind.value if isinstance(location, Checkpoint) else "ephemeral",
        source=uri,
        job=FutureId(f"{model}:1"),
        model=model,
        tenant=TenantId(tenant),
        base_model="tiny",
        lora=LoraSpec(rank=4, seed=1),
        scale=4.0,
        step=3,
        has_optimizer=True,
        created_ms=created_ms,
        files=entries(directory),
        **fields,
    )
    write_manifest(directory, manifest)
    return manifest
