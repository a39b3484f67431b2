"""Writes an adapter to its place, whole or not at all."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.location import Checkpoint, CheckpointKind, Ephemeral, Location
from gradstream.engine.checkpoint.manifest import MANIFEST_VERSION, Manifest, entries, read_manifest, write_manifest
from gradstream.engine.checkpoint.peft_format import write_peft
from gradstream.engine.files import whole_directory
from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.errors import CheckpointExists, GradstreamError
from gradstream.shared.ids import FutureId

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOrder:
    """What to save where. job: the future of the job that asks; the same job again finds its own checkpoint and is content."""

    location: Location
    job: FutureId
    base_model: str
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


def save_adapter(adapter: Adapter, order: SaveOrder, output_dir: Path, *, clock: Clock | None = None) -> None:
    """Write adapter's weights, and its optimizer for a training checkpoint, as order says.

    The accumulated gradient is not saved. Runs on one rank only. Raises CheckpointExists when the name is taken by another job
    and overwrite is false, StorageFailure when the disk refuses.
    """
    location = order.location
    directory = location.directory(output_dir)
    _check_tenant(adapter, location, directory)
    has_optimizer = isinstance(location, Checkpoint) and location.kind is CheckpointKind.WEIGHTS
    try:
        # A sampler's own weights have no name that a user could take twice.
        with whole_directory(directory, replace=order.overwrite or isinstance(location, Ephemeral)) as draft:
            write_peft(draft, adapter.layout, adapter.weights, scale=adapter.scale, base_model=order.base_model)
            if has_optimizer:
                _write_optimizer(adapter, draft / OPTIMIZER_FILE)
            manifest = Manifest(
                version=MANIFEST_VERSION,
                kind=location.kind.value if isinstance(location, Checkpoint) else "ephemeral",
                source=location.uri(),
                job=order.job,
                model=adapter.model_id,
                tenant=adapter.tenant,
                base_model=order.base_model,
                lora=adapter.spec,
                scale=adapter.scale,
                step=adapter.step,
                has_optimizer=has_optimizer,
                created_ms=(clock or SystemClock()).wall_ms(),
                files=entries(draft),
                ttl_seconds=order.ttl_seconds,
                user_metadata=order.user_metadata,
            )
            write_manifest(draft, manifest)
    except FileExistsError as error:
        if not _is_saved_by(order.job, directory, source=location.uri()):
            raise CheckpointExists(
                f"checkpoint {location.uri()} exists already; choose another name, or set overwrite to replace it"
            ) from error


def _write_optimizer(adapter: Adapter, path: Path) -> None:
    moments = {"exp_avg": adapter.exp_avg, "exp_avg_sq": adapter.exp_avg_sq}
    tensors = {
        f"{name}.{site}.{part}": view.detach().cpu().clone()
        for name, flat in moments.items()
        for site, pair in adapter.named_views(flat).items()
        for part, view in zip("ab", pair, strict=True)
    }
    save_file(tensors, path, metadata={"format": "pt", "step": str(adapter.step)})


def _check_tenant(adapter: Adapter, location: Location, directory: Path) -> None:
    """A sampler's directory may be replaced, but never by another tenant; a checkpoint's is named after the tenant's own model."""
    if isinstance(location, Ephemeral) and directory.exists():
        manifest = read_manifest(directory, source=location.uri())
        if manifest.tenant != adapter.tenant:
            raise CheckpointExists(f"sampler {location.sampler} exists already")


def _is_saved_by(job: FutureId, directory: Path, *, source: str) -> bool:
    """True when the checkpoint in directory came from this very job, which then ran before a crash and runs again."""
    try:
        return read_manifest(directory, source=source).job == job
    except GradstreamError:
        return False
